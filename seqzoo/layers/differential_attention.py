"""Differential attention: what two softmaxes have in common is noise, and cancels (Ye et al. 2024, https://arxiv.org/abs/2410.05258).

Where several heads share keys, both softmaxes of a head use the keys of one pair, as in the authors' fused versions;
their plain version may use one key for both. Left out: rotary frequencies that reach the base itself, in their example.
"""

from __future__ import annotations

import math

import torch
from einops import rearrange
from jaxtyping import Bool, Float
from torch import Tensor, nn

from seqzoo.kernels.attention import attention
from seqzoo.mixer import Mixer, positions_from_starts
from seqzoo.parts.key_value_memory import KeyValueBuffer, first_slots
from seqzoo.parts.norm import GroupRMSNorm
from seqzoo.parts.rotary import RopeLayout, Rotary


class DifferentialAttention(Mixer):
    """Exact look-up of everything by the difference of two softmaxes, which leaves less weight on what does not matter.

        q_1, q_2, k_1, k_2 = rotate(W x),  v = W x, twice as wide as a key
        o = (softmax(q_1 k_1^T / sqrt(key)) - l softmax(q_2 k_2^T / sqrt(key))) v
        l = e^{a_1 . b_1} - e^{a_2 . b_2} + start,  start = 0.8 - 0.6 e^{-0.3 layer_index}
        y = W_out((1 - start) rmsnorm(o))

    Args:
        dim: width of the input and output.
        num_heads: pairs of softmaxes; ``2 * num_heads`` must divide ``dim``.
        num_kv_heads: pairs of keys, each with a value, shared by groups of heads; None for one a head.
        layer_index: which layer of its stack this is, from 0 on.
        norm_eps: added to the mean square in the norm of each head's output.
        rope_base: base of the rotary positions, above 1; None for no positions.
        rope_layout: channels that turn together, ``halves`` (i, i + key/2) or ``neighbours`` (2i, 2i + 1).
        backend: ``auto``, or an implementation that its operator has (see ``seqzoo layers``).

    Raises:
        ValueError: sizes do not fit together, or ``layer_index`` or ``rope_base`` is out of its range.
    """

    state_formula = "4·T·kv_heads·key_dim, with key_dim = dim/(2·heads)"
    operators = ("attention",)
    constant_state = False
    no_weight_decay = frozenset({"lambda_query", "lambda_key"})

    def __init__(
        self,
        dim: int,
        *,
        num_heads: int = 2,
        num_kv_heads: int | None = None,
        layer_index: int = 0,
        norm_eps: float = 1e-5,
        rope_base: float | None = 10_000.0,
        rope_layout: RopeLayout = "halves",
        backend: str = "auto",
    ) -> None:
        super().__init__(dim)
        kv_heads = num_heads if num_kv_heads is None else num_kv_heads
        if num_heads < 1 or dim % (2 * num_heads):
            raise ValueError(f"num_heads={num_heads}: two softmaxes a head, {2 * num_heads}, do not divide dim={dim}")
        if kv_heads < 1 or num_heads % kv_heads:
            raise ValueError(f"num_kv_heads={num_kv_heads} does not divide num_heads={num_heads}")
        if layer_index < 0:
            raise ValueError(f"layer_index={layer_index}: expected 0 or more")
        key = dim // (2 * num_heads)
        self.rotary = (
            Rotary(key, layout=rope_layout).unused("rope_base=None")
            if rope_base is None
            else Rotary(key, rope_base, rope_layout).check()
        )
        self.num_kv_heads, self.key_dim, self.backend = kv_heads, key, backend
        self.start = 0.8 - 0.6 * math.exp(-0.3 * layer_index)
        self.query = nn.Linear(dim, dim, bias=False)
        self.key, self.value = (nn.Linear(dim, 2 * kv_heads * key, bias=False) for _ in range(2))
        self.lambda_query, self.lambda_key = (nn.Parameter(torch.empty(2, key)) for _ in range(2))
        self.norm = GroupRMSNorm(2 * key, eps=norm_eps, backend=backend)
        self.out = nn.Linear(dim, dim, bias=False)
        self._draw()

    def _draw(self) -> None:
        for parameter in (self.lambda_query, self.lambda_key):
            nn.init.normal_(parameter, std=0.1)

    def reset_parameters(self) -> None:
        super().reset_parameters()
        self._draw()

    def forward(
        self,
        x: Float[Tensor, "batch time dim"],
        state: KeyValueBuffer | None = None,
        starts: Bool[Tensor, "batch time"] | None = None,
    ) -> tuple[Float[Tensor, "batch time dim"], KeyValueBuffer]:
        batch, time, _ = x.shape
        positions = positions_from_starts(starts, state and state.position, time, x.device).expand(batch, -1)
        # All first softmaxes come before all second ones: two calls, for one would need all values twice.
        q, k = (
            rearrange(z, "b t (h two d) -> b t (two h) d", two=2, d=self.key_dim) for z in (self.query(x), self.key(x))
        )
        v = rearrange(self.value(x), "b t (h d) -> b t h d", h=self.num_kv_heads)
        if self.rotary is not None:
            q, k = self.rotary.turn(q, positions), self.rotary.turn(k, positions)
        memory = KeyValueBuffer.after(state, k, v, positions[:, -1] + 1)
        k, v, _ = memory.used(q.dtype)
        first = None if state is None and starts is None else first_slots(positions, k.shape[1])
        kept, cancelled = (
            attention(*both, v, first=first, backend=self.backend)
            for both in zip(q.chunk(2, 2), k.chunk(2, 2), strict=True)
        )
        y = kept - self._share().to(kept.dtype) * cancelled
        return self.out((1 - self.start) * self.norm(y.flatten(2))), memory

    def _share(self) -> Tensor:
        """l, in float32 or better."""
        wide = torch.promote_types(self.lambda_query.dtype, torch.float32)
        first, second = (self.lambda_query.to(wide) * self.lambda_key.to(wide)).sum(-1).exp()
        return first - second + self.start

    def state_bytes(self, length: int, *, dtype: torch.dtype = torch.float32) -> int:
        return 4 * length * self.num_kv_heads * self.key_dim * dtype.itemsize + torch.int64.itemsize
