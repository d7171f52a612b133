"""Hyena: gates around a convolution as long as the sequence, whose filter a small network gives (Poli et al. 2023, https://arxiv.org/abs/2302.10866).

The filter's network has the sizes of the authors' language models. Left out: training the positions that it is given
(at a learning rate of 1e-5 in the official code), learning rates of its own, and dropout.
"""

from __future__ import annotations

import math
from itertools import pairwise
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from seqzoo.kernels.backends import check_shape
from seqzoo.kernels.long_conv import long_conv
from seqzoo.mixer import Mixer, reset_parameters
from seqzoo.parts.settings import check_positive
from seqzoo.parts.short_conv import SplitCausalConv


class HyenaState(NamedTuple):
    """What a sequence leaves behind: the last inputs of the long convolutions, side by side, and of the short one."""

    long: Float[Tensor, "batch max_length_minus_one channel"]
    conv: Float[Tensor, "batch size_minus_one channel"]


class ImplicitFilter(nn.Module):
    """Filters as a function of time: a network of sines over positions, faded out at another speed each channel.

    Args:
        channels: number of filters.
        length: taps of each.
        width: inner width of the network.
        features: numbers that say where a tap is: its place in [0, 1], and ``(features - 1) / 2`` cosines and sines.
        frequency: where the learned frequency of every sine starts.
    """

    LAYERS = 2
    # The slowest and the fastest filter have faded to a hundredth at 1.5 and at 0.3 of the length.
    DECAYS = (math.log(100) / 1.5, math.log(100) / 0.3)

    def __init__(self, channels: int, length: int, *, width: int, features: int, frequency: float) -> None:
        super().__init__()
        self.length, self.features, self.start = length, features, frequency
        sizes = [features] + [width] * (self.LAYERS + 1)
        self.layers = nn.ModuleList(nn.Linear(a, b) for a, b in pairwise(sizes))
        self.readout = nn.Linear(width, channels, bias=False)
        self.frequency = nn.Parameter(torch.full((width,), float(frequency)))
        self.skip = nn.Parameter(torch.randn(channels))

    def reset_parameters(self) -> None:
        for layer in (*self.layers, self.readout):
            reset_parameters(layer)
        nn.init.constant_(self.frequency, self.start)
        nn.init.normal_(self.skip)

    def forward(self) -> Float[Tensor, "channel length"]:
        """The filters; what the current token adds beside them is in their first tap."""
        weight = self.readout.weight
        wide = torch.promote_types(weight.dtype, torch.float32)
        place = torch.arange(self.length, device=weight.device, dtype=wide)[:, None]
        share = place / (self.length - 1)
        bands = (self.features - 1) // 2
        angles = (
            2 * math.pi / self.length * place * torch.linspace(1e-4, bands - 1, bands, device=place.device).to(wide)
        )
        with torch.autocast(weight.device.type, enabled=False):
            h = torch.cat([share, angles.cos(), -angles.sin()], -1).to(weight.dtype)
            for layer in self.layers:
                h = torch.sin(self.frequency * layer(h))
            decay = torch.linspace(*self.DECAYS, len(weight), device=place.device).to(wide)
            kernel = self.readout(h) * torch.exp(-share * decay)
            return torch.cat([kernel[:1] + self.skip, kernel[1:]]).T


class Hyena(Mixer):
    """Attention's place taken by gates and long filters, at ``time log time`` operations.

        [x_0, ..., x_{order-1}, v] = conv(W x),   v <- h_i * (x_i v)  for i = order-1 ... 1,   y = W_out(x_0 v)

    Args:
        dim: width of the input and output.
        max_length: taps of a filter, at least 2: how far a token sees. Its shape is a function of t / max_length.
        order: gates; each but one has a filter of its own. At least 2.
        conv_size: taps of the short convolution.
        filter_width: inner width of the network that gives the filters.
        filter_features: numbers that it is told of a tap's place; odd, at least 3.
        filter_frequency: frequency at which its sines start.
        backend: ``auto``, or an implementation that all its operators have (see ``seqzoo layers``).

    Raises:
        ValueError: a setting is out of its range.
    """

    state_formula = "(max_length-1)·(order-1)·dim + (conv_size-1)·(order+1)·dim"
    operators = ("long_conv", "short_conv")
    no_weight_decay = frozenset(
        f"filter.{name}.weight" for name in ("readout", *(f"layers.{i}" for i in range(ImplicitFilter.LAYERS + 1)))
    )

    def __init__(
        self,
        dim: int,
        *,
        max_length: int = 1024,
        order: int = 2,
        conv_size: int = 3,
        filter_width: int = 64,
        filter_features: int = 33,
        filter_frequency: float = 14.0,
        backend: str = "auto",
    ) -> None:
        super().__init__(dim)
        if max_length < 2:
            raise ValueError(f"max_length={max_length}: a filter needs at least 2 taps")
        if order < 2:
            raise ValueError(f"order={order}: at least 2, one gate before the convolution and one after it")
        if filter_width < 1:
            raise ValueError(f"filter_width={filter_width}: a network needs at least 1 unit")
        if filter_features < 3 or filter_features % 2 == 0:
            raise ValueError(f"filter_features={filter_features}: odd and at least 3 (place, cosines, sines)")
        check_positive("filter_frequency", filter_frequency)
        self.dim, self.order, self.backend = dim, order, backend
        self.projection = nn.Linear(dim, (order + 1) * dim)
        self.conv = SplitCausalConv([dim] * (order + 1), conv_size, bias=True, backend=backend)
        self.filter = ImplicitFilter(
            (order - 1) * dim, max_length, width=filter_width, features=filter_features, frequency=filter_frequency
        )
        self.out = nn.Linear(dim, dim)

    def forward(
        self,
        x: Float[Tensor, "batch time dim"],
        state: HyenaState | None = None,
        starts: Bool[Tensor, "batch time"] | None = None,
    ) -> tuple[Float[Tensor, "batch time dim"], HyenaState]:
        (outer, *gates, v), conv = self.conv(self.projection(x), state and state.conv, starts)
        kernels, pasts = self.filter().split(self.dim), [None] * len(gates)
        if state is not None:
            kept = (len(x), self.filter.length - 1, len(gates) * self.dim)
            check_shape("Hyena", "state.long", state.long, kept)
            pasts = state.long.split(self.dim, -1)
        lasts = []
        for gate, kernel, past in zip(reversed(gates), kernels, pasts, strict=True):
            v, last = long_conv(v * gate, kernel, past, starts, backend=self.backend)
            lasts.append(last)
        return self.out(outer * v), HyenaState(torch.cat(lasts, -1), conv)

    def state_bytes(self, length: int, *, dtype: torch.dtype = torch.float32) -> int:
        return (self.filter.length - 1) * (self.order - 1) * self.dim * dtype.itemsize + self.conv.state_bytes(dtype)
