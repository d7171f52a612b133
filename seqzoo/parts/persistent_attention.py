"""Titans' short-term memory: attention that sees learned tokens beside what it reads (https://arxiv.org/abs/2501.00663).

These persistent tokens stand in front of every document, all at place 0, so that the keys of a window or a segment need
not be fed them: their own keys and values are the same for all.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from seqzoo.kernels.attention import attention
from seqzoo.mixer import positions_from_starts
from seqzoo.parts.key_value_memory import KeyValueRing, first_slots
from seqzoo.parts.rotary import Rotary

PERSISTENT_STD = 0.02


class PersistentAttention(nn.Module):
    """``o_t = sum_j softmax_j(q_t . k_j / sqrt(key)) v_j`` over all persistent tokens, and what else is visible.

        q, k, v = rotate(W x), rotate(W x), W x;   of the persistent tokens p, k and v by the same W, not turned

    There is no projection of the output.

    Args:
        dim: width of the input and output.
        num_heads: heads; must divide ``dim``.
        persistent: number of persistent tokens.
        rope_base: the base of the rotary frequencies; None for no positions.

    Raises:
        ValueError: heads do not fit, or there are no persistent tokens.
    """

    def __init__(self, dim: int, *, num_heads: int, persistent: int, rope_base: float | None) -> None:
        super().__init__()
        if num_heads < 1 or dim % num_heads:
            raise ValueError(f"num_heads={num_heads} does not divide dim={dim}")
        if persistent < 1:
            raise ValueError(f"persistent={persistent}: use 1 or more tokens")
        self.num_heads, self.head_dim = num_heads, dim // num_heads
        self.rotary = None if rope_base is None else Rotary(self.head_dim, rope_base).check()
        self.query = nn.Linear(dim, dim, bias=False)
        self.key_value = nn.Linear(dim, 2 * dim, bias=False)
        self.persistent = nn.Parameter(torch.empty(persistent, dim))
        self._draw()

    def _draw(self) -> None:
        nn.init.normal_(self.persistent, std=PERSISTENT_STD)

    def reset_parameters(self) -> None:
        self.query.reset_parameters()
        self.key_value.reset_parameters()
        self._draw()

    def queries(
        self, x: Float[Tensor, "batch time dim"], positions: Int[Tensor, "batch time"]
    ) -> Float[Tensor, "batch time head key"]:
        return self._turned(self.query(x).unflatten(-1, (self.num_heads, -1)), positions)

    def keys_and_values(
        self, x: Float[Tensor, "batch time dim"], positions: Int[Tensor, "batch time"]
    ) -> tuple[Float[Tensor, "batch time head key"], Float[Tensor, "batch time head key"]]:
        k, v = rearrange(self.key_value(x), "b t (two h d) -> two b t h d", two=2, h=self.num_heads)
        return self._turned(k, positions), v

    def look(
        self,
        q: Float[Tensor, "rows time head key"],
        k: Float[Tensor, "rows slot head key"],
        v: Float[Tensor, "rows slot head key"],
        visible: Bool[Tensor, "rows time slot"],
    ) -> Float[Tensor, "rows time dim"]:
        """What queries find among persistent tokens and the slots that are ``visible`` to them."""
        visible = F.pad(visible, (len(self.persistent), 0), value=True)
        q, k, v = (z.transpose(1, 2) for z in (q, *self.behind_persistent(k, v)))
        return rearrange(F.scaled_dot_product_attention(q, k, v, visible[:, None]), "b h t d -> b t (h d)")

    def behind_persistent(
        self, k: Float[Tensor, "rows slot head key"], v: Float[Tensor, "rows slot head key"]
    ) -> tuple[Float[Tensor, "rows slots head key"], Float[Tensor, "rows slots head key"]]:
        """Keys and values with those of the persistent tokens in front."""
        always = rearrange(self.key_value(self.persistent), "p (two h d) -> two 1 p h d", two=2, h=self.num_heads)
        k, v = (torch.cat([z.expand(len(k), -1, -1, -1), w], 1) for z, w in zip(always, (k, v), strict=True))
        return k, v

    def _turned(self, x: Tensor, positions: Tensor) -> Tensor:
        return x if self.rotary is None else self.rotary.turn(x, positions)


class PersistentWindow(PersistentAttention):
    """The same where each token sees the last ``window`` ones, itself included, at the cost of what it sees.

    Args:
        dim: width of the input and output.
        num_heads: heads; must divide ``dim``.
        window: tokens that are visible beside the persistent ones.
        persistent: number of persistent tokens.
        rope_base: the base of the rotary frequencies; None for no positions.
        backend: ``auto``, or an implementation of ``attention``.

    Raises:
        ValueError: heads do not fit, or a size is below 1.
    """

    def __init__(
        self, dim: int, *, num_heads: int, window: int, persistent: int, rope_base: float | None, backend: str
    ) -> None:
        if window < 1:
            raise ValueError(f"window={window}: a token sees at least itself; use 1 or more")
        super().__init__(dim, num_heads=num_heads, persistent=persistent, rope_base=rope_base)
        self.window, self.backend = window, backend

    def forward(
        self,
        x: Float[Tensor, "batch time dim"],
        state: KeyValueRing | None = None,
        starts: Bool[Tensor, "batch time"] | None = None,
    ) -> tuple[Float[Tensor, "batch time dim"], KeyValueRing]:
        batch, time, _ = x.shape
        positions = positions_from_starts(starts, state and state.position, time, x.device).expand(batch, -1)
        q, (k, v), position = self.queries(x, positions), self.keys_and_values(x, positions), positions[:, -1] + 1
        if state is not None and time == 1 and starts is None:
            ring = state.step(k, v, position, self.window, 0)
            return self._attend(q, ring.keys, ring.values, ring.empty()[:, None], None), ring
        ring = KeyValueRing.after(state, k, v, position, self.window, 0)
        if state is None:
            first = first_slots(positions, time)
        else:
            k, v, first = state.before(k, v, positions, self.window, 0)
        return self._attend(q, k, v, first, self.window), ring

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, first: Tensor, window: int | None) -> Tensor:
        """What tokens find among persistent tokens and their documents' last ``window`` ones."""
        k, v = (z.to(q.dtype) for z in self.behind_persistent(k, v))
        prefix = len(self.persistent)
        return attention(q, k, v, first=first + prefix, window=window, prefix=prefix, backend=self.backend).flatten(2)

    def state_bytes(self, dtype: torch.dtype) -> int:
        """Bytes of one sequence's keys, values and position."""
        return 2 * self.window * self.num_heads * self.head_dim * dtype.itemsize + torch.int64.itemsize
