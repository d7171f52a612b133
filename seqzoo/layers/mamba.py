"""Mamba: a state-space model whose steps, writes and reads depend on the input (Gu & Dao 2023, https://arxiv.org/abs/2312.00752).

With ``parameter_norm`` also the mixers of Falcon-Mamba (https://arxiv.org/abs/2410.05355) and Jamba
(https://arxiv.org/abs/2403.19887). Left out: biases of the projections in and out.
"""

from __future__ import annotations

from typing import Literal, NamedTuple, get_args

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from seqzoo.kernels.selective_scan import selective_scan
from seqzoo.mixer import Mixer
from seqzoo.parts.decay import draw_step_bias
from seqzoo.parts.norm import GroupRMSNorm
from seqzoo.parts.settings import check_positive
from seqzoo.parts.short_conv import CausalConv

ParameterNorm = Literal["none", "fixed", "learned"]


class MambaState(NamedTuple):
    """What a sequence leaves behind: the state-space memory (float32 or better), and the convolution's last inputs."""

    memory: Float[Tensor, "batch channel state"]
    conv: Float[Tensor, "batch size_minus_one channel"]


class Mamba(Mixer):
    """Linear-time memory of a few numbers a channel, each with a rate of its own; the input sets how long a step is.

        [u, z] = W x,  u = silu(conv(u)),  [r, B, C] = W_u u,  dt = softplus(W_r r + dt_bias),  A = -exp(A_log)
        S_t = e^{dt A} * S_{t-1} + (dt u) B^T,   y = W_out((S_t C + D u) * silu(z))

    Args:
        dim: width of the input and output.
        state_size: numbers remembered for each channel, the size of B and C.
        expand: inner width as a multiple of ``dim``.
        step_rank: size of r, from which all steps are made; None for ``dim / 16`` rounded up.
        conv_size: taps of the short convolution.
        parameter_norm: what is done to r, B and C: ``none``; an RMS norm without (``fixed``, Falcon-Mamba) or with
            (``learned``, Jamba) a scale for each of their numbers.
        norm_eps: added to the mean square in these norms.
        backend: ``auto``, or an implementation that all its operators have (see ``seqzoo layers``).

    Raises:
        ValueError: a size is below 1, or ``parameter_norm`` is not one of the three.
    """

    state_formula = "expand·dim·state_size + (conv_size-1)·expand·dim"
    operators = ("selective_scan", "short_conv")
    no_weight_decay = frozenset({"A_log"})

    def __init__(
        self,
        dim: int,
        *,
        state_size: int = 16,
        expand: int = 2,
        step_rank: int | None = None,
        conv_size: int = 4,
        parameter_norm: ParameterNorm = "none",
        norm_eps: float = 1e-6,
        backend: str = "auto",
    ) -> None:
        super().__init__(dim)
        step_rank = -(-dim // 16) if step_rank is None else step_rank
        for name, size in {"state_size": state_size, "expand": expand, "step_rank": step_rank}.items():
            if size < 1:
                raise ValueError(f"{name}={size}: use 1 or more")
        if parameter_norm not in get_args(ParameterNorm):
            raise ValueError(f"parameter_norm={parameter_norm!r}: use 'none', 'fixed' or 'learned'")
        check_positive("norm_eps", norm_eps)
        inner = expand * dim
        self.backend = backend
        self.sizes = [step_rank, state_size, state_size]
        self.projection = nn.Linear(dim, 2 * inner, bias=False)
        self.conv = CausalConv(inner, conv_size, bias=True, activation="silu", backend=backend)
        self.step_write_read = nn.Linear(inner, sum(self.sizes), bias=False)
        normed = [] if parameter_norm == "none" else self.sizes
        learned = parameter_norm == "learned"
        self.norms = nn.ModuleList(
            GroupRMSNorm(size, eps=norm_eps, learned=learned, backend=backend) for size in normed
        )
        self.step = nn.Linear(step_rank, inner, bias=False)
        self.dt_bias = nn.Parameter(torch.empty(inner))
        self.A_log = nn.Parameter(torch.empty(inner, state_size))
        self.skip = nn.Parameter(torch.empty(inner))
        self.out = nn.Linear(inner, dim, bias=False)
        self._draw()

    @torch.no_grad()
    def _draw(self) -> None:
        rank, size = self.sizes[:2]
        nn.init.uniform_(self.step.weight, -(rank**-0.5), rank**-0.5)
        draw_step_bias(self.dt_bias)
        self.A_log.copy_(torch.arange(1, size + 1, device=self.A_log.device).log().expand_as(self.A_log))
        nn.init.ones_(self.skip)

    def reset_parameters(self) -> None:
        super().reset_parameters()
        self._draw()

    def forward(
        self,
        x: Float[Tensor, "batch time dim"],
        state: MambaState | None = None,
        starts: Bool[Tensor, "batch time"] | None = None,
    ) -> tuple[Float[Tensor, "batch time dim"], MambaState]:
        u, gate = self.projection(x).chunk(2, -1)
        u, conv = self.conv(u, state and state.conv, starts)
        parts = self.step_write_read(u).split(self.sizes, -1)
        if self.norms:
            parts = [norm(part) for norm, part in zip(self.norms, parts, strict=True)]
        step, write, read = parts
        rates = -self.A_log.to(torch.promote_types(self.A_log.dtype, torch.float32)).exp()
        y, memory = selective_scan(
            u,
            self.step(step),
            rates,
            write,
            read,
            self.skip,
            gate,
            self.dt_bias,
            state and state.memory,
            starts,
            backend=self.backend,
        )
        return self.out(y), MambaState(memory, conv)

    def state_bytes(self, length: int, *, dtype: torch.dtype = torch.float32) -> int:
        wide = torch.promote_types(dtype, torch.float32)
        return self.A_log.numel() * wide.itemsize + self.conv.state_bytes(dtype)
