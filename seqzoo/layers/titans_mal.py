"""Titans, memory as a layer: attention in a window, over what was read from memory (Behrouz et al. 2024, https://arxiv.org/abs/2501.00663).

There is no official code; the memory is `NeuralMemory`'s, with its choices, and what it says is normalised before it is
attended to. Persistent tokens are seen by the attention alone: the memory would have to read them anew in front of each
document, which could only change its first weights, and those are learned.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from seqzoo.mixer import Mixer
from seqzoo.parts.key_value_memory import KeyValueRing
from seqzoo.parts.neural_memory import MemoryHeads, NeuralMemoryState
from seqzoo.parts.norm import GroupRMSNorm
from seqzoo.parts.persistent_attention import PersistentWindow


class TitansMALState(NamedTuple):
    """What a sequence leaves behind: the memory, and the window's keys and values."""

    memory: NeuralMemoryState
    window: KeyValueRing


class TitansMAL(Mixer):
    """Exact look-up in a window, whose tokens have first been read through a long-term memory.

        m_t = q_t + layernorm(M_t(q_t)),   M_t an MLP after steps of gradient descent, with momentum, on x up to t
        y = W_out(softmax attention over the persistent tokens and the last ``window`` ones of rmsnorm(m))

    Args:
        dim: width of the input and output.
        num_heads: heads of the attention, and memories side by side; must divide ``dim``.
        window: tokens that the attention sees, the current one included.
        persistent: learned tokens that the attention always sees.
        depth: layers of a memory.
        expand: width of a memory's hidden layers, as a multiple of the head's.
        chunk: tokens whose gradients are taken at the same weights.
        learning_rate: the largest step, positive; where it is large for the depth and the chunk, learning is chaotic.
        conv_size: taps of the short convolution in front of the memory; None for none.
        rope_base: the base of the attention's rotary frequencies, above 1; None for no positions.
        norm_eps: added to the variance or the mean square in the norms.
        backend: the attention's, the memory's and its convolution's: ``auto``, or an implementation that all have (see
            ``seqzoo layers``).

    Raises:
        ValueError: heads do not fit, or a setting is out of range.
    """

    state_formula = "3·heads·head_dim²·(2·expand + (depth-2)·expand²) + (3·(conv_size-1) + 2·window)·dim + 2, depth > 1"
    operators = ("attention", "fast_weights", "short_conv")
    no_weight_decay = frozenset({"memory.norm_weight", "memory.norm_bias", "attention.persistent"})

    def __init__(
        self,
        dim: int,
        *,
        num_heads: int = 4,
        window: int = 64,
        persistent: int = 4,
        depth: int = 2,
        expand: int = 2,
        chunk: int = 16,
        learning_rate: float = 0.5,
        conv_size: int | None = 4,
        rope_base: float | None = 10_000.0,
        norm_eps: float = 1e-5,
        backend: str = "auto",
    ) -> None:
        super().__init__()
        self.attention = PersistentWindow(
            dim, num_heads=num_heads, window=window, persistent=persistent, rope_base=rope_base, backend=backend
        )
        self.memory = MemoryHeads(
            dim,
            num_heads=num_heads,
            head_dim=None,
            depth=depth,
            expand=expand,
            chunk=chunk,
            learning_rate=learning_rate,
            conv_size=conv_size,
            norm_eps=norm_eps,
            backend=backend,
        )
        self.memory_norm = GroupRMSNorm(dim, eps=norm_eps, backend=backend)
        self.out = nn.Linear(dim, dim, bias=False)

    def forward(
        self,
        x: Float[Tensor, "batch time dim"],
        state: TitansMALState | None = None,
        starts: Bool[Tensor, "batch time"] | None = None,
    ) -> tuple[Float[Tensor, "batch time dim"], TitansMALState]:
        far, memory = self.memory(x, state and state.memory, starts)
        y, window = self.attention(self.memory_norm(far), state and state.window, starts)
        return self.out(y), TitansMALState(memory, window)

    def state_bytes(self, length: int, *, dtype: torch.dtype = torch.float32) -> int:
        return self.memory.state_bytes(dtype) + self.attention.state_bytes(dtype)
