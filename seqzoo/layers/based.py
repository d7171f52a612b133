"""Based: linear attention by the exponential's Taylor series, of the second order (Arora et al. 2024, https://arxiv.org/abs/2402.18668).

The linear attention alone: in the paper's models, windows of softmax attention and short convolutions stand beside it.
Of the 1 + f + f^2 official features those that are there twice are kept once: the same product, half of the state.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Bool, Float
from torch import Tensor, nn

from seqzoo.kernels.gated_linear_attention import gated_linear_attention
from seqzoo.kernels.taylor_features import taylor_features, taylor_size
from seqzoo.mixer import Mixer


class BasedState(NamedTuple):
    """What a sequence leaves behind: sums of features times values, and of features (the last column)."""

    memory: Float[Tensor, "batch head feature value_plus_one"]


class Based(Mixer):
    """Softmax attention's weights to the second order, in a state of constant size that never forgets.

        y_t = W_out(sum_s w_ts v_s / sum_s w_ts),   w = 1 + z + z^2 / 2,   z_ts = q_t . k_s / sqrt(feature_dim)

    Args:
        dim: width of the input and output.
        num_heads: memories kept side by side; must divide ``dim``.
        feature_dim: size of a query and key, f; the state has 1 + f + f (f + 1) / 2 rows.
        backend: ``auto``, or an implementation that all its operators have (see ``seqzoo layers``).

    Raises:
        ValueError: sizes do not fit together.
    """

    state_formula = "heads·(1+feature_dim+feature_dim·(feature_dim+1)/2)·(dim/heads+1)"
    operators = ("gated_linear_attention",)

    def __init__(self, dim: int, *, num_heads: int = 4, feature_dim: int = 16, backend: str = "auto") -> None:
        super().__init__(dim)
        if num_heads < 1 or dim % num_heads:
            raise ValueError(f"num_heads={num_heads} does not divide dim={dim}")
        if feature_dim < 1:
            raise ValueError(f"feature_dim={feature_dim}: a key needs at least 1 number")
        self.num_heads, self.feature_dim, self.value_dim = num_heads, feature_dim, dim // num_heads
        self.backend = backend
        self.widths = [num_heads * feature_dim, num_heads * feature_dim, dim]
        self.projection = nn.Linear(dim, sum(self.widths), bias=False)
        self.out = nn.Linear(dim, dim, bias=False)

    def forward(
        self,
        x: Float[Tensor, "batch time dim"],
        state: BasedState | None = None,
        starts: Bool[Tensor, "batch time"] | None = None,
    ) -> tuple[Float[Tensor, "batch time dim"], BasedState]:
        qkv = self.projection(x).split(self.widths, -1)
        q, k, v = (rearrange(z, "b t (h d) -> b t h d", h=self.num_heads) for z in qkv)
        v = F.pad(v, (0, 1), value=1.0)
        q, k = (taylor_features(z, backend=self.backend) for z in (q, k))
        y, memory = gated_linear_attention(q, k, v, None, state and state.memory, starts, backend=self.backend)
        # Every weight is at least a half, and so is their sum; rounding may say less where scores are large.
        y = y[..., :-1] / y[..., -1:].clamp(min=0.5)
        return self.out(rearrange(y, "b t h d -> b t (h d)")), BasedState(memory)

    def state_bytes(self, length: int, *, dtype: torch.dtype = torch.float32) -> int:
        wide = torch.promote_types(dtype, torch.float32)
        return self.num_heads * taylor_size(self.feature_dim) * (self.value_dim + 1) * wide.itemsize
