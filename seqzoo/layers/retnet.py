"""RetNet: retention, a memory of key-value pairs that every head fades at a speed of its own (Sun et al. 2023, https://arxiv.org/abs/2307.08621).

Left out: the divisors that the official code puts before the norm of heads, another one in each of its modes. The norm
undoes them.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from einops import rearrange
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from seqzoo.kernels.gated_linear_attention import gated_linear_attention
from seqzoo.mixer import Mixer, positions_from_starts
from seqzoo.parts.glorot import draw_shrunk
from seqzoo.parts.heads import head_size
from seqzoo.parts.norm import GroupRMSNorm
from seqzoo.parts.rotary import rotate_neighbours

ROTARY_BASE = 10_000.0
OUT_GAIN = 2**-1  # of Glorot's initialisation


class RetNetState(NamedTuple):
    """What a sequence leaves behind: the memory (float32 or better), and how many tokens its document has."""

    memory: Float[Tensor, "batch head key value"]
    position: Int[Tensor, " batch"]


class RetNet(Mixer):
    """Linear-time memory with rotary positions; head h keeps a token for about 2^(5 + h) more.

        q, k = rotate(W x),  k <- k / sqrt(key),  v = W x,  gamma_h = 1 - 2^(-5 - h)  for h = 0, 1 ...
        S_t = gamma S_{t-1} + k v^T,   y = W_out(rmsnorm(S_t^T q) * silu(W x)), with a norm for each head

    Args:
        dim: width of the input and output.
        num_heads: memories kept side by side; each is ``key_dim`` by ``value_dim``.
        key_dim: size of a key, even; None for ``dim / num_heads``.
        value_dim: size of a value; None for ``2 * dim / num_heads``.
        norm_eps: added to the mean square in the norm, which has no weights.
        backend: ``auto``, or an implementation that all its operators have (see ``seqzoo layers``).

    Raises:
        ValueError: a size is below 1, ``key_dim`` is odd, or ``dim`` is too small for ``num_heads``.
    """

    state_formula = "heads·key_dim·value_dim + 1"
    operators = ("gated_linear_attention",)

    def __init__(
        self,
        dim: int,
        *,
        num_heads: int = 4,
        key_dim: int | None = None,
        value_dim: int | None = None,
        norm_eps: float = 1e-6,
        backend: str = "auto",
    ) -> None:
        super().__init__(dim)
        key = head_size("key_dim", key_dim, dim=dim, num_heads=num_heads)
        value = head_size("value_dim", value_dim, dim=dim, num_heads=num_heads, share=2)
        if key % 2:
            raise ValueError(f"key_dim={key} is odd; rotary positions need pairs of channels")
        self.num_heads, self.key_dim, self.value_dim, self.backend = num_heads, key, value, backend
        self.widths = [num_heads * key] * 2 + [num_heads * value] * 2
        self.projection = nn.Linear(dim, sum(self.widths), bias=False)
        self.norm = GroupRMSNorm(value, eps=norm_eps, learned=False, backend=backend)
        self.out = nn.Linear(num_heads * value, dim, bias=False)
        self._draw()

    @torch.no_grad()
    def _draw(self) -> None:
        draw_shrunk(*self.projection.weight.split(self.widths))
        nn.init.xavier_uniform_(self.out.weight, gain=OUT_GAIN)

    def reset_parameters(self) -> None:
        super().reset_parameters()
        self._draw()

    def forward(
        self,
        x: Float[Tensor, "batch time dim"],
        state: RetNetState | None = None,
        starts: Bool[Tensor, "batch time"] | None = None,
    ) -> tuple[Float[Tensor, "batch time dim"], RetNetState]:
        positions = positions_from_starts(starts, state and state.position, x.shape[1], x.device)
        q, k, v, gate = self.projection(x).split(self.widths, -1)
        q, k, v = (rearrange(z, "b t (h d) -> b t h d", h=self.num_heads) for z in (q, k, v))
        q, k = rotate_neighbours(q, positions, ROTARY_BASE), rotate_neighbours(k, positions, ROTARY_BASE)
        head = torch.arange(self.num_heads, device=x.device, dtype=torch.promote_types(q.dtype, torch.float32))
        log_decay = torch.log1p(-(2.0 ** (-5 - head))).expand(*x.shape[:2], -1)
        k = k * self.key_dim**-0.5
        y, memory = gated_linear_attention(q, k, v, log_decay, state and state.memory, starts, backend=self.backend)
        y = self.norm(rearrange(y, "b t h d -> b t (h d)"), gate)
        return self.out(y), RetNetState(memory, positions[:, -1].expand(len(x)) + 1)

    def state_bytes(self, length: int, *, dtype: torch.dtype = torch.float32) -> int:
        numbers = self.num_heads * self.key_dim * self.value_dim
        return numbers * torch.promote_types(dtype, torch.float32).itemsize + torch.int64.itemsize
