"""LRU: complex numbers that turn and fade, drawn on a ring (Orvieto et al. 2023, https://arxiv.org/abs/2303.06349).

DeepMind published no code; this is the paper's appendix. Left out: learning rates of its own, dropout, and the norms of
the block.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Complex, Float
from torch import Tensor, nn

from seqzoo.kernels.linear_scan import linear_scan
from seqzoo.mixer import Mixer
from seqzoo.parts.complex_maps import ComplexRead, ComplexWrite
from seqzoo.parts.glu import GatedLinear
from seqzoo.parts.settings import check_positive

RIM = 1e-6


class LRUState(NamedTuple):
    """What a sequence leaves behind: the memory, complex64 or better."""

    memory: Complex[Tensor, "batch state"]


class LRU(Mixer):
    """Complex numbers that turn and fade at learned rates, read and written by dense matrices.

        lambda = exp(-e^nu_log + i e^theta_log),  h_t = lambda h_{t-1} + e^gamma_log (B x_t)
        y_t = glu(W gelu(Re(C h_t) + D x_t))

    Args:
        dim: width of the input and output.
        state_size: complex numbers remembered; None for ``dim``.
        min_radius: |lambda| starts no smaller; at least 0. Near 1 for long memories.
        max_radius: |lambda| starts no larger; above ``min_radius``, at most 1.
        max_phase: lambda's angle starts between 0 and this, in radians.
        backend: ``auto``, or an implementation that all its operators have (see ``seqzoo layers``).

    Raises:
        ValueError: ``state_size`` is below 1, the radii are no range in [0, 1], or ``max_phase`` is not above 0.
    """

    state_formula = "2·state_size"
    operators = ("linear_scan",)
    no_weight_decay = frozenset({"write.weight"})

    def __init__(
        self,
        dim: int,
        *,
        state_size: int | None = None,
        min_radius: float = 0.0,
        max_radius: float = 1.0,
        max_phase: float = 2 * math.pi,
        backend: str = "auto",
    ) -> None:
        super().__init__(dim)
        size = dim if state_size is None else state_size
        if size < 1:
            raise ValueError(f"state_size={size}: use 1 or more")
        if not 0 <= min_radius < max_radius <= 1:
            raise ValueError(f"min_radius={min_radius}, max_radius={max_radius}: expected 0 <= min < max <= 1")
        check_positive("max_phase", max_phase)
        self.radii, self.max_phase, self.backend = (min_radius, max_radius), max_phase, backend
        self.nu_log = nn.Parameter(torch.empty(size))
        self.theta_log = nn.Parameter(torch.empty(size))
        self.gamma_log = nn.Parameter(torch.empty(size))
        self.write = ComplexWrite(dim, size)
        self.read = ComplexRead(size, dim)
        self.skip = nn.Parameter(torch.empty(dim))
        self.out = GatedLinear(dim, dim)
        self._draw()

    @torch.no_grad()
    def _draw(self) -> None:
        low, high = (radius**2 for radius in self.radii)
        # Uniform by area of the ring. Its very rims have no logarithm.
        square = self.nu_log.uniform_(low, high).clamp_(RIM, 1 - RIM)
        self.gamma_log.copy_(torch.log1p(-square) / 2)
        square.log_().div_(-2).log_()
        self.theta_log.uniform_(0, self.max_phase).clamp_(min=RIM).log_()
        nn.init.normal_(self.skip)

    def reset_parameters(self) -> None:
        super().reset_parameters()
        self._draw()

    def forward(
        self,
        x: Float[Tensor, "batch time dim"],
        state: LRUState | None = None,
        starts: Bool[Tensor, "batch time"] | None = None,
    ) -> tuple[Float[Tensor, "batch time dim"], LRUState]:
        wide = torch.promote_types(self.nu_log.dtype, torch.float32)
        nu, theta, gamma = (log.to(wide).exp() for log in (self.nu_log, self.theta_log, self.gamma_log))
        turn = torch.polar(torch.exp(-nu), theta)
        h, memory = linear_scan(turn, gamma * self.write(x), state and state.memory, starts, backend=self.backend)
        y = self.read(h)
        return self.out(F.gelu(y + self.skip.to(y.dtype) * x)), LRUState(memory)

    def state_bytes(self, length: int, *, dtype: torch.dtype = torch.float32) -> int:
        return 2 * self.nu_log.numel() * torch.promote_types(dtype, torch.float32).itemsize
