"""S4D: a diagonal state space for each channel, the simplest of the S4 layers (Gu et al. 2022, https://arxiv.org/abs/2206.11893).

As in the authors' minimal code B is one, since C can make up for it. Left out: the bilinear rule, learning rates of its
own, dropout, and several state spaces a channel.
"""

from __future__ import annotations

import math
from typing import Literal, NamedTuple, get_args

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Complex, Float
from torch import Tensor, nn

from seqzoo.kernels.diagonal_state_space import diagonal_state_space
from seqzoo.mixer import Mixer
from seqzoo.parts.decay import STEP_RANGE
from seqzoo.parts.glu import GatedLinear
from seqzoo.parts.state_space import hold, legendre_eigenvalues

Frequencies = Literal["linear", "inverse", "legendre"]


class S4DState(NamedTuple):
    """What a sequence leaves behind: the memory, complex64 or better."""

    memory: Complex[Tensor, "batch dim pair"]


class S4D(Mixer):
    """Complex numbers for each channel, turning and fading at learned rates that the input does not change.

        A = -e^decay_log + i frequency,  dt = e^log_step
        h_t = e^{A dt} h_{t-1} + (e^{A dt} - 1) / A * x_t,   y_t = glu(W gelu(2 Re(sum of C h_t) + D x_t))

    Args:
        dim: width of the input and output.
        state_size: real numbers remembered for each channel, half as many complex ones; even.
        frequencies: where they start, n = 0, 1, ... and N the state's size: ``linear`` for pi n, ``inverse`` for
            N / pi (N / (2n + 1) - 1), ``legendre`` for those of HiPPO-LegS, which S4 starts from.
        backend: ``auto``, or an implementation that all its operators have (see ``seqzoo layers``).

    Raises:
        ValueError: ``state_size`` is odd or below 2, or ``frequencies`` is not one of the three.
    """

    state_formula = "dim·state_size"
    operators = ("diagonal_state_space",)
    no_weight_decay = frozenset({"decay_log", "frequency"})

    def __init__(
        self, dim: int, *, state_size: int = 64, frequencies: Frequencies = "linear", backend: str = "auto"
    ) -> None:
        super().__init__(dim)
        if state_size < 2 or state_size % 2:
            raise ValueError(f"state_size={state_size}: expected an even number of at least 2")
        if frequencies not in get_args(Frequencies):
            raise ValueError(f"frequencies={frequencies!r}: use 'linear', 'inverse' or 'legendre'")
        self.frequencies, self.backend = frequencies, backend
        pairs = state_size // 2
        self.log_step = nn.Parameter(torch.empty(dim))
        self.decay_log = nn.Parameter(torch.empty(dim, pairs))
        self.frequency = nn.Parameter(torch.empty(dim, pairs))
        self.read = nn.Parameter(torch.empty(dim, pairs, 2))
        self.skip = nn.Parameter(torch.empty(dim))
        self.out = GatedLinear(dim, dim)
        self._draw()

    @torch.no_grad()
    def _draw(self) -> None:
        self.log_step.uniform_(*map(math.log, STEP_RANGE))
        nn.init.constant_(self.decay_log, math.log(0.5))
        size = 2 * self.frequency.shape[1]
        n = torch.arange(size // 2, dtype=torch.float64, device="cpu")
        starts = {
            "linear": lambda: torch.pi * n,
            "inverse": lambda: size / torch.pi * (size / (2 * n + 1) - 1),
            "legendre": lambda: legendre_eigenvalues(size)[0].imag,
        }
        self.frequency.copy_(starts[self.frequencies]().expand_as(self.frequency))
        nn.init.normal_(self.read, std=0.5**0.5)
        nn.init.normal_(self.skip)

    def reset_parameters(self) -> None:
        super().reset_parameters()
        self._draw()

    def forward(
        self,
        x: Float[Tensor, "batch time dim"],
        state: S4DState | None = None,
        starts: Bool[Tensor, "batch time"] | None = None,
    ) -> tuple[Float[Tensor, "batch time dim"], S4DState]:
        wide = torch.promote_types(self.log_step.dtype, torch.float32)
        decay_log, frequency, log_step = (p.to(wide) for p in (self.decay_log, self.frequency, self.log_step))
        rate, step = torch.complex(-decay_log.exp(), frequency), log_step.exp()[:, None]
        _, entered = hold(rate, step.expand_as(frequency))
        read = 2 * torch.view_as_complex(self.read.to(wide))
        y, memory = diagonal_state_space(
            x, rate * step, entered, read, state and state.memory, starts, backend=self.backend
        )
        return self.out(F.gelu(y + self.skip.to(y.dtype) * x)), S4DState(memory)

    def state_bytes(self, length: int, *, dtype: torch.dtype = torch.float32) -> int:
        return self.read.numel() * torch.promote_types(dtype, torch.float32).itemsize
