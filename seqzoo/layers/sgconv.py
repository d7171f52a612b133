"""SGConv: a long convolution of few parameters, stretched over scales that double and fade (Li et al. 2022, https://arxiv.org/abs/2210.09298).

The mode ``cat`` of the official code with a fixed decay, and the gated projection of its configs. The filters' norm at
the start, by which they are divided from then on, is taken when parameters are drawn, not at the first call. Left out:
bidirectional filters, the other modes, learning rates of their own, dropout.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor, nn

from seqzoo.kernels.long_conv import long_conv
from seqzoo.mixer import Mixer
from seqzoo.parts.glu import GatedLinear
from seqzoo.parts.settings import check_positive


class SGConvState(NamedTuple):
    """What a sequence leaves behind: its last inputs."""

    long: Float[Tensor, "batch max_length_minus_one dim"]


class SGConv(Mixer):
    """Filters that grow coarser and weaker the further back they look: ``y = glu(W gelu(k * x + D x))``.

        k = [stretch(w_0, 1) m^{n-1}, stretch(w_1, 1) m^{n-2}, stretch(w_2, 2) m^{n-3}, ...] / norm,  n scales in all

    Args:
        dim: width of the input and output.
        max_length: taps of a filter: how far a token sees.
        kernel_dim: parameters of each scale and channel, at least 1 and at most ``max_length``.
        decay_min: m of the first channel, positive: how much a scale is stronger than the next.
        decay_max: m of the last channel; those between are spread evenly.
        backend: ``auto``, or an implementation that all its operators have (see ``seqzoo layers``).

    Raises:
        ValueError: a setting is out of its range.
    """

    state_formula = "(max_length-1)·dim"
    operators = ("long_conv",)
    norm: Tensor

    def __init__(
        self,
        dim: int,
        *,
        max_length: int = 1024,
        kernel_dim: int = 64,
        decay_min: float = 2.0,
        decay_max: float = 2.0,
        backend: str = "auto",
    ) -> None:
        super().__init__(dim)
        if not 1 <= kernel_dim <= max_length:
            raise ValueError(f"kernel_dim={kernel_dim}: at least 1 and at most max_length={max_length}")
        check_positive("decay_min", decay_min)
        check_positive("decay_max", decay_max)
        self.max_length, self.decays, self.backend = max_length, (decay_min, decay_max), backend
        self.scales = nn.Parameter(torch.empty(1 + math.ceil(math.log2(max_length / kernel_dim)), dim, kernel_dim))
        self.skip = nn.Parameter(torch.empty(dim))
        self.register_buffer("norm", torch.empty(dim, 1))
        self.out = GatedLinear(dim, dim)
        self._draw()

    @torch.no_grad()
    def _draw(self) -> None:
        nn.init.normal_(self.scales)
        nn.init.normal_(self.skip)
        self.norm.copy_(self._stretch().norm(dim=-1, keepdim=True))

    def reset_parameters(self) -> None:
        super().reset_parameters()
        self._draw()

    def _stretch(self) -> Float[Tensor, "dim taps"]:
        """The filters before they are divided by their norm, of ``kernel_dim`` times a power of two of taps."""
        strength = torch.linspace(*self.decays, self.scales.shape[1], device=self.scales.device)[:, None]
        pieces = []
        for scale, weight in enumerate(self.scales.to(torch.promote_types(self.scales.dtype, torch.float32))):
            weight = weight * strength.to(weight.dtype) ** (len(self.scales) - 1 - scale)
            pieces.append(F.interpolate(weight[None], scale_factor=2.0 ** max(0, scale - 1), mode="linear")[0])
        return torch.cat(pieces, -1)

    def forward(
        self,
        x: Float[Tensor, "batch time dim"],
        state: SGConvState | None = None,
        starts: Bool[Tensor, "batch time"] | None = None,
    ) -> tuple[Float[Tensor, "batch time dim"], SGConvState]:
        kernel = self._stretch()[:, : self.max_length] / self.norm
        y, last = long_conv(x, kernel, state and state.long, starts, backend=self.backend)
        return self.out(F.gelu(y + self.skip.to(x.dtype) * x)), SGConvState(last)

    def state_bytes(self, length: int, *, dtype: torch.dtype = torch.float32) -> int:
        return (self.max_length - 1) * len(self.skip) * dtype.itemsize
