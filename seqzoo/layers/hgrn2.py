"""HGRN2: a gated recurrence widened by outer products, with keys made of its gates (Qin et al. 2024, https://arxiv.org/abs/2404.07904).

The layer is that of fla and its checkpoints. Left out: learning the lower bounds of the gates, a cumulated softmax over
all layers of a stack, which no layer can see; here the bound is a number.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Bool, Float
from torch import Tensor, nn

from seqzoo.kernels.gated_linear_attention import gated_linear_attention
from seqzoo.mixer import Mixer
from seqzoo.parts.norm import GroupRMSNorm

HEAD_DIM = 128


class HGRN2State(NamedTuple):
    """What a sequence leaves behind: the memory, float32 or better."""

    memory: Float[Tensor, "batch head key value"]


class HGRN2(Mixer):
    """Linear-time memory that forgets in each row as much as it writes there.

        f = lower_bound + (1 - lower_bound) sigmoid(W x),  q = silu(W x),  v = W x
        S_t = diag(f) S_{t-1} + (1 - f) v^T,   y = W_out rmsnorm(S_t^T q / sqrt(head_dim)), with one norm over all heads

    Args:
        dim: width of the input and output.
        head_dim: rows and columns of a head's memory; must divide ``dim``, None for 128 or ``dim`` if that is less.
        lower_bound: the least that a gate keeps, in [0, 1). The official model learns it, from ``l / layers`` on
            in layer l = 0, 1 ...
        norm_eps: added to the mean square in the norm.
        backend: ``auto``, or an implementation that all its operators have (see ``seqzoo layers``).

    Raises:
        ValueError: ``head_dim`` does not divide ``dim``, or ``lower_bound`` is out of its range.
    """

    state_formula = "dim·head_dim"
    operators = ("gated_linear_attention",)

    def __init__(
        self,
        dim: int,
        *,
        head_dim: int | None = None,
        lower_bound: float = 0.0,
        norm_eps: float = 1e-6,
        backend: str = "auto",
    ) -> None:
        super().__init__(dim)
        head_dim = min(HEAD_DIM, dim) if head_dim is None else head_dim
        if head_dim < 1 or dim % head_dim:
            raise ValueError(f"head_dim={head_dim} does not divide dim={dim}")
        if not 0 <= lower_bound < 1:
            raise ValueError(f"lower_bound={lower_bound}: expected 0 or more, and less than 1")
        self.dim, self.head_dim, self.lower_bound, self.backend = dim, head_dim, lower_bound, backend
        self.projection = nn.Linear(dim, 3 * dim, bias=False)
        self.norm = GroupRMSNorm(dim, eps=norm_eps, backend=backend)
        self.out = nn.Linear(dim, dim, bias=False)

    def forward(
        self,
        x: Float[Tensor, "batch time dim"],
        state: HGRN2State | None = None,
        starts: Bool[Tensor, "batch time"] | None = None,
    ) -> tuple[Float[Tensor, "batch time dim"], HGRN2State]:
        q, forget, v = rearrange(self.projection(x), "b t (three h d) -> three b t h d", three=3, d=self.head_dim)
        log_decay = F.logsigmoid(forget.to(torch.promote_types(forget.dtype, torch.float32)))
        if self.lower_bound > 0:
            lowest = torch.full_like(log_decay, math.log(self.lower_bound))
            log_decay = torch.logaddexp(lowest, log_decay + math.log1p(-self.lower_bound))
        # 1 - f from the gate's logits: the difference would lose what little a gate close to 1 writes.
        k = (1 - self.lower_bound) * torch.sigmoid(-forget)
        q = F.silu(q) * self.head_dim**-0.5
        y, memory = gated_linear_attention(q, k, v, log_decay, state and state.memory, starts, backend=self.backend)
        return self.out(self.norm(rearrange(y, "b t h d -> b t (h d)"))), HGRN2State(memory)

    def state_bytes(self, length: int, *, dtype: torch.dtype = torch.float32) -> int:
        return self.dim * self.head_dim * torch.promote_types(dtype, torch.float32).itemsize
