"""Multi-head latent attention: all heads read keys and values from one small vector a token (DeepSeek-AI 2024, https://arxiv.org/abs/2405.04434).

Only the latent vector and one rotary key are kept. Few tokens that go on from a state look at the latents themselves,
with the maps to keys and values moved to the query's and the output's side. Left out: YaRN and its extra scale.
"""

from __future__ import annotations

import torch
from einops import rearrange
from jaxtyping import Bool, Float
from torch import Tensor, nn

from seqzoo.kernels.attention import attention
from seqzoo.mixer import Mixer, positions_from_starts
from seqzoo.parts.heads import head_size
from seqzoo.parts.key_value_memory import KeyValueBuffer, first_slots
from seqzoo.parts.norm import GroupRMSNorm
from seqzoo.parts.rotary import RopeLayout, Rotary


class LatentAttention(Mixer):
    """Exact look-up of everything, that keeps ``latent_dim + rope_dim`` numbers a token for all heads together.

        c = rmsnorm(W_c x),  r = rotate(W_r x),  k_h = [W_h c, r],  v_h = W'_h c,  q_h = [W''_h x, rotate(W'''_h x)]
        o_h = softmax(q_h k_h^T / sqrt(key_dim + rope_dim)) v_h,   y = W_out o

    Args:
        dim: width of the input and output.
        num_heads: heads.
        latent_dim: size of c; None for ``4 * key_dim``.
        query_rank: size of a normalised latent vector between x and the queries; None for none.
        key_dim: channels of a head's keys that come from c; None for ``dim / num_heads``.
        rope_dim: channels that turn with the position, with one key for all heads; even; None for half of ``key_dim``,
            or 2 where that is more.
        value_dim: size of a head's values; None for ``dim / num_heads``.
        norm_eps: added to the mean square in the norms of latent vectors.
        rope_base: base of the rotary positions, above 1.
        rope_layout: channels that turn together, ``halves`` (i, i + rope_dim/2) or ``neighbours`` (2i, 2i + 1).
        backend: ``auto``, or an implementation that its operator has (see ``seqzoo layers``).

    Raises:
        ValueError: a size is below 1, ``rope_dim`` is odd, or ``rope_base`` is out of its range.
    """

    state_formula = "T·(latent_dim + rope_dim)"
    operators = ("attention",)
    constant_state = False

    def __init__(
        self,
        dim: int,
        *,
        num_heads: int = 4,
        latent_dim: int | None = None,
        query_rank: int | None = None,
        key_dim: int | None = None,
        rope_dim: int | None = None,
        value_dim: int | None = None,
        norm_eps: float = 1e-6,
        rope_base: float = 10_000.0,
        rope_layout: RopeLayout = "neighbours",
        backend: str = "auto",
    ) -> None:
        super().__init__(dim)
        key_dim = head_size("key_dim", key_dim, dim=dim, num_heads=num_heads)
        value_dim = head_size("value_dim", value_dim, dim=dim, num_heads=num_heads)
        latent_dim = 4 * key_dim if latent_dim is None else latent_dim
        rope_dim = max(key_dim // 4 * 2, 2) if rope_dim is None else rope_dim
        for name, size in {"latent_dim": latent_dim, "query_rank": query_rank}.items():
            if size is not None and size < 1:
                raise ValueError(f"{name}={size}: use 1 or more")
        if rope_dim < 2 or rope_dim % 2:
            raise ValueError(f"rope_dim={rope_dim}: use an even number, 2 or more")
        self.rotary = Rotary(rope_dim, rope_base, rope_layout).check()
        self.num_heads, self.latent_dim, self.backend = num_heads, latent_dim, backend
        self.key_dim, self.rope_dim, self.value_dim = key_dim, rope_dim, value_dim
        self.query_down = None if query_rank is None else nn.Linear(dim, query_rank, bias=False)
        self.query_norm = None if query_rank is None else GroupRMSNorm(query_rank, eps=norm_eps, backend=backend)
        self.query = nn.Linear(query_rank or dim, num_heads * (key_dim + rope_dim), bias=False)
        self.down = nn.Linear(dim, latent_dim + rope_dim, bias=False)
        self.norm = GroupRMSNorm(latent_dim, eps=norm_eps, backend=backend)
        self.up = nn.Linear(latent_dim, num_heads * (key_dim + value_dim), bias=False)
        self.out = nn.Linear(num_heads * value_dim, dim, bias=False)

    def forward(
        self,
        x: Float[Tensor, "batch time dim"],
        state: KeyValueBuffer | None = None,
        starts: Bool[Tensor, "batch time"] | None = None,
    ) -> tuple[Float[Tensor, "batch time dim"], KeyValueBuffer]:
        batch, time, _ = x.shape
        positions = positions_from_starts(starts, state and state.position, time, x.device).expand(batch, -1)
        low = x if self.query_down is None or self.query_norm is None else self.query_norm(self.query_down(x))
        q = rearrange(self.query(low), "b t (h d) -> b t h d", h=self.num_heads)
        q, turning = q.split([self.key_dim, self.rope_dim], -1)
        turning = self.rotary.turn(turning, positions)
        latent, turned = self.down(x).split([self.latent_dim, self.rope_dim], -1)
        kept = torch.cat([self.norm(latent)[:, :, None], self.rotary.turn(turned[:, :, None], positions)], -1)
        memory = KeyValueBuffer.after(state, kept, kept[..., :0], positions[:, -1] + 1)
        kept = memory.used(q.dtype)[0]
        first = None if state is None and starts is None else first_slots(positions, kept.shape[1])
        look = self._look_at_latents if self._is_few(time, kept.shape[1]) else self._look_at_heads
        return self.out(look(q, turning, kept, first).flatten(2)), memory

    def _is_few(self, time: int, slots: int) -> bool:
        """Whether a head needs fewer products on the latents' side: maps go over tokens then, and not over slots."""
        pair = self.key_dim + self.value_dim
        return time * (self.latent_dim * pair + slots * 2 * self.latent_dim) < slots * (self.latent_dim + time) * pair

    def _look_at_heads(self, q, turning, kept, first):
        latent, turned = kept.split([self.latent_dim, self.rope_dim], -1)
        k, v = rearrange(self.up(latent.squeeze(2)), "b t (h d) -> b t h d", h=self.num_heads).split(
            [self.key_dim, self.value_dim], -1
        )
        k = torch.cat([k, turned.expand(-1, -1, self.num_heads, -1).to(k.dtype)], -1)
        q = torch.cat([q, turning.to(q.dtype)], -1)
        return attention(q, k, v, first=first, scale=self._scale(), backend=self.backend)

    def _look_at_latents(self, q, turning, kept, first):
        weight = rearrange(self.up.weight, "(h d) c -> h d c", h=self.num_heads).to(q.dtype)
        of_keys, of_values = weight.split([self.key_dim, self.value_dim], 1)
        q = torch.cat([torch.einsum("bthd,hdc->bthc", q, of_keys), turning.to(q.dtype)], -1)
        latent = kept[..., : self.latent_dim]
        o = attention(q, kept, latent, first=first, scale=self._scale(), backend=self.backend)
        return torch.einsum("bthc,hdc->bthd", o, of_values)

    def _scale(self) -> float:
        return (self.key_dim + self.rope_dim) ** -0.5

    def state_bytes(self, length: int, *, dtype: torch.dtype = torch.float32) -> int:
        return length * (self.latent_dim + self.rope_dim) * dtype.itemsize + torch.int64.itemsize
