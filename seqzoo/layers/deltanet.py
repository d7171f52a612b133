"""DeltaNet: a key-value memory that corrects what it stores (Yang et al. 2024, https://arxiv.org/abs/2406.06484).

The rule goes back to Schlag et al. 2021, https://arxiv.org/abs/2102.11174. Left out: other activations than SiLU and
other norms than the Euclidean one on queries and keys, writes of full strength, and biases of the convolution.
"""

from __future__ import annotations

import torch
from einops import rearrange
from jaxtyping import Bool, Float
from torch import Tensor, nn

from seqzoo.kernels.gated_delta_rule import gated_delta_rule
from seqzoo.mixer import Mixer
from seqzoo.parts.delta_rule import DeltaRuleState, QueryKeyValue
from seqzoo.parts.norm import GroupRMSNorm


class DeltaNet(Mixer):
    """Linear-time memory that overwrites the value stored at a key, and never forgets by itself.

        q, k = l2(silu(conv(W x))),  v = silu(conv(W x)),  beta = sigmoid(W x)
        S_t = S_{t-1} + beta k (v - S_{t-1}^T k)^T,   y = W_out(rmsnorm(S_t^T q / sqrt(key)))

    Args:
        dim: width of the input and output.
        num_heads: memories kept side by side; each is ``key_dim`` by ``value_dim``.
        key_dim: size of a key; None for ``dim / num_heads``.
        value_dim: size of a value; None for ``key_dim``.
        conv_size: taps of the short convolution on queries, keys and values; None for none.
        negative_eigenvalues: beta is doubled, so that a write may also flip what is stored at its key.
        use_gate: whether the normalised output is multiplied by ``silu(W x)``.
        norm_eps: added to the mean square in the output norm.
        backend: ``auto``, or an implementation that all its operators have (see ``seqzoo layers``).

    Raises:
        ValueError: a size is below 1, or ``dim`` is too small for ``num_heads``.
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
        use_gate: bool = False,
        norm_eps: float = 1e-5,
        backend: str = "auto",
    ) -> None:
        super().__init__(dim)
        self.qkv = QueryKeyValue(
            dim, num_heads=num_heads, key_dim=key_dim, value_dim=value_dim, conv_size=conv_size, backend=backend
        )
        width = num_heads * self.qkv.value_dim
        self.strongest, self.backend = 2 if negative_eigenvalues else 1, backend
        self.write = nn.Linear(dim, num_heads, bias=False)
        self.norm = GroupRMSNorm(self.qkv.value_dim, eps=norm_eps, backend=backend)
        self.gate = nn.Linear(dim, width, bias=False) if use_gate else None
        self.out = nn.Linear(width, dim, bias=False)

    def forward(
        self,
        x: Float[Tensor, "batch time dim"],
        state: DeltaRuleState | None = None,
        starts: Bool[Tensor, "batch time"] | None = None,
    ) -> tuple[Float[Tensor, "batch time dim"], DeltaRuleState]:
        q, k, v, conv = self.qkv(x, state and state.conv, starts)
        beta = self.strongest * self.write(x).sigmoid()
        y, memory = gated_delta_rule(q, k, v, None, beta, state and state.memory, starts, backend=self.backend)
        y = self.norm(rearrange(y, "b t h d -> b t (h d)"), None if self.gate is None else self.gate(x))
        return self.out(y), DeltaRuleState(memory, conv)

    def state_bytes(self, length: int, *, dtype: torch.dtype = torch.float32) -> int:
        return self.qkv.state_bytes(dtype)
