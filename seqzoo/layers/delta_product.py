"""DeltaProduct: an erasable memory that takes several writes a token (Siems et al. 2025, https://arxiv.org/abs/2502.10297).

A token's transition is then a product of reflections, which can permute what is stored; with one write it is that of
Gated DeltaNet. The decay rate starts in (0.01, 16), not (0, 16), whose lower end is a logarithm of zero. Left out:
biases of the convolution.
"""

from __future__ import annotations

import torch
from einops import rearrange
from jaxtyping import Bool, Float
from torch import Tensor, nn

from seqzoo.kernels.gated_delta_product import gated_delta_product
from seqzoo.mixer import Mixer
from seqzoo.parts.decay import SoftplusDecay
from seqzoo.parts.delta_rule import DeltaRuleState, QueryKeyValue
from seqzoo.parts.norm import GroupRMSNorm


class DeltaProduct(Mixer):
    """Linear-time memory that overwrites the values stored at several keys a token, and forgets by a gate.

        q, k_j = l2(silu(conv(W x))),  v_j = silu(conv(W x)),  beta_j = 2 sigmoid(W x),
        g = -exp(A_log) softplus(W x + dt_bias),  R_0 = e^g S_{t-1},  R_j = R_{j-1} + beta_j k_j (v_j - R_{j-1}^T k_j)^T
        S_t = R_n,   y = W_out(rmsnorm(S_t^T q / sqrt(key)) * silu(W x))

    Args:
        dim: width of the input and output.
        steps: writes of a token, n above.
        num_heads: memories kept side by side; each is ``key_dim`` by ``value_dim``.
        num_key_heads: heads of queries and keys, each shared by consecutive memories; must divide ``num_heads``, None
            for as many.
        key_dim: size of a key; None for three quarters of ``dim / num_heads``.
        value_dim: size of a value; None for ``2 * key_dim``.
        conv_size: taps of the short convolution on queries, keys and values; None for none.
        negative_eigenvalues: beta reaches 2, a reflection, in place of 1, a projection.
        use_decay: whether the memory decays; without, g is 0.
        use_gate: whether the normalised output is multiplied by ``silu(W x)``.
        norm_eps: added to the mean square in the output norm.
        backend: ``auto``, or an implementation that all its operators have (see ``seqzoo layers``).

    Raises:
        ValueError: a size is below 1, heads cannot be shared evenly, or ``dim`` is too small for ``num_heads``.
    """

    state_formula = "heads·key_dim·value_dim + (conv_size-1)·((1+steps)·key_heads·key_dim+steps·heads·value_dim)"
    operators = ("gated_delta_product", "short_conv")

    def __init__(
        self,
        dim: int,
        *,
        steps: int = 2,
        num_heads: int = 4,
        num_key_heads: int | None = None,
        key_dim: int | None = None,
        value_dim: int | None = None,
        conv_size: int | None = 4,
        negative_eigenvalues: bool = True,
        use_decay: bool = True,
        use_gate: bool = True,
        norm_eps: float = 1e-5,
        backend: str = "auto",
    ) -> None:
        super().__init__(dim)
        if steps < 1:
            raise ValueError(f"steps={steps}: a token writes at least 1 time")
        self.qkv = QueryKeyValue(
            dim,
            num_heads=num_heads,
            num_key_heads=num_key_heads,
            key_dim=key_dim,
            value_dim=value_dim,
            conv_size=conv_size,
            steps=steps,
            key_share=0.75,
            value_share=2,
            backend=backend,
        )
        width = num_heads * self.qkv.value_dim
        self.steps, self.strongest, self.backend = steps, 2 if negative_eigenvalues else 1, backend
        self.step = nn.Linear(dim, num_heads, bias=False) if use_decay else None
        self.decay = SoftplusDecay(num_heads, rate_range=(0.01, 16.0)) if use_decay else None
        self.write = nn.Linear(dim, steps * num_heads, bias=False)
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
        log_decay = None
        if self.decay is not None and self.step is not None:
            _, log_decay = self.decay(self.step(x))
        beta = self.strongest * rearrange(self.write(x).sigmoid(), "b t (n h) -> b t n h", n=self.steps)
        y, memory = gated_delta_product(q, k, v, log_decay, beta, state and state.memory, starts, backend=self.backend)
        y = self.norm(rearrange(y, "b t h d -> b t (h d)"), None if self.gate is None else self.gate(x))
        return self.out(y), DeltaRuleState(memory, conv)

    def state_bytes(self, length: int, *, dtype: torch.dtype = torch.float32) -> int:
        return self.qkv.state_bytes(dtype)
