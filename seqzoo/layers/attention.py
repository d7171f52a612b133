"""Softmax attention over all past tokens, or a window (Vaswani et al. 2017, https://arxiv.org/abs/1706.03762).

With grouped queries (https://arxiv.org/abs/2305.13245), rotary positions (https://arxiv.org/abs/2104.09864), a sliding
window (https://arxiv.org/abs/2004.05150), and first tokens that stay visible (https://arxiv.org/abs/2309.17453).
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Bool, Float
from torch import Tensor, nn

from seqzoo.mixer import Mixer, positions_from_starts
from seqzoo.parts.key_value_memory import KeyValueBuffer, KeyValueRing, held_positions
from seqzoo.parts.rotary import rotate


class Attention(Mixer):
    """Exact look-up of everything, or of the last ``window`` tokens, at a cost that grows with what is kept.

        o_t = sum_j softmax_j(q_t . k_j / sqrt(key)) v_j,   j <= t, and t - j < window or j < sinks where they are set

    Args:
        dim: width of the input and output.
        num_heads: query heads; must divide ``dim``.
        num_kv_heads: key and value heads, each shared by a group of query heads; None for one a query head.
        window: tokens that are visible, the current one included; None for all.
        sinks: first tokens of a document that stay visible beyond the window.
        positions: ``rope`` turns queries and keys by their place in the document; ``none`` leaves order to others.
        rope_base: the base of the rotary frequencies.
        max_length: longest document, in tokens, that is accepted; None for no limit. Unchecked in ``torch.compile``.

    Raises:
        ValueError: settings do not fit together, or a document passes ``max_length``.
    """

    state_formula = "2·T·kv_heads·head_dim, or 2·(sinks+window)·kv_heads·head_dim"

    def __init__(
        self,
        dim: int,
        *,
        num_heads: int = 4,
        num_kv_heads: int | None = None,
        window: int | None = None,
        sinks: int = 0,
        positions: Literal["rope", "none"] = "rope",
        rope_base: float = 10_000.0,
        max_length: int | None = None,
    ) -> None:
        super().__init__()
        kv_heads = num_heads if num_kv_heads is None else num_kv_heads
        if num_heads < 1 or dim % num_heads:
            raise ValueError(f"num_heads={num_heads} does not divide dim={dim}")
        if kv_heads < 1 or num_heads % kv_heads:
            raise ValueError(f"num_kv_heads={num_kv_heads} does not divide num_heads={num_heads}")
        if window is not None and window < 1:
            raise ValueError(f"window={window}: a token sees at least itself; use 1 or more, or None to see all")
        if sinks < 0 or (sinks and window is None):
            raise ValueError(f"sinks={sinks} with window={window}: sinks are 0 or more, and only a window needs them")
        if positions not in ("rope", "none"):
            raise ValueError(f"positions={positions!r}: use 'rope' or 'none'")
        if positions == "rope" and dim // num_heads % 2:
            raise ValueError(
                f"head size dim/num_heads={dim // num_heads} is odd; rotary positions need pairs of channels"
            )
        if max_length is not None and max_length < 1:
            raise ValueError(f"max_length={max_length}: use 1 or more, or None for no limit")
        self.num_heads, self.num_kv_heads, self.head_dim = num_heads, kv_heads, dim // num_heads
        self.window, self.sinks, self.constant_state = window, sinks, window is not None
        self.positions, self.rope_base, self.max_length = positions, rope_base, max_length
        self.query = nn.Linear(dim, dim, bias=False)
        self.key_value = nn.Linear(dim, 2 * kv_heads * self.head_dim, bias=False)
        self.out = nn.Linear(dim, dim, bias=False)

    def forward(
        self,
        x: Float[Tensor, "batch time dim"],
        state: KeyValueBuffer | KeyValueRing | None = None,
        starts: Bool[Tensor, "batch time"] | None = None,
    ) -> tuple[Float[Tensor, "batch time dim"], KeyValueBuffer | KeyValueRing]:
        batch, time, _ = x.shape
        positions = positions_from_starts(starts, state and state.position, time, x.device).expand(batch, -1)
        self._check_length(positions)
        q = rearrange(self.query(x), "b t (h d) -> b t h d", h=self.num_heads)
        k, v = rearrange(self.key_value(x), "b t (two h d) -> two b t h d", two=2, h=self.num_kv_heads)
        if self.positions == "rope":
            q, k = rotate(q, positions, self.rope_base), rotate(k, positions, self.rope_base)
        attend = self._attend_all if self.window is None else self._attend_window
        y, state = attend(q, k, v, positions, state, starts is None)
        return self.out(rearrange(y, "b h t d -> b t (h d)")), state

    def _attend_all(self, q, k, v, positions, state, unbroken):
        position = positions[:, -1] + 1
        if state is None:
            buffer = KeyValueBuffer(k, v, position, k.new_empty(*k.shape[:2], 0))
            if unbroken:
                return self._attend(q, k, v, None), buffer
        else:
            buffer = state.append(k, v, position)
        used = buffer.filled.shape[1]
        return self._attend(q, buffer.keys[:, :used], buffer.values[:, :used], buffer.visible(positions)), buffer

    def _attend_window(self, q, k, v, positions, state, unbroken):
        assert self.window is not None
        time, position = k.shape[1], positions[:, -1] + 1
        if state is not None and time == 1 and unbroken:
            ring = state.step(k, v, position, self.window, self.sinks)
            visible = held_positions(position, self.window, self.sinks) >= 0
            return self._attend(q, ring.keys, ring.values, visible[:, None]), ring
        ring = KeyValueRing.after(state, k, v, position, self.window, self.sinks)
        if state is None and unbroken and time <= self.window:
            return self._attend(q, k, v, None), ring
        # A token sees the tokens of its document (those at most ``positions`` back) that are near or sinks.
        back = torch.arange(time, device=k.device)[:, None] - torch.arange(time, device=k.device)
        near = (back < self.window) | (positions[:, None, :] < self.sinks)
        visible = (back >= 0) & (back <= positions[..., None]) & near
        if state is not None:
            held = held_positions(state.position, self.window, self.sinks)[:, None]
            same = positions == state.position[:, None] + torch.arange(time, device=k.device)
            near = (positions[..., None] - held < self.window) | (held < self.sinks)
            visible = torch.cat([(held >= 0) & same[..., None] & near, visible], -1)
            k, v = torch.cat([state.keys, k], 1), torch.cat([state.values, v], 1)
        return self._attend(q, k, v, visible), ring

    def _attend(self, q, k, v, visible):
        q, k, v = (rearrange(z, "b t h d -> b h t d") for z in (q, k, v))
        mask = None if visible is None else visible[:, None]
        shared = self.num_kv_heads < self.num_heads
        return F.scaled_dot_product_attention(q, k, v, mask, is_causal=mask is None, enable_gqa=shared)

    def _check_length(self, positions: Tensor) -> None:
        if self.max_length is None or torch.compiler.is_compiling():
            return
        longest = int(positions.max()) + 1
        if longest > self.max_length:
            raise ValueError(
                f"a document of {longest} tokens passes max_length={self.max_length}; raise the limit, set a window, "
                "or feed shorter documents"
            )

    def state_bytes(self, length: int, *, dtype: torch.dtype = torch.float32) -> int:
        slots = length if self.window is None else self.sinks + self.window
        return 2 * slots * self.num_kv_heads * self.head_dim * dtype.itemsize + torch.int64.itemsize
