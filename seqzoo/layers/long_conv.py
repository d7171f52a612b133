"""LongConv: a convolution as long as the sequence, its taps learned and squashed to zero (Fu et al. 2023, https://arxiv.org/abs/2302.06646).

Squashing starts at 0.003, as the authors' configs have it; at their code's default of 0.1 every tap and every gradient
would be zero. Left out: bidirectional filters, smoothing, dropout.
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


class LongConvState(NamedTuple):
    """What a sequence leaves behind: its last inputs."""

    long: Float[Tensor, "batch max_length_minus_one dim"]


class LongConv(Mixer):
    """A filter for each channel, as long as memory reaches, and a gate: ``y = glu(W gelu(k * x + D x))``.

        k = sign(w) relu(|w| - squash)

    Args:
        dim: width of the input and output.
        max_length: taps of a filter, at least 1: how far a token sees.
        squash: what is taken off the size of every learned tap, at least 0.
        backend: ``auto``, or an implementation that all its operators have (see ``seqzoo layers``).

    Raises:
        ValueError: a setting is out of its range.
    """

    state_formula = "(max_length-1)·dim"
    operators = ("long_conv",)
    no_weight_decay = frozenset({"kernel"})

    def __init__(self, dim: int, *, max_length: int = 1024, squash: float = 0.003, backend: str = "auto") -> None:
        super().__init__(dim)
        if max_length < 1:
            raise ValueError(f"max_length={max_length}: a filter needs at least 1 tap")
        if not 0 <= squash < math.inf:
            raise ValueError(f"squash={squash}: use a finite number of at least 0")
        self.squash, self.backend = squash, backend
        self.kernel = nn.Parameter(torch.empty(dim, max_length))
        self.skip = nn.Parameter(torch.empty(dim))
        self.out = GatedLinear(dim, dim)
        self._draw()

    @torch.no_grad()
    def _draw(self) -> None:
        """Taps that fade out, later channels sooner: ``0.02 exp(-(t / length) (dim / 2)^(channel / dim))``."""
        dim, length = self.kernel.shape
        place = torch.arange(length, device=self.kernel.device) / length
        speed = max(dim // 2, 1) ** (torch.arange(dim, device=self.kernel.device) / dim)
        self.kernel.normal_(std=0.02).mul_(torch.exp(-place * speed[:, None]))
        nn.init.normal_(self.skip)

    def reset_parameters(self) -> None:
        super().reset_parameters()
        self._draw()

    def forward(
        self,
        x: Float[Tensor, "batch time dim"],
        state: LongConvState | None = None,
        starts: Bool[Tensor, "batch time"] | None = None,
    ) -> tuple[Float[Tensor, "batch time dim"], LongConvState]:
        kernel = F.softshrink(self.kernel, self.squash)
        y, last = long_conv(x, kernel, state and state.long, starts, backend=self.backend)
        return self.out(F.gelu(y + self.skip.to(x.dtype) * x)), LongConvState(last)

    def state_bytes(self, length: int, *, dtype: torch.dtype = torch.float32) -> int:
        return (self.kernel.shape[1] - 1) * self.kernel.shape[0] * dtype.itemsize
