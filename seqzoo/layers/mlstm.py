"""mLSTM: xLSTM's matrix memory with exponential input gates and a normalizer (Beck et al. 2024, https://arxiv.org/abs/2405.04517).

The layer as xLSTM-7B has it (https://arxiv.org/abs/2503.13427). Left out: the older block around it, with a convolution
and block-diagonal projections. The official code adds 1e-6 to the denominator, on which outputs then depend.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Bool, Float
from torch import Tensor, nn

from seqzoo.kernels.mlstm import MLSTMState, mlstm
from seqzoo.mixer import Mixer
from seqzoo.parts.heads import head_size
from seqzoo.parts.norm import GroupLayerNorm
from seqzoo.parts.settings import check_positive

INPUT_BIAS = -10.0
FORGET_BIAS = (3.0, 6.0)


class MLSTM(Mixer):
    """Linear-time memory whose input gates are exponential: a later token can outweigh all before it.

        i = exp(cap(W_i x + b_i)),  f = sigmoid(cap(W_f x + b_f)),  cap(z) = c tanh(z / c)
        C_t = f C_{t-1} + i k v^T,  n_t = f n_{t-1} + i k,  h_t = C_t^T q / max(|n_t . q|, 1),  q = W_q x / sqrt(key)
        y = W_out(sigmoid(W_o x) * layernorm(h))

    Args:
        dim: width of the input and output.
        num_heads: memories kept side by side; each is ``key_dim`` by ``value_dim``.
        key_dim: size of a key; None for half of ``dim / num_heads``.
        value_dim: size of a value; None for ``dim / num_heads``.
        gate_soft_cap: c, positive.
        norm_eps: added to the variance in each head's norm.
        backend: ``auto``, or an implementation that all its operators have (see ``seqzoo layers``).

    Raises:
        ValueError: a size is below 1, or ``gate_soft_cap`` is not positive.
    """

    state_formula = "heads·(key_dim·value_dim + key_dim + 1)"
    operators = ("mlstm",)

    def __init__(
        self,
        dim: int,
        *,
        num_heads: int = 4,
        key_dim: int | None = None,
        value_dim: int | None = None,
        gate_soft_cap: float = 15.0,
        norm_eps: float = 1e-6,
        backend: str = "auto",
    ) -> None:
        super().__init__(dim)
        key_dim = head_size("key_dim", key_dim, dim=dim, num_heads=num_heads, share=0.5)
        value_dim = head_size("value_dim", value_dim, dim=dim, num_heads=num_heads)
        check_positive("gate_soft_cap", gate_soft_cap)
        self.num_heads, self.key_dim, self.value_dim, self.backend = num_heads, key_dim, value_dim, backend
        self.gate_soft_cap = gate_soft_cap
        keys, values = num_heads * key_dim, num_heads * value_dim
        self.widths = [keys, keys, values, values]
        self.projection = nn.Linear(dim, sum(self.widths), bias=False)
        self.gates = nn.Linear(dim, 2 * num_heads)
        self.norm = GroupLayerNorm(values, groups=num_heads, eps=norm_eps, activation="sigmoid", backend=backend)
        self.out = nn.Linear(values, dim, bias=False)
        self._draw()

    @torch.no_grad()
    def _draw(self) -> None:
        nn.init.normal_(self.projection.weight, std=(2 / (5 * self.projection.in_features)) ** 0.5)
        nn.init.zeros_(self.gates.weight)
        of_input, of_forget = self.gates.bias.split(self.num_heads)
        of_input.fill_(INPUT_BIAS)
        of_forget.copy_(torch.linspace(*FORGET_BIAS, self.num_heads))

    def reset_parameters(self) -> None:
        super().reset_parameters()
        self._draw()

    def forward(
        self,
        x: Float[Tensor, "batch time dim"],
        state: MLSTMState | None = None,
        starts: Bool[Tensor, "batch time"] | None = None,
    ) -> tuple[Float[Tensor, "batch time dim"], MLSTMState]:
        *qkv, o = self.projection(x).split(self.widths, -1)
        q, k, v = (rearrange(z, "b t (h d) -> b t h d", h=self.num_heads) for z in qkv)
        gates = self.gates(x).to(torch.promote_types(x.dtype, torch.float32))
        input_gate, forget = (self.gate_soft_cap * (gates / self.gate_soft_cap).tanh()).chunk(2, -1)
        q, log_forget = q * self.key_dim**-0.5, F.logsigmoid(forget)
        h, state = mlstm(q, k, v, input_gate, log_forget, state, starts, backend=self.backend)
        return self.out(self.norm(rearrange(h, "b t h d -> b t (h d)"), o)), state

    def state_bytes(self, length: int, *, dtype: torch.dtype = torch.float32) -> int:
        wide = torch.promote_types(dtype, torch.float32)
        return self.num_heads * (self.key_dim * self.value_dim + self.key_dim + 1) * wide.itemsize
