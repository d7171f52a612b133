"""Neural memory: an MLP trained while it reads, with momentum and forgetting (Behrouz et al. 2024, https://arxiv.org/abs/2501.00663).

There is no official code. As in TTT and, by default, in titans-pytorch, what the MLP says is normalised and added to
the query: without that, long chunks of like tokens diverge. The loss is a mean over channels, as there, not a sum.
Memory starts out forgetting little, 0.7 % a token. Left out: persistent tokens in front of a memory that stands alone,
which could only change its first weights, and those are learned.
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from seqzoo.mixer import Mixer
from seqzoo.parts.neural_memory import MemoryHeads, NeuralMemoryState
from seqzoo.parts.norm import GroupRMSNorm


class NeuralMemory(Mixer):
    """Linear-time memory in the weights of an MLP: surprising tokens change them most, with momentum.

        q, k = l2(silu(conv(W x))),  v = silu(conv(W x)),  theta / learning_rate, eta, alpha = sigmoid(W x + b)
        S_t = eta_t S_{t-1} + theta_t grad mean (k_t + layernorm(M_A(k_t)) - v_t)^2,   M_t = (1 - alpha_t) M_{t-1} - S_t
        y = W_out(rmsnorm(q_t + layernorm(M_t(q_t))) * silu(W x)),   A the weights from before the chunk

    Args:
        dim: width of the input and output.
        num_heads: memories kept side by side.
        head_dim: size of a head's queries, keys and values; None for ``dim / num_heads``.
        depth: layers of a memory.
        expand: width of a memory's hidden layers, as a multiple of the head's.
        chunk: tokens whose gradients are taken at the same weights.
        learning_rate: the largest step, positive; where it is large for the depth and the chunk, learning is chaotic.
        conv_size: taps of the short convolution on queries, keys and values; None for none.
        use_gate: whether the normalised output is multiplied by ``silu(W x)``.
        norm_eps: added to the variance or the mean square in the norms.
        backend: ``auto``, or an implementation that all its operators have (see ``seqzoo layers``).

    Raises:
        ValueError: a size is below 1, ``learning_rate`` is not positive, or ``dim`` is too small for ``num_heads``.
    """

    state_formula = "3·heads·head_dim²·(2·expand + (depth-2)·expand²) + 3·(conv_size-1)·heads·head_dim + 1, depth > 1"
    operators = ("fast_weights", "short_conv")
    no_weight_decay = frozenset({"heads.norm_weight", "heads.norm_bias"})

    def __init__(
        self,
        dim: int,
        *,
        num_heads: int = 4,
        head_dim: int | None = None,
        depth: int = 2,
        expand: int = 2,
        chunk: int = 16,
        learning_rate: float = 0.5,
        conv_size: int | None = 4,
        use_gate: bool = True,
        norm_eps: float = 1e-5,
        backend: str = "auto",
    ) -> None:
        super().__init__(dim)
        self.heads = MemoryHeads(
            dim,
            num_heads=num_heads,
            head_dim=head_dim,
            depth=depth,
            expand=expand,
            chunk=chunk,
            learning_rate=learning_rate,
            conv_size=conv_size,
            norm_eps=norm_eps,
            backend=backend,
        )
        width = self.heads.width
        self.norm = GroupRMSNorm(self.heads.head_dim, eps=norm_eps, backend=backend)
        self.gate = nn.Linear(dim, width, bias=False) if use_gate else None
        self.out = nn.Linear(width, dim, bias=False)

    def forward(
        self,
        x: Float[Tensor, "batch time dim"],
        state: NeuralMemoryState | None = None,
        starts: Bool[Tensor, "batch time"] | None = None,
    ) -> tuple[Float[Tensor, "batch time dim"], NeuralMemoryState]:
        y, last = self.heads(x, state, starts)
        return self.out(self.norm(y, None if self.gate is None else self.gate(x))), last

    def state_bytes(self, length: int, *, dtype: torch.dtype = torch.float32) -> int:
        return self.heads.state_bytes(dtype)
