"""GLA: linear attention whose memory decays row by row, as the input says (Yang et al. 2023, https://arxiv.org/abs/2312.06635).

The layer is that of fla and its checkpoints: the norm of heads is an RMS norm with a scale, where the paper has a
LayerNorm without, and the gate has no bias. Left out: fla's short convolution, which the paper does not use.
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
from seqzoo.parts.glorot import draw_shrunk
from seqzoo.parts.heads import head_size
from seqzoo.parts.norm import GroupRMSNorm
from seqzoo.parts.settings import check_positive


class GatedLinearAttentionState(NamedTuple):
    """What a sequence leaves behind: the memory, float32 or better."""

    memory: Float[Tensor, "batch head key value"]


class GatedLinearAttention(Mixer):
    """Linear-time memory of which each row forgets as fast as the input says.

        q, k, v = W x,  a = sigmoid(W_2 W_1 x + b)^(1 / temperature), a number for each row of each head's memory
        S_t = diag(a) S_{t-1} + k v^T,   y = W_out(rmsnorm(S_t^T q / sqrt(key)) * silu(W x)), with a norm for each head

    Args:
        dim: width of the input and output.
        num_heads: memories kept side by side; each is ``key_dim`` by ``value_dim``.
        key_dim: size of a key; None for half of ``dim / num_heads``.
        value_dim: size of a value; None for ``dim / num_heads``.
        decay_rank: inner width of the two matrices that make the decays.
        decay_temperature: the root taken of the decays, above 0: the larger, the longer the memory.
        norm_eps: added to the mean square in the norm.
        backend: ``auto``, or an implementation that all its operators have (see ``seqzoo layers``).

    Raises:
        ValueError: a size is below 1, ``dim`` is too small for ``num_heads``, or ``decay_temperature`` is not above 0.
    """

    state_formula = "heads·key_dim·value_dim"
    operators = ("gated_linear_attention",)

    def __init__(
        self,
        dim: int,
        *,
        num_heads: int = 4,
        key_dim: int | None = None,
        value_dim: int | None = None,
        decay_rank: int = 16,
        decay_temperature: float = 16.0,
        norm_eps: float = 1e-6,
        backend: str = "auto",
    ) -> None:
        super().__init__(dim)
        key = head_size("key_dim", key_dim, dim=dim, num_heads=num_heads, share=0.5)
        value = head_size("value_dim", value_dim, dim=dim, num_heads=num_heads)
        if decay_rank < 1:
            raise ValueError(f"decay_rank={decay_rank}: use 1 or more")
        check_positive("decay_temperature", decay_temperature)
        self.num_heads, self.key_dim, self.value_dim, self.backend = num_heads, key, value, backend
        self.temperature = decay_temperature
        self.widths = [num_heads * key] * 2 + [num_heads * value] * 2
        self.projection = nn.Linear(dim, sum(self.widths), bias=False)
        self.decay = nn.Sequential(nn.Linear(dim, decay_rank, bias=False), nn.Linear(decay_rank, num_heads * key))
        self.norm = GroupRMSNorm(value, eps=norm_eps, backend=backend)
        self.out = nn.Linear(num_heads * value, dim, bias=False)
        self._draw()

    @torch.no_grad()
    def _draw(self) -> None:
        queries, keys, *_ = self.projection.weight.split(self.widths)
        draw_shrunk(queries, keys, *(p for p in self.decay.parameters() if p.ndim > 1))

    def reset_parameters(self) -> None:
        super().reset_parameters()
        self._draw()

    def forward(
        self,
        x: Float[Tensor, "batch time dim"],
        state: GatedLinearAttentionState | None = None,
        starts: Bool[Tensor, "batch time"] | None = None,
    ) -> tuple[Float[Tensor, "batch time dim"], GatedLinearAttentionState]:
        q, k, v, gate = self.projection(x).split(self.widths, -1)
        decay = self.decay(x)
        log_decay = F.logsigmoid(decay.to(torch.promote_types(decay.dtype, torch.float32))) / self.temperature
        q, k, v, log_decay = (rearrange(z, "b t (h d) -> b t h d", h=self.num_heads) for z in (q, k, v, log_decay))
        q = q * self.key_dim**-0.5
        y, memory = gated_linear_attention(q, k, v, log_decay, state and state.memory, starts, backend=self.backend)
        y = self.norm(rearrange(y, "b t h d -> b t (h d)"), gate)
        return self.out(y), GatedLinearAttentionState(memory)

    def state_bytes(self, length: int, *, dtype: torch.dtype = torch.float32) -> int:
        return self.num_heads * self.key_dim * self.value_dim * torch.promote_types(dtype, torch.float32).itemsize
