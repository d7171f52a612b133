"""Hyena, LongConv and SGConv against their official equations, term by term: no package holds the authors' code.

Read in HazyResearch/safari (standalone_hyena.py, long_conv.py) and ctlllll/SGConv (gconv_standalone.py). Those keep no
state: to go on from ours is to read their longer sequence. They read no more than ``max_length`` tokens; beyond them a
filter of ours sees the last ones, which is the same sum.
"""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from peers import Agreement, draw, error, pair, run_ours, run_peer
from torch import nn

from seqzoo.kernels.long_conv import long_conv
from seqzoo.layers import Hyena, LongConv, SGConv
from seqzoo.mixer import reset_parameters

DIM, LENGTH = 32, 48


def convolve(u, filters):
    """Every output as a sum over what it sees: ``[batch time channel]`` with ``[channel size]``."""
    y = filters[:, 0] * u
    for back in range(1, min(u.shape[1], filters.shape[1])):
        y = y + F.pad(filters[:, back] * u[:, :-back], (0, 0, back, 0))
    return y


class PeerHyena(nn.Module):
    """``HyenaOperator``: sin(w (W x + b)) three times over [t, Re, Im] of e^{-i f w}, a projection, e^{-t |delta|}."""

    def __init__(self, order, width, features):
        super().__init__()
        self.order, self.features, filters = order, features, (order - 1) * DIM
        self.in_proj, self.out_proj = nn.Linear(DIM, (order + 1) * DIM), nn.Linear(DIM, DIM)
        self.short_filter = nn.Conv1d((order + 1) * DIM, (order + 1) * DIM, 3, padding=2, groups=(order + 1) * DIM)
        sizes = [features, width, width, width]
        self.implicit_filter = nn.ModuleList(nn.Linear(*sizes[i : i + 2]) for i in range(3))
        self.freq = nn.Parameter(torch.ones(1, width))
        self.readout = nn.Linear(width, filters, bias=False)
        self.bias = nn.Parameter(torch.randn(filters))

    def filters(self):
        weight = self.readout.weight
        t, count = torch.linspace(0, 1, LENGTH, dtype=weight.dtype), torch.arange(LENGTH, dtype=weight.dtype)
        bands = (self.features - 1) // 2
        f = torch.linspace(1e-4, bands - 1, bands).to(weight.dtype)
        z = torch.exp(-1j * f * (2 * torch.pi * count / LENGTH)[:, None])
        h = torch.cat([t[:, None], z.real, z.imag], 1)
        for linear in self.implicit_filter:
            h = torch.sin(self.freq * linear(h))
        deltas = torch.linspace(math.log(1e-2) / 1.5, math.log(1e-2) / 0.3, len(weight)).to(weight.dtype)
        return (self.readout(h) * torch.exp(-t[:, None] * deltas.abs())).T

    def forward(self, x):
        mixed = self.short_filter(self.in_proj(x).mT)[..., : x.shape[1]].mT
        *gates, v = mixed.chunk(self.order + 1, -1)
        filters, biases = self.filters().split(DIM), self.bias.split(DIM)
        for gate, kernel, bias in zip(reversed(gates[1:]), filters, biases, strict=True):
            v = gate * v
            v = convolve(v, kernel) + bias * v
        return self.out_proj(gates[0] * v)


class PeerLongConv(nn.Module):
    """``LongConv`` with ``LongConvKernel``, of one channel a filter: squashed taps, a GELU, a gated projection."""

    def __init__(self, squash):
        super().__init__()
        self.squash = squash
        self.D, self.kernel = nn.Parameter(torch.randn(1, DIM)), nn.Parameter(torch.randn(1, DIM, LENGTH))
        self.output_linear = nn.Linear(DIM, 2 * DIM)

    def forward(self, x):
        kernel = self.kernel[0]
        kernel = kernel.sign() * (kernel.abs() - self.squash).clamp(min=0)
        value, gate = self.output_linear(F.gelu(convolve(x, kernel) + self.D[0] * x)).chunk(2, -1)
        return value * gate.sigmoid()


class PeerSGConv(nn.Module):
    """``GConv`` in the mode ``cat_randn``: scales by linear interpolation between the centres of their taps' spans."""

    def __init__(self, scales, decay_min, decay_max):
        super().__init__()
        self.kernel_list = nn.ParameterList(torch.empty(1, *scale.shape) for scale in scales)
        self.D, self.output_linear = nn.Parameter(torch.randn(1, DIM)), nn.Linear(DIM, 2 * DIM)
        self.register_buffer("multiplier", torch.linspace(decay_min, decay_max, DIM)[:, None])
        self.register_buffer("kernel_norm", torch.ones(DIM, 1))

    def stretched(self):
        pieces = []
        for scale, weight in enumerate(self.kernel_list):
            factor, last = 2 ** max(0, scale - 1), weight.shape[-1] - 1
            place = (torch.arange((last + 1) * factor, dtype=weight.dtype) + 0.5) / factor - 0.5
            low = place.clamp(0, last).floor().long()
            share = place.clamp(0, last) - low
            value = (1 - share) * weight[0][:, low] + share * weight[0][:, (low + 1).clamp(max=last)]
            pieces.append(value * self.multiplier ** (len(self.kernel_list) - 1 - scale))
        return torch.cat(pieces, 1)

    def forward(self, x):
        kernel = self.stretched()[:, :LENGTH] / self.kernel_norm
        value, gate = self.output_linear(F.gelu(convolve(x, kernel) + self.D[0] * x)).chunk(2, -1)
        return value * gate.sigmoid()


