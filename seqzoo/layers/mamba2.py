"""Mamba-2: a state-space model with one scalar decay a head, run as masked matmuls (Dao & Gu 2024, https://arxiv.org/abs/2405.21060).

The official code clamps steps to their limits over prompts only, and not where it decodes; here they are the same
everywhere. Left out: an MLP inside the layer (``d_ssm``).
"""

from __future__ import annotations

import math
from typing import Literal, NamedTuple, get_args

import torch
from einops import rearrange
from jaxtyping import Bool, Float
from torch import Tensor, nn

from seqzoo.kernels.gated_linear_attention import gated_linear_attention
from seqzoo.kernels.gated_output import gated_output
from seqzoo.mixer import Mixer
from seqzoo.parts.decay import SoftplusDecay
from seqzoo.parts.heads import grouped_heads
from seqzoo.parts.norm import GroupRMSNorm
from seqzoo.parts.settings import check_positive
from seqzoo.parts.short_conv import SplitCausalConv

Norm = Literal["after_gate", "before_gate", "none"]


class Mamba2State(NamedTuple):
    """What a sequence leaves behind: the state-space memory (float32 or better), and the convolution's last inputs."""

    memory: Float[Tensor, "batch head state channel"]
    conv: Float[Tensor, "batch size_minus_one channel"]


class Mamba2(Mixer):
    """Linear-time memory that adds each input to a decaying state; how fast it decays depends on the input.

        [z, x, B, C, dt] = W u,  [x, B, C] = silu(conv([x, B, C])),  dt = softplus(dt + dt_bias),  A = -exp(A_log)
        S_t = e^{A dt} S_{t-1} + B (dt x)^T,   y = W_out(rmsnorm((S_t^T C + D x) * silu(z)))

    Args:
        dim: width of the input and output.
        state_size: rows of each head's memory, the size of B and C.
        head_dim: channels of a head; must divide ``expand * dim``.
        expand: inner width as a multiple of ``dim``.
        num_groups: B and C are shared by the heads of a group; must divide the number of heads.
        conv_size: taps of the short convolution.
        norm: ``after_gate`` as above; ``before_gate`` for rmsnorm(S^T C + D x) * silu(z); ``none`` for no norm.
        norm_eps: added to the mean square in the norm, which is taken over the channels of each group.
        skip_per_channel: whether D is a number for each channel, not for each head.
        step_limit: dt is clamped to this range.
        backend: ``auto``, or an implementation that all its operators have (see ``seqzoo layers``).

    Raises:
        ValueError: sizes do not fit together, ``norm`` is not one of the three, or ``step_limit`` is no range.
    """

    state_formula = "heads·state_size·head_dim + (conv_size-1)·(heads·head_dim+2·groups·state_size)"
    operators = ("gated_linear_attention", "short_conv")

    def __init__(
        self,
        dim: int,
        *,
        state_size: int = 128,
        head_dim: int = 64,
        expand: int = 2,
        num_groups: int = 1,
        conv_size: int = 4,
        norm: Norm = "after_gate",
        norm_eps: float = 1e-5,
        skip_per_channel: bool = False,
        step_limit: tuple[float, float] = (0.0, math.inf),
        backend: str = "auto",
    ) -> None:
        super().__init__(dim)
        inner = expand * dim
        num_heads = grouped_heads(dim, expand=expand, head_dim=head_dim, num_groups=num_groups)
        if state_size < 1:
            raise ValueError(f"state_size={state_size}: a memory needs at least 1 row")
        check_positive("norm_eps", norm_eps)
        if norm not in get_args(Norm):
            raise ValueError(f"norm={norm!r}: use 'after_gate', 'before_gate' or 'none'")
        self.num_heads, self.head_dim, self.num_groups, self.rows = num_heads, head_dim, num_groups, state_size
        self.backend = backend
        self.widths = [inner, num_groups * state_size, num_groups * state_size]
        self.projection = nn.Linear(dim, inner + sum(self.widths) + num_heads, bias=False)
        self.conv = SplitCausalConv(self.widths, conv_size, bias=True, activation="silu", backend=backend)
        self.decay = SoftplusDecay(num_heads, rate_range=(1.0, 16.0), step_limit=step_limit)
        self.skip = nn.Parameter(torch.empty(inner if skip_per_channel else num_heads))
        self.norm = None
        if norm != "none":
            first = norm == "after_gate"
            self.norm = GroupRMSNorm(inner, groups=num_groups, eps=norm_eps, gate_first=first, backend=backend)
        self.out = nn.Linear(inner, dim, bias=False)
        nn.init.ones_(self.skip)

    def reset_parameters(self) -> None:
        super().reset_parameters()
        nn.init.ones_(self.skip)

    def forward(
        self,
        x: Float[Tensor, "batch time dim"],
        state: Mamba2State | None = None,
        starts: Bool[Tensor, "batch time"] | None = None,
    ) -> tuple[Float[Tensor, "batch time dim"], Mamba2State]:
        z, xbc, step = self.projection(x).split([self.widths[0], sum(self.widths), self.num_heads], -1)
        (u, b, c), conv = self.conv(xbc, state and state.conv, starts)
        u = rearrange(u, "b t (h p) -> b t h p", h=self.num_heads)
        b, c = (rearrange(w, "b t (g n) -> b t g n", g=self.num_groups) for w in (b, c))
        step, log_decay = self.decay(step)
        per_head = len(self.skip) == self.num_heads
        y, memory = gated_linear_attention(
            c,
            b,
            u,
            log_decay,
            state and state.memory,
            starts,
            write=step,
            skip=self.skip if per_head else None,
            backend=self.backend,
        )
        if not per_head:
            y = y + self.skip.view(self.num_heads, -1).to(u.dtype) * u
        y = rearrange(y, "b t h p -> b t (h p)")
        y = gated_output(y, z, activation="silu", backend=self.backend) if self.norm is None else self.norm(y, z)
        return self.out(y), Mamba2State(memory, conv)

    def state_bytes(self, length: int, *, dtype: torch.dtype = torch.float32) -> int:
        wide = torch.promote_types(dtype, torch.float32)
        return self.num_heads * self.rows * self.head_dim * wide.itemsize + self.conv.state_bytes(dtype)
