"""Kimi Delta Attention: an erasable memory in which every key channel fades at its own rate (Kimi Team 2025, https://arxiv.org/abs/2510.26692).

With ``lower_bound`` also the bounded gate of GLM-5. As in Kimi's own code the output gate has no bias, which fla's has.
Left out: biases of the convolution, and the gates of full rank that Ling-3.0 has.
"""

from __future__ import annotations

import torch
from einops import rearrange
from jaxtyping import Bool, Float
from torch import Tensor, nn

from seqzoo.kernels.gated_delta_rule import gated_delta_rule
from seqzoo.mixer import Mixer
from seqzoo.parts.decay import ChannelDecay
from seqzoo.parts.delta_rule import DeltaRuleState, QueryKeyValue
from seqzoo.parts.low_rank import LowRank
from seqzoo.parts.norm import GroupRMSNorm


class KimiDeltaAttention(Mixer):
    """Linear-time memory that overwrites the value stored at a key, and forgets channel by channel.

        q, k = l2(silu(conv(W x))),  v = silu(conv(W x)),  beta = sigmoid(W x),  f = W_up W_down x + dt_bias
        g = -exp(A_log) softplus(f), or with a lower bound g = lower_bound * sigmoid(exp(A_log) f)
        R = diag(e^g) S_{t-1},  S_t = R + beta k (v - R^T k)^T
        y = W_out(rmsnorm(S_t^T q / sqrt(key)) * sigmoid(W' W x))

    Args:
        dim: width of the input and output.
        num_heads: memories kept side by side; each is ``key_dim`` by ``value_dim``.
        key_dim: size of a key; None for ``dim / num_heads``.
        value_dim: size of a value, and the rank of both gates; None for ``key_dim``.
        conv_size: taps of the short convolution on queries, keys and values; None for none.
        negative_eigenvalues: beta is doubled, so that a write may also flip what is stored at its key.
        lower_bound: the log decay stays between this and 0; below 0, -5 in the models that have one; None for no bound.
        norm_eps: added to the mean square in the output norm.
        backend: ``auto``, or an implementation that all its operators have (see ``seqzoo layers``).

    Raises:
        ValueError: a size is below 1, ``dim`` is too small for ``num_heads``, or ``lower_bound`` is not below 0.
    """

    state_formula = "heads·key_dim·value_dim + (conv_size-1)·heads·(2·key_dim+value_dim)"
    operators = ("gated_delta_rule", "short_conv")

    def __init__(
        self,
        dim: int,
        *,
        num_heads: int = 4,
        key_dim: int | None = None,
        value_dim: int | None = None,
        conv_size: int | None = 4,
        negative_eigenvalues: bool = False,
        lower_bound: float | None = None,
        norm_eps: float = 1e-5,
        backend: str = "auto",
    ) -> None:
        super().__init__(dim)
        self.qkv = QueryKeyValue(
            dim, num_heads=num_heads, key_dim=key_dim, value_dim=value_dim, conv_size=conv_size, backend=backend
        )
        keys, rank, values = num_heads * self.qkv.key_dim, self.qkv.value_dim, num_heads * self.qkv.value_dim
        self.strongest, self.backend = 2 if negative_eigenvalues else 1, backend
        self.step = LowRank(dim, rank, keys)
        self.decay = ChannelDecay(num_heads, self.qkv.key_dim, lower_bound=lower_bound)
        self.write = nn.Linear(dim, num_heads, bias=False)
        self.norm = GroupRMSNorm(self.qkv.value_dim, eps=norm_eps, activation="sigmoid", backend=backend)
        self.gate = LowRank(dim, rank, values)
        self.out = nn.Linear(values, dim, bias=False)

    def forward(
        self,
        x: Float[Tensor, "batch time dim"],
        state: DeltaRuleState | None = None,
        starts: Bool[Tensor, "batch time"] | None = None,
    ) -> tuple[Float[Tensor, "batch time dim"], DeltaRuleState]:
        q, k, v, conv = self.qkv(x, state and state.conv, starts)
        log_decay = self.decay(self.step(x))
        beta = self.strongest * self.write(x).sigmoid()
        y, memory = gated_delta_rule(q, k, v, log_decay, beta, state and state.memory, starts, backend=self.backend)
        y = self.norm(rearrange(y, "b t h d -> b t (h d)"), self.gate(x))
        return self.out(y), DeltaRuleState(memory, conv)

    def state_bytes(self, length: int, *, dtype: torch.dtype = torch.float32) -> int:
        return self.qkv.state_bytes(dtype)
