"""RG-LRU: a gated linear recurrence of one number a channel, in the block of Griffin and Hawk (De et al. 2024, https://arxiv.org/abs/2402.19427).

The gradient of the square root needs no clip here: it is taken of a sum that is never zero (see ``recurrence_gates``).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor, nn

from seqzoo.kernels.gated_output import gated_output
from seqzoo.kernels.linear_scan import linear_scan
from seqzoo.kernels.recurrence_gates import recurrence_gates
from seqzoo.mixer import Mixer
from seqzoo.parts.block_linear import BlockLinear
from seqzoo.parts.short_conv import CausalConv

SHARPNESS = 8.0  # c of the paper: a fully open gate decays as e^{-8 softplus(rate)}
RADIUS = (0.9, 0.999)  # where that decay starts, between its first powers
CONV_STD = 0.1  # of the sum of a filter's taps


class RGLRUState(NamedTuple):
    """What a sequence leaves behind: the memory (float32 or better), and the convolution's last inputs."""

    memory: Float[Tensor, "batch width"]
    conv: Float[Tensor, "batch size_minus_one width"]


class RGLRU(Mixer):
    """One decaying number a channel; gates say how much of it stays and how much of the input enters.

        u = conv(W_u x),  r, i = sigmoid(blocks u),  a = e^{-8 r softplus(rate)}
        h_t = a h_{t-1} + sqrt(1 - a^2) (i u),   y = W_out(h_t * gelu(W x));   a document's first h is i u

    Args:
        dim: width of the input and output.
        width: channels of the recurrence; None for ``dim``.
        num_heads: equal parts of the width whose gates do not see each other; must divide it.
        conv_size: taps of the short convolution.
        backend: ``auto``, or an implementation that all its operators have (see ``seqzoo layers``).

    Raises:
        ValueError: a size is below 1, or ``num_heads`` does not divide the width.
    """

    state_formula = "width + (conv_size-1)·width"
    operators = ("linear_scan", "short_conv")

    def __init__(
        self, dim: int, *, width: int | None = None, num_heads: int = 4, conv_size: int = 4, backend: str = "auto"
    ) -> None:
        super().__init__(dim)
        width = dim if width is None else width
        if width < 1 or num_heads < 1 or width % num_heads:
            raise ValueError(f"num_heads={num_heads} does not divide width={width}")
        self.backend = backend
        self.projection = nn.Linear(dim, 2 * width)
        self.conv = CausalConv(width, conv_size, bias=True, backend=backend)
        self.input_gate = BlockLinear(width, num_heads)
        self.decay_gate = BlockLinear(width, num_heads)
        self.input_bias = nn.Parameter(torch.empty(width))
        self.decay_bias = nn.Parameter(torch.empty(width))
        self.decay_rate = nn.Parameter(torch.empty(width))
        self.out = nn.Linear(width, dim)
        self._draw()

    @torch.no_grad()
    def _draw(self) -> None:
        for linear in (self.projection, self.out):
            nn.init.normal_(linear.weight, std=linear.in_features**-0.5)
            nn.init.zeros_(linear.bias)
        taps, bias = self.conv.parameters()
        nn.init.normal_(taps, std=CONV_STD * taps.shape[1] ** -0.5)
        for constant in (bias, self.input_bias, self.decay_bias):
            nn.init.zeros_(constant)
        low, high = (radius**2 for radius in RADIUS)
        # The inverse of softplus, of -log a where a^2 is uniform: fast and slow channels as a disc has them.
        self.decay_rate.uniform_(low, high).log_().div_(-2).expm1_().log_()

    def reset_parameters(self) -> None:
        super().reset_parameters()
        self._draw()

    def forward(
        self,
        x: Float[Tensor, "batch time dim"],
        state: RGLRUState | None = None,
        starts: Bool[Tensor, "batch time"] | None = None,
    ) -> tuple[Float[Tensor, "batch time dim"], RGLRUState]:
        u, gate = self.projection(x).chunk(2, -1)
        u, conv = self.conv(u, state and state.conv, starts)
        rate = SHARPNESS * F.softplus(self.decay_rate.to(torch.promote_types(u.dtype, torch.float32)))
        begins = starts
        if state is None:
            first = torch.arange(x.shape[1], device=x.device) == 0
            begins = first[None] if starts is None else starts | first
        decay, entering = recurrence_gates(
            u,
            self.decay_gate(u, self.input_gate),
            self.decay_bias,
            self.input_bias,
            rate,
            None if begins is None else begins.expand(x.shape[:2]),
            backend=self.backend,
        )
        h, memory = linear_scan(decay, entering, state and state.memory, starts, backend=self.backend)
        y = gated_output(h, gate, activation="gelu", backend=self.backend)
        return self.out(y), RGLRUState(memory, conv)

    def state_bytes(self, length: int, *, dtype: torch.dtype = torch.float32) -> int:
        wide = torch.promote_types(dtype, torch.float32)
        return self.decay_rate.numel() * wide.itemsize + self.conv.state_bytes(dtype)