def call(peer, x, cache):
    return peer(x)


def hyena(order, frequency=1.0):
    ours = Hyena(DIM, max_length=LENGTH, order=order, filter_width=6, filter_features=5, filter_frequency=frequency)
    peer = PeerHyena(order, width=6, features=5)
    nn.init.constant_(peer.freq, frequency)
    names = {
        "projection.weight": "in_proj.weight",
        "projection.bias": "in_proj.bias",
        "conv.weight": lambda theirs: theirs["short_filter.weight"].squeeze(1),
        "conv.bias": "short_filter.bias",
        "filter.frequency": lambda theirs: theirs["freq"][0],
        "filter.readout.weight": "readout.weight",
        "filter.skip": "bias",
        "out.weight": "out_proj.weight",
        "out.bias": "out_proj.bias",
    }
    names |= {
        f"filter.layers.{i}.{kind}": f"implicit_filter.{i}.{kind}" for i in range(3) for kind in ("weight", "bias")
    }
    return pair(ours, peer, names, call)


COMMON = {
    "skip": lambda theirs: theirs["D"][0],
    "out.weight": "output_linear.weight",
    "out.bias": "output_linear.bias",
}


def longconv():
    names = COMMON | {"kernel": lambda theirs: theirs["kernel"][0]}
    return pair(LongConv(DIM, max_length=LENGTH, squash=0.5), PeerLongConv(squash=0.5), names, call)


def sgconv():
    """The norm is taken at the start, before ``pair`` moves the weights as training would."""
    ours = SGConv(DIM, max_length=LENGTH, kernel_dim=5, decay_min=1.5, decay_max=3.0).double()
    reset_parameters(ours)
    assert len(ours.scales) == 1 + math.ceil(math.log2(LENGTH / 5)) == 5
    peer = PeerSGConv(ours.scales, 1.5, 3.0).double()
    with torch.no_grad():
        for theirs, scale in zip(peer.kernel_list, ours.scales, strict=True):
            theirs.copy_(scale[None])
        peer.kernel_norm.copy_(peer.stretched().norm(dim=1, keepdim=True))

    def scales(theirs):
        return torch.cat([theirs[f"kernel_list.{i}"] for i in range(len(ours.scales))])

    return pair(ours, peer, COMMON | {"scales": scales}, call)


CASES = {"Hyena": lambda: hyena(2), "Hyena, order 3": lambda: hyena(3), "LongConv": longconv, "SGConv": sgconv}


@pytest.fixture(params=CASES.values(), ids=CASES)
def both(request):
    torch.manual_seed(0)
    return request.param()


class TestLongConvolutions(Agreement):
    pass


def test_fast_sines_round_no_worse():
    """At the language models' frequency of 14, three sines magnify the rounding of positions beyond 1e-5 in both."""
    torch.manual_seed(0)
    both, x = hyena(2, frequency=14.0).to(torch.float32), draw(37, torch.float32)
    truth = run_ours(both.to(torch.float64), x.double())
    ours, theirs = run_ours(both, x), run_peer(both, x)
    for name in truth:
        assert error(ours[name], truth[name]) <= 2 * error(theirs[name], truth[name]), name


@torch.no_grad()
def test_transforms_of_filters_longer_than_the_input_hear_the_future():
    """safari's standalone LongConv has filters of 2 L taps under transforms of 2 L, which wrap those past L around; so
    does fla's wherever its filter is longer than its input. safari's other code, and ours, use the first L."""
    fla = pytest.importorskip("fla.modules.long_conv")
    peer, x = fla.LongConvolution(DIM, max_len=2 * LENGTH).double(), draw(LENGTH, torch.float64)  # x + k * x
    changed = x.clone()
    changed[:, -1] += 1
    leaked = (peer(changed) - peer(x))[:, :-1]
    torch.testing.assert_close(leaked, peer.filter.T[LENGTH + 1 :].expand_as(leaked))
    ours = x + long_conv(x, peer.filter)[0]
    torch.testing.assert_close((changed + long_conv(changed, peer.filter)[0])[:, :-1], ours[:, :-1])
    peer.filter = nn.Parameter(peer.filter[:, :LENGTH])
    torch.testing.assert_close(ours, peer(x))


def test_the_official_default_of_squashing_leaves_nothing_to_learn():
    layer = LongConv(DIM, max_length=LENGTH, squash=0.1)
    layer(draw(20, torch.float32))[0].sum().backward()
    assert not layer.kernel.grad.any()
