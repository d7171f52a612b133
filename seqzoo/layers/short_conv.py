"""Double-gated short convolution, the local mixer of LFM2 (Amini et al. 2025, https://arxiv.org/abs/2511.23404)."""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from seqzoo.mixer import Mixer
from seqzoo.parts.short_conv import CausalConv


class ShortConvState(NamedTuple):
    """What a sequence leaves behind: the convolution's last inputs."""

    conv: Float[Tensor, "batch size_minus_one dim"]


class ShortConv(Mixer):
    """A few neighbouring tokens, mixed channel by channel between two gates: ``out(c * conv(b * u))``, [b, c, u] = W x.

    Args:
        dim: width of the input and output.
        conv_size: taps of the convolution, the current token included.
        backend: ``auto``, or an implementation that all its operators have (see ``seqzoo layers``).

    Raises:
        ValueError: ``conv_size`` is below 1.
    """

    state_formula = "(conv_size-1)·dim"
    operators = ("short_conv",)

    def __init__(self, dim: int, *, conv_size: int = 3, backend: str = "auto") -> None:
        super().__init__(dim)
        self.projection = nn.Linear(dim, 3 * dim, bias=False)
        self.conv = CausalConv(dim, conv_size, backend=backend)
        self.out = nn.Linear(dim, dim, bias=False)

    def forward(
        self,
        x: Float[Tensor, "batch time dim"],
        state: ShortConvState | None = None,
        starts: Bool[Tensor, "batch time"] | None = None,
    ) -> tuple[Float[Tensor, "batch time dim"], ShortConvState]:
        b, c, u = self.projection(x).chunk(3, -1)
        y, conv = self.conv(b * u, state and state.conv, starts)
        return self.out(c * y), ShortConvState(conv)

    def state_bytes(self, length: int, *, dtype: torch.dtype = torch.float32) -> int:
        return self.conv.state_bytes(dtype)
