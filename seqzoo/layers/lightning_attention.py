"""Lightning Attention: linear attention with a fixed decay a head, weaker in deeper layers (Qin et al. 2024, https://arxiv.org/abs/2401.04658).

The layer is that of MiniMax-Text-01 and M1 (https://arxiv.org/abs/2501.08313). Those keep the memory in the dtype of
activations, where it drifts; here it is float32 or better. Their blocks normalise after each sublayer, and weigh it
against the residual: that is a property of a stack, not of this layer.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Bool, Float
from torch import Tensor, nn

from seqzoo.kernels.gated_linear_attention import gated_linear_attention
from seqzoo.mixer import Mixer
from seqzoo.parts.depth import check_depth
from seqzoo.parts.heads import head_size
from seqzoo.parts.norm import GroupRMSNorm

LEAST = 1e-5  # of a slope: the last layer forgets a little too


class LightningAttentionState(NamedTuple):
    """What a sequence leaves behind: the memory, float32 or better."""

    memory: Float[Tensor, "batch head key value"]


class LightningAttention(Mixer):
    """Linear-time memory of which every head forgets a fixed share a token, deeper layers less.

        q, k, v = silu(W x),  s_h = 2^(-8h/num_heads) (1 - layer_index/(num_layers - 1) + 1e-5)  for h = 1 ... num_heads
        S_t = e^{-s} S_{t-1} + k v^T,   y = W_out(sigmoid(W x) * rmsnorm(S_t^T q)), with one norm over all heads

    Args:
        dim: width of the input and output.
        num_heads: memories kept side by side, each ``head_dim`` squared.
        head_dim: size of a key and of a value; None for ``dim / num_heads``.
        layer_index: which layer of the stack this is, from 0 on: the first forgets most.
        num_layers: layers of the stack; with 1, the decays are those of a first layer.
        norm_eps: added to the mean square in the norm.
        backend: ``auto``, or an implementation that all its operators have (see ``seqzoo layers``).

    Raises:
        ValueError: a size is below 1, ``dim`` is too small for ``num_heads``, or the stack has no such layer.
    """

    state_formula = "heads·head_dim²"
    operators = ("gated_linear_attention",)

    def __init__(
        self,
        dim: int,
        *,
        num_heads: int = 4,
        head_dim: int | None = None,
        layer_index: int = 0,
        num_layers: int = 1,
        norm_eps: float = 1e-6,
        backend: str = "auto",
    ) -> None:
        super().__init__(dim)
        head_dim = head_size("head_dim", head_dim, dim=dim, num_heads=num_heads)
        check_depth(layer_index, num_layers)
        self.num_heads, self.head_dim, self.backend = num_heads, head_dim, backend
        self.strength = 1 - layer_index / (num_layers - 1 + LEAST) + LEAST
        width = num_heads * head_dim
        self.projection = nn.Linear(dim, 3 * width, bias=False)
        self.gate = nn.Linear(dim, width, bias=False)
        self.norm = GroupRMSNorm(width, eps=norm_eps, activation="sigmoid", backend=backend)
        self.out = nn.Linear(width, dim, bias=False)

    def forward(
        self,
        x: Float[Tensor, "batch time dim"],
        state: LightningAttentionState | None = None,
        starts: Bool[Tensor, "batch time"] | None = None,
    ) -> tuple[Float[Tensor, "batch time dim"], LightningAttentionState]:
        q, k, v = rearrange(F.silu(self.projection(x)), "b t (three h d) -> three b t h d", three=3, h=self.num_heads)
        head = torch.arange(1, self.num_heads + 1, device=x.device, dtype=torch.promote_types(q.dtype, torch.float32))
        log_decay = (-self.strength * 2.0 ** (-8 * head / self.num_heads)).expand(*x.shape[:2], -1)
        y, memory = gated_linear_attention(q, k, v, log_decay, state and state.memory, starts, backend=self.backend)
        y = self.norm(rearrange(y, "b t h d -> b t (h d)"), self.gate(x))
        return self.out(y), LightningAttentionState(memory)

    def state_bytes(self, length: int, *, dtype: torch.dtype = torch.float32) -> int:
        return self.num_heads * self.head_dim**2 * torch.promote_types(dtype, torch.float32).itemsize
