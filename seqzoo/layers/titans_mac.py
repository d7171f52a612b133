"""Titans, memory as a context: attention in segments, with what a memory that learns recalls (Behrouz et al. 2024, https://arxiv.org/abs/2501.00663).

There is no official code; the memory is `NeuralMemory`'s, with its choices but smaller steps, as it learns from what
it recalled: with steps of 0.5, small changes of the input came out up to 48 times as large within 70 tokens. Segments
count from where a document begins, and are the memory's chunks too: what is recalled, and gradients, are of the
weights from before the segment. In the paper a segment sees all that was recalled for it, and is gated by the memory
after it; here a token sees what was recalled for it and those before it, at their places, and is gated by the memory
after itself, or it would see ahead. Persistent tokens are seen by the attention alone: the memory's first weights are
learned. Where the paper leaves the gate's nonlinearity open, it is SiLU, on the memory's side.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from seqzoo.mixer import Mixer, positions_from_starts
from seqzoo.parts.key_value_memory import KeyValueRing, first_slots
from seqzoo.parts.neural_memory import MemoryHeads, NeuralMemoryState
from seqzoo.parts.norm import GroupRMSNorm, l2_normalize
from seqzoo.parts.persistent_attention import PersistentAttention


class TitansMACState(NamedTuple):
    """What a sequence leaves behind: the memory, and keys and values of its last tokens and of what they recalled."""

    memory: NeuralMemoryState
    segment: KeyValueRing


class TitansMAC(Mixer):
    """Exact look-up within a segment, to which a long-term memory of all earlier ones adds what it recalls.

        h_t = r_t + layernorm(M_A(r_t)),   r = l2(silu(W x)),   A the weights from before the segment of t
        a = softmax attention over the persistent tokens, and h_j and x_j of the same segment, j <= t
        m_t = q_t + layernorm(M_t(q_t)),   M_t an MLP after steps of gradient descent, with momentum, on a up to t
        y = W_out(rmsnorm(a) * silu(rmsnorm(m)))

    Segments are read one after the other. Where rows differ in where theirs end, they are cut at all these places, and
    in ``torch.compile``, which cannot know these, everything but a whole new sequence is read token by token.

    Args:
        dim: width of the input and output.
        num_heads: heads of the attention, and memories side by side; must divide ``dim``.
        segment: tokens of a segment, whose gradients are taken at the same weights.
        persistent: learned tokens that the attention always sees.
        depth: layers of a memory.
        expand: width of a memory's hidden layers, as a multiple of the head's.
        learning_rate: the largest step, positive; where it is large for the depth and the segment, learning is chaotic.
        conv_size: taps of the short convolution in front of what the memory learns; None for none.
        rope_base: the base of the attention's rotary frequencies, above 1; None for no positions.
        norm_eps: added to the variance or the mean square in the norms.
        backend: the memory's and its convolution's: ``auto``, or an implementation that both have (see
            ``seqzoo layers``).

    Raises:
        ValueError: heads do not fit, or a setting is out of range.
    """

    state_formula = (
        "3·heads·head_dim²·(2·expand + (depth-2)·expand²) + (3·(conv_size-1) + 4·segment)·dim + 2, depth > 1"
    )
    operators = ("fast_weights", "short_conv")
    no_weight_decay = frozenset({"memory.norm_weight", "memory.norm_bias", "attention.persistent"})

    def __init__(
        self,
        dim: int,
        *,
        num_heads: int = 4,
        segment: int = 16,
        persistent: int = 4,
        depth: int = 2,
        expand: int = 2,
        learning_rate: float = 0.05,
        conv_size: int | None = 4,
        rope_base: float | None = 10_000.0,
        norm_eps: float = 1e-5,
        backend: str = "auto",
    ) -> None:
        super().__init__(dim)
        if segment < 1:
            raise ValueError(f"segment={segment}: use 1 or more tokens")
        self.segment, self.backend = segment, backend
        self.recall = nn.Linear(dim, dim, bias=False)
        self.attention = PersistentAttention(dim, num_heads=num_heads, persistent=persistent, rope_base=rope_base)
        self.memory = MemoryHeads(
            dim,
            num_heads=num_heads,
            head_dim=None,
            depth=depth,
            expand=expand,
            chunk=segment,
            learning_rate=learning_rate,
            conv_size=conv_size,
            norm_eps=norm_eps,
            backend=backend,
        )
        self.attention_norm, self.memory_norm = (GroupRMSNorm(dim, eps=norm_eps, backend=backend) for _ in range(2))
        self.out = nn.Linear(dim, dim, bias=False)

    def forward(
        self,
        x: Float[Tensor, "batch time dim"],
        state: TitansMACState | None = None,
        starts: Bool[Tensor, "batch time"] | None = None,
    ) -> tuple[Float[Tensor, "batch time dim"], TitansMACState]:
        batch, time, _ = x.shape
        memory, ring = (None, None) if state is None else state
        positions = positions_from_starts(starts, ring and ring.position, time, x.device).expand(batch, -1)
        sizes = self._pieces(positions, state is None and starts is None)
        recall = F.silu(self.recall(x)).unflatten(-1, (self.attention.num_heads, -1))
        recall = l2_normalize(recall, backend=self.backend)
        tokens = recall, self.attention.queries(x, positions), *self.attention.keys_and_values(x, positions), positions
        begins = [None] * len(sizes) if starts is None else starts.split(sizes, 1)
        outputs = []
        pieces = zip(*(z.split(sizes, 1) for z in tokens), strict=True)
        for begin, (r, q, k, v, place) in zip(begins, pieces, strict=True):
            recalled = self.memory.read(r, memory, None if begin is None else begin[:, 0])
            near, ring = self._attend(q, k, v, recalled, place, ring)
            far, memory = self.memory(near, memory, begin)
            outputs.append(self.attention_norm(near, self.memory_norm(far)))
        assert memory is not None and ring is not None
        return self.out(torch.cat(outputs, 1)), TitansMACState(memory, ring)

    def _pieces(self, positions: Int[Tensor, "batch time"], new: bool) -> list[int]:
        """Numbers of tokens that are read at once: no row has a segment's end before a piece's."""
        time = positions.shape[1]
        if torch.compiler.is_compiling() and not new:
            return [1] * time
        if new:
            cuts = list(range(0, time, self.segment))
        else:
            cuts = (positions % self.segment == 0).any(0).nonzero().flatten().tolist()
            cuts = cuts if cuts[:1] == [0] else [0, *cuts]
        return [end - begin for begin, end in zip(cuts, [*cuts[1:], time], strict=True)]

    def _attend(
        self, q: Tensor, k: Tensor, v: Tensor, recalled: Tensor, positions: Tensor, ring: KeyValueRing | None
    ) -> tuple[Tensor, KeyValueRing]:
        """Tokens within their segments; the ring has keys and values of tokens and of what they recalled, as heads."""
        more_k, more_v = self.attention.keys_and_values(recalled, positions)
        k, v, time = torch.cat([k, more_k], 2), torch.cat([v, more_v], 2), k.shape[1]
        last = KeyValueRing.after(ring, k, v, positions[:, -1] + 1, self.segment, 0)
        if ring is not None:
            k, v, _ = ring.before(k, v, positions, self.segment, 0)
        slots = k.shape[1]
        first = first_slots(positions % self.segment, slots)
        slot = torch.arange(slots, device=q.device)
        visible = (slot <= slot[slots - time :, None]) & (slot >= first[..., None])
        k, v = (torch.cat(z.chunk(2, 2), 1) for z in (k, v))
        return self.attention.look(q, k, v, torch.cat([visible, visible], -1)), last

    def state_bytes(self, length: int, *, dtype: torch.dtype = torch.float32) -> int:
        kept = 4 * self.segment * self.attention.num_heads * self.attention.head_dim * dtype.itemsize
        return self.memory.state_bytes(dtype) + kept + torch.int64.itemsize
