"""S5: one diagonal state space for all channels, run by a scan (Smith et al. 2022, https://arxiv.org/abs/2208.04933).

Left out: the bilinear rule, bidirectional reading, learning rates of its own, dropout, and gates on a value without a
projection ("half GLU"), which a deep stack could not scale. Decay rates are kept below zero, as the authors advise for
sequences without an end.
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
from seqzoo.parts.decay import STEP_RANGE
from seqzoo.parts.glu import GatedLinear
from seqzoo.parts.state_space import hold, legendre_eigenvalues

SLOWEST = -1e-4
TRUNCATED_STD = 0.87962566103423978  # of a standard normal distribution cut at two


class S5State(NamedTuple):
    """What a sequence leaves behind: the memory, complex64 or better."""

    memory: Complex[Tensor, "batch pair"]


class S5(Mixer):
    """Complex numbers with learned rates and steps, which all channels write and read through dense matrices.

        Lambda = min(re, -1e-4) + i im,  dt = e^log_step
        h_t = e^{Lambda dt} h_{t-1} + (e^{Lambda dt} - 1) / Lambda * (B x_t)
        y_t = glu(W gelu(2 Re(C h_t) + D x_t))

    Args:
        dim: width of the input and output.
        state_size: real numbers remembered, half as many complex ones: each stands for a pair of conjugates.
        num_blocks: rates start as those of so many equal HiPPO matrices; twice this must divide ``state_size``.
        backend: ``auto``, or an implementation that all its operators have (see ``seqzoo layers``).

    Raises:
        ValueError: ``state_size`` does not hold whole blocks of pairs.
    """

    state_formula = "state_size"
    operators = ("linear_scan",)
    no_weight_decay = frozenset({"write.weight"})

    def __init__(self, dim: int, *, state_size: int = 256, num_blocks: int = 8, backend: str = "auto") -> None:
        super().__init__(dim)
        if num_blocks < 1 or state_size < 1 or state_size % (2 * num_blocks):
            raise ValueError(
                f"state_size={state_size}, num_blocks={num_blocks}: expected a multiple of 2 * num_blocks, at least 2"
            )
        self.num_blocks, self.backend = num_blocks, backend
        pairs = state_size // 2
        self.rate_real = nn.Parameter(torch.empty(pairs))
        self.rate_imaginary = nn.Parameter(torch.empty(pairs))
        self.log_step = nn.Parameter(torch.empty(pairs))
        self.write = ComplexWrite(dim, pairs)
        self.read = ComplexRead(pairs, dim)
        self.skip = nn.Parameter(torch.empty(dim))
        self.out = GatedLinear(dim, dim)
        self._draw()

    @torch.no_grad()
    def _draw(self) -> None:
        """B and C are drawn for the HiPPO matrix itself, and then seen from its eigenvectors."""
        size = 2 * self.log_step.numel()
        eigenvalues, vectors = legendre_eigenvalues(size // self.num_blocks)
        self.rate_real.copy_(eigenvalues.real.repeat(self.num_blocks))
        self.rate_imaginary.copy_(eigenvalues.imag.repeat(self.num_blocks))
        self.log_step.uniform_(*map(math.log, STEP_RANGE))
        basis = vectors.to(torch.complex64).to(self.skip.device)
        std = size**-0.5 / TRUNCATED_STD
        drawn = self.write.weight.new_empty(size, self.write.weight.shape[2])
        blocks = nn.init.trunc_normal_(drawn, std=std, a=-2 * std, b=2 * std).unflatten(0, (self.num_blocks, -1))
        written = (basis.mH @ blocks.to(basis.dtype)).flatten(0, 1)
        self.write.weight.copy_(torch.view_as_real(written).transpose(1, 2))
        drawn = self.read.weight.new_empty(self.read.weight.shape[0], self.num_blocks, size // self.num_blocks, 2)
        blocks = torch.view_as_complex(nn.init.trunc_normal_(drawn, std=std, a=-2 * std, b=2 * std))
        self.read.weight.copy_(torch.view_as_real((blocks @ basis).flatten(1)))
        nn.init.normal_(self.skip)

    def reset_parameters(self) -> None:
        super().reset_parameters()
        self._draw()

    def forward(
        self,
        x: Float[Tensor, "batch time dim"],
        state: S5State | None = None,
        starts: Bool[Tensor, "batch time"] | None = None,
    ) -> tuple[Float[Tensor, "batch time dim"], S5State]:
        wide = torch.promote_types(self.log_step.dtype, torch.float32)
        real, imaginary, log_step = (p.to(wide) for p in (self.rate_real, self.rate_imaginary, self.log_step))
        kept, entered = hold(torch.complex(real.clamp(max=SLOWEST), imaginary), log_step.exp())
        h, memory = linear_scan(kept, entered * self.write(x), state and state.memory, starts, backend=self.backend)
        y = 2 * self.read(h)
        return self.out(F.gelu(y + self.skip.to(y.dtype) * x)), S5State(memory)

    def state_bytes(self, length: int, *, dtype: torch.dtype = torch.float32) -> int:
        return 2 * self.log_step.numel() * torch.promote_types(dtype, torch.float32).itemsize
