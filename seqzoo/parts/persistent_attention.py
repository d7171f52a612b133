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

from seqzoo.mixer import positions_from_starts
from seqzoo.parts.key_value_memory import KeyValueRing, first_slots, held_positions
from seqzoo.parts.rotary import Rotary

PERSISTENT_STD = 0.02
# Queries that look together within a window that is smaller: more are more work, fewer are smaller products.
SMALLEST_BLOCK = 64


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
        always = rearrange(self.key_value(self.persistent), "p (two h d) -> two 1 p h d", two=2, h=self.num_heads)
        k, v = (torch.cat([z.expand(len(q), -1, -1, -1), w], 1) for z, w in zip(always, (k, v), strict=True))
        visible = F.pad(visible, (len(self.persistent), 0), value=True)
        q, k, v = (z.transpose(1, 2) for z in (q, k, v))
        return rearrange(F.scaled_dot_product_attention(q, k, v, visible[:, None]), "b h t d -> b t (h d)")

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

    Raises:
        ValueError: heads do not fit, or a size is below 1.
    """

    def __init__(self, dim: int, *, num_heads: int, window: int, persistent: int, rope_base: float | None) -> None:
        if window < 1:
            raise ValueError(f"window={window}: a token sees at least itself; use 1 or more")
        super().__init__(dim, num_heads=num_heads, persistent=persistent, rope_base=rope_base)
        self.window = window

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
            visible = held_positions(position, self.window, 0)[:, None] >= 0
            return self.look(q, ring.keys, ring.values, visible), ring
        ring = KeyValueRing.after(state, k, v, position, self.window, 0)
        if state is None:
            first = first_slots(positions, time)
        else:
            k, v, first = state.before(k, v, positions, self.window, 0)
        return self._look_back(q, k, v, first), ring

    def _look_back(self, q: Tensor, k: Tensor, v: Tensor, first: Tensor) -> Tensor:
        """Blocks of queries, the last slots', each against the slots that one of its tokens may see."""
        batch, time, slots = *q.shape[:2], k.shape[1]
        size = min(time, max(self.window, SMALLEST_BLOCK))
        rest, front = -time % size, self.window - 1 - (slots - time)
        q, first = F.pad(q, (0, 0, 0, 0, 0, rest)), F.pad(first, (0, rest)) + front
        k, v = (F.pad(z, (0, 0, 0, 0, front, rest)).unfold(1, size + self.window - 1, size) for z in (k, v))
        k, v = (rearrange(z, "b n h d s -> (b n) s h d") for z in (k, v))
        begin = torch.arange(0, time + rest, size, device=q.device)[:, None]
        since = first.unflatten(1, (-1, size)) - begin
        place, slot = torch.arange(size, device=q.device)[:, None], torch.arange(k.shape[1], device=q.device)
        visible = (slot >= place) & (slot < place + self.window) & (slot >= since[..., None])
        y = self.look(rearrange(q, "b (n t) h d -> (b n) t h d", t=size), k, v, visible.flatten(0, 1))
        return y.unflatten(0, (batch, -1)).flatten(1, 2)[:, :time]

    def state_bytes(self, dtype: torch.dtype) -> int:
        """Bytes of one sequence's keys, values and position."""
        return 2 * self.window * self.num_heads * self.head_dim * dtype.itemsize + torch.int64.itemsize
