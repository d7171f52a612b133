"""Landmark attention: blocks of tokens are reached by a key for each (Mohtashami and Jaggi 2023, https://arxiv.org/abs/2305.16300).

In the paper a landmark is a token that is put after each block and passes through the whole stack. Here the layer makes
it: a learned query looks into the block and what it finds, with a learned vector added, is the block's key; so no token
has to be put anywhere, and sequences keep their length. All keys turn with their true positions. Left out: positions
that are squeezed where few blocks are looked into, and a memory away from the device.
"""

from __future__ import annotations

from typing import Literal

import torch
from einops import rearrange
from jaxtyping import Bool, Float
from torch import Tensor, nn

from seqzoo.kernels.attention import attention
from seqzoo.kernels.landmark_attention import landmark_attention
from seqzoo.mixer import Mixer, positions_from_starts
from seqzoo.parts.key_value_memory import KeyValueBuffer
from seqzoo.parts.rotary import Rotary


class LandmarkAttention(Mixer):
    """Exact look-up within the own block, and in earlier ones by way of their landmarks: in all, or the ``top_k`` best.

        q, k, v = rotate(W x), rotate(W x), W x,   m_b = sum_{j in b} softmax_{j in b}(u . k_j / sqrt(key)) k_j + e
        g = softmax over the own block, by q . k_j / sqrt(key), and all earlier blocks b, by q . m_b / sqrt(key)
        o = sum_{own block} g_j v_j + sum_b g_b sum_{j in b} softmax_{j in b}(q . k_j / sqrt(key)) v_j,   y = W_out o

    u and e turn with the position of the block's last token.

    Args:
        dim: width of the input and output.
        num_heads: query heads; must divide ``dim``.
        num_kv_heads: key and value heads, each shared by a group of query heads; None for one a query head.
        block_size: tokens of a block, 2 or more.
        top_k: earlier blocks that each query and head looks into; None for all. A layer that was trained with None can
            be given a number.
        positions: ``rope`` turns queries and keys by their place in the document; ``none`` leaves order to others.
        rope_base: the base of the rotary frequencies, above 1.
        backend: how landmarks are made: ``auto``, or an implementation of ``attention`` (see ``seqzoo layers``).

    Raises:
        ValueError: sizes do not fit together, or ``top_k`` or ``positions`` is not legal.
    """

    state_formula = "3·T·kv_heads·head_dim"
    operators = ("attention", "landmark_attention")
    constant_state = False
    no_weight_decay = frozenset({"landmark_query", "landmark_key"})

    def __init__(
        self,
        dim: int,
        *,
        num_heads: int = 4,
        num_kv_heads: int | None = None,
        block_size: int = 50,
        top_k: int | None = None,
        positions: Literal["rope", "none"] = "rope",
        rope_base: float = 10_000.0,
        backend: str = "auto",
    ) -> None:
        super().__init__(dim)
        kv_heads = num_heads if num_kv_heads is None else num_kv_heads
        if num_heads < 1 or dim % num_heads:
            raise ValueError(f"num_heads={num_heads} does not divide dim={dim}")
        if kv_heads < 1 or num_heads % kv_heads:
            raise ValueError(f"num_kv_heads={num_kv_heads} does not divide num_heads={num_heads}")
        if block_size < 2:
            raise ValueError(f"block_size={block_size}: use 2 or more; the landmark of a single token finds that token")
        if top_k is not None and top_k < 1:
            raise ValueError(f"top_k={top_k}: use 1 or more, or None to look into all blocks")
        if positions not in ("rope", "none"):
            raise ValueError(f"positions={positions!r}: use 'rope' or 'none'")
        self.num_kv_heads, self.head_dim = kv_heads, dim // num_heads
        self.block_size, self.top_k, self.backend = block_size, top_k, backend
        rotary = Rotary(self.head_dim, rope_base)
        self.rotary = rotary.check() if positions == "rope" else rotary.unused("positions='none'")
        self.query = nn.Linear(dim, dim, bias=False)
        self.key_value = nn.Linear(dim, 2 * kv_heads * self.head_dim, bias=False)
        self.landmark_query, self.landmark_key = (nn.Parameter(torch.empty(kv_heads, self.head_dim)) for _ in range(2))
        self.out = nn.Linear(dim, dim, bias=False)
        self._draw()

    def _draw(self) -> None:
        for parameter in (self.landmark_query, self.landmark_key):
            nn.init.normal_(parameter, std=0.02)

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
        q = rearrange(self.query(x), "b t (h d) -> b t h d", d=self.head_dim)
        k, v = rearrange(self.key_value(x), "b t (two h d) -> two b t h d", two=2, d=self.head_dim)
        learned = torch.stack([self.landmark_query, self.landmark_key]).to(k.dtype)
        look, extra = learned[:, None, None].expand(-1, batch, time, -1, -1)
        if self.rotary is not None:
            q, k, look, extra = (self.rotary.turn(z, positions) for z in (q, k, look, extra))

        if state is not None:
            state.check((self.num_kv_heads, 2 * self.head_dim), (self.num_kv_heads, self.head_dim), (0,))
        # Every token could end its block: what is made where none ends is never read.
        back = min(self.block_size - 1, 0 if state is None else state.filled.shape[1])
        near = (
            k
            if state is None or back == 0
            else torch.cat([state.used(k.dtype)[0][:, -back:, :, : self.head_dim], k], 1)
        )
        begin = torch.arange(back, back + time, device=x.device) - positions % self.block_size
        marks = attention(look, near, near, first=begin, window=self.block_size, backend=self.backend) + extra

        memory = KeyValueBuffer.after(state, torch.cat([k, marks], -1), v, positions[:, -1] + 1)
        both, v, _ = memory.used(q.dtype)
        place = positions
        if state is not None:
            before = torch.arange(-state.filled.shape[1], 0, device=x.device) + state.position[:, None]
            place = torch.cat([before, positions], 1)
        k, marks = both.chunk(2, -1)
        y = landmark_attention(q, k, v, marks, place, block=self.block_size, top_k=self.top_k)
        return self.out(y.flatten(2)), memory

    def state_bytes(self, length: int, *, dtype: torch.dtype = torch.float32) -> int:
        return 3 * length * self.num_kv_heads * self.head_dim * dtype.itemsize + torch.int64.itemsize
