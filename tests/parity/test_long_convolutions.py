"""Hyena, LongConv and SGConv against their official equations, term by term: no package holds the authors' code.

Read in HazyResearch/safari (standalone_hyena.py, long_conv_kernel.py) and ctlllll/SGConv (gconv_standalone.py).
"""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from seqzoo.layers import Hyena, LongConv, SGConv
from seqzoo.mixer import reset_parameters

DIM, LENGTH, TIMES = 8, 24, (1, 13, 24, 60)


def draw(time):
    return torch.randn(2, time, DIM, generator=torch.Generator().manual_seed(time), dtype=torch.float64)


def convolve(u, filters):
    """Every output as a sum over what it sees: ``[batch time channel]`` with ``[channel size]``."""
    y = torch.zeros_like(u)
    for back in range(min(u.shape[1], filters.shape[1])):
        y[:, back:] += filters[:, back] * u[:, : u.shape[1] - back]
    return y


def glu(linear, x):
    value, gate = F.linear(x, linear.weight, linear.bias).chunk(2, -1)
    return value * gate.sigmoid()


def assert_agree(ours, theirs):
    torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10)


def hyena_filters(layer):
    """sin(w (W x + b)) three times over [t, Re, Im] of e^{-i f w}, a projection, and e^{-t |delta|}."""
    net = layer.filter
    t = torch.linspace(0, 1, LENGTH, dtype=torch.float64)
    bands = (net.features - 1) // 2
    f = torch.linspace(1e-4, bands - 1, bands).double()
    w = 2 * torch.pi * torch.arange(LENGTH, dtype=torch.float64) / LENGTH
    z = torch.exp(-1j * f * w[:, None])
    h = torch.cat([t[:, None], z.real, z.imag], 1)
    for linear in net.layers:
        h = torch.sin(net.frequency * (h @ linear.weight.T + linear.bias))
    channels = len(net.readout.weight)
    deltas = torch.linspace(math.log(1e-2) / 1.5, math.log(1e-2) / 0.3, channels).double()
    return (h @ net.readout.weight.T * torch.exp(-t[:, None] * deltas.abs())).T


@pytest.mark.parametrize("time", TIMES)
@pytest.mark.parametrize("order", [2, 3])
def test_hyena(order, time):
    torch.manual_seed(0)
    layer, x = Hyena(DIM, max_length=LENGTH, order=order, filter_width=6, filter_features=5).double(), draw(time)
    mixed = F.linear(x, layer.projection.weight, layer.projection.bias)
    short = F.conv1d(F.pad(mixed.mT, (2, 0)), layer.conv.weight[:, None], layer.conv.bias, groups=(order + 1) * DIM).mT
    *gates, v = short.chunk(order + 1, -1)
    filters, skips = hyena_filters(layer), layer.filter.skip
    for index, gate in enumerate(reversed(gates[1:])):
        mine = slice(index * DIM, (index + 1) * DIM)
        v = v * gate
        v = convolve(v, filters[mine]) + skips[mine] * v
    assert_agree(layer(x)[0], F.linear(gates[0] * v, layer.out.weight, layer.out.bias))


@pytest.mark.parametrize("time", TIMES)
def test_long_conv(time):
    torch.manual_seed(0)
    layer, x = LongConv(DIM, max_length=LENGTH).double(), draw(time)
    squashed = layer.kernel.sign() * (layer.kernel.abs() - 0.003).clamp(min=0)
    assert_agree(layer(x)[0], glu(layer.out, F.gelu(convolve(x, squashed) + layer.skip * x)))


@pytest.mark.parametrize("time", TIMES)
def test_sgconv(time):
    """Each scale by linear interpolation between the centres of its parameters' spans, then the norm at the start."""
    torch.manual_seed(0)
    layer = SGConv(DIM, max_length=LENGTH, kernel_dim=3, decay_min=1.5, decay_max=3.0).double()
    reset_parameters(layer)
    multiplier, count = torch.linspace(1.5, 3.0, DIM).double(), len(layer.scales)
    assert count == 1 + math.ceil(math.log2(LENGTH / 3)) == 4

    def filters():
        taps = []
        for scale, weight in enumerate(layer.scales):
            factor = 2 ** max(0, scale - 1)
            for tap in range(3 * factor):
                at = min(max((tap + 0.5) / factor - 0.5, 0), 2)
                low, high = math.floor(at), min(math.floor(at) + 1, 2)
                value = (low + 1 - at) * weight[:, low] + (at - low) * weight[:, high]
                taps.append(value * multiplier ** (count - 1 - scale))
        return torch.stack(taps, 1)

    start, x = filters().norm(dim=1, keepdim=True).detach(), draw(time)
    with torch.no_grad():
        layer.scales.mul_(1 + torch.rand_like(layer.scales))  # trained: the norm stays what it was
    kernel = (filters() / start)[:, :LENGTH]
    assert_agree(layer(x)[0], glu(layer.out, F.gelu(convolve(x, kernel) + layer.skip * x)))


def test_the_official_default_of_squashing_leaves_nothing_to_learn():
    layer = LongConv(DIM, max_length=LENGTH, squash=0.1)
    layer(draw(20).float())[0].sum().backward()
    assert not layer.kernel.grad.any()
