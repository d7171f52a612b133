"""What Titans' layers of memory and a window share: both of them, and the norms between (https://arxiv.org/abs/2501.00663)."""

from __future__ import annotations

from typing import ClassVar, NamedTuple

import torch
from torch import nn

from seqzoo.mixer import Mixer
from seqzoo.parts.key_value_memory import KeyValueRing
from seqzoo.parts.neural_memory import MemoryHeads, NeuralMemoryState
from seqzoo.parts.norm import GroupRMSNorm
from seqzoo.parts.persistent_attention import PersistentWindow


class MemoryAndWindowState(NamedTuple):
    """What a sequence leaves behind: the memory, and the window's keys and values."""

    memory: NeuralMemoryState
    window: KeyValueRing


class MemoryAndWindow(Mixer):
    """A memory that learns while it reads and attention in a window, with the settings of both.

    Each layer says what its settings are, and in ``forward`` what reads what.

    Attributes:
        gates: whether the memory gates the attention, which then has a norm too.
    """

    gates: ClassVar[bool]
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
        super().__init__(dim)
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
        if self.gates:
            self.attention_norm = GroupRMSNorm(dim, eps=norm_eps, backend=backend)
        self.memory_norm = GroupRMSNorm(dim, eps=norm_eps, backend=backend)
        self.out = nn.Linear(dim, dim, bias=False)

    def state_bytes(self, length: int, *, dtype: torch.dtype = torch.float32) -> int:
        return self.memory.state_bytes(dtype) + self.attention.state_bytes(dtype)
