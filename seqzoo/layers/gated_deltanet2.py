"""Gated DeltaNet-2: an erasable memory that erases and writes channel by channel (Hatamizadeh et al. 2026, https://arxiv.org/abs/2605.22791).

The two published codes gate the output differently, NVIDIA's by SiLU and fla's by a sigmoid: hence a setting. Left out:
more heads of values than of keys, and biases of the convolution.
"""

from __future__ import annotations

from typing import Literal

import torch
from einops import rearrange
from jaxtyping import Bool, Float
from torch import Tensor, nn

from seqzoo.kernels.dplr_delta_rule import dplr_delta_rule
from seqzoo.mixer import Mixer
from seqzoo.parts.decay import ChannelDecay
from seqzoo.parts.delta_rule import DeltaRuleState, QueryKeyValue
from seqzoo.parts.glorot import draw_shrunk
from seqzoo.parts.low_rank import LowRank
from seqzoo.parts.norm import GroupRMSNorm

ACTIVATIONS = ("silu", "sigmoid")


class GatedDeltaNet2(Mixer):
    """Linear-time memory that erases by a gate on its key channels and writes by a gate on its value channels.

        q, k = l2(silu(conv(W x))),  v = silu(conv(W x)),  b = sigmoid(W x),  w = sigmoid(W x)
        g = -exp(A_log) softplus(W' W x + dt_bias),  R = diag(e^g) S_{t-1}
        S_t = R + k (w * v - R^T (b * k))^T,   y = W_out(rmsnorm(S_t^T q / sqrt(key)) * silu(W' W x + bias))

    Args:
        dim: width of the input and output.
        num_heads: memories kept side by side; each is ``key_dim`` by ``value_dim``.
        key_dim: size of a key; None for ``dim / num_heads``.
        value_dim: size of a value, and the rank of the decay and the output gate; None for ``key_dim``.
        conv_size: taps of the short convolution on queries, keys and values; None for none.
        negative_eigenvalues: b is doubled, so that erasing may also flip what is stored.
        gate: the output gate's activation, ``silu`` or ``sigmoid``.
        norm_eps: added to the mean square in the output norm.
        backend: ``auto``, or an implementation that all its operators have (see ``seqzoo layers``).

    Raises:
        ValueError: a size is below 1, ``dim`` is too small for ``num_heads``, or ``gate`` is neither of the two.
    """

    state_formula = "heads·key_dim·value_dim + (conv_size-1)·heads·(2·key_dim+value_dim)"
    operators = ("dplr_delta_rule", "short_conv")

    def __init__(
        self,
        dim: int,
        *,
        num_heads: int = 4,
        key_dim: int | None = None,
        value_dim: int | None = None,
        conv_size: int | None = 4,
        negative_eigenvalues: bool = False,
        gate: Literal["silu", "sigmoid"] = "silu",
        norm_eps: float = 1e-5,
        backend: str = "auto",
    ) -> None:
        super().__init__(dim)
        if gate not in ACTIVATIONS:
            raise ValueError(f"gate={gate!r}: use {' or '.join(map(repr, ACTIVATIONS))}")
        self.qkv = QueryKeyValue(
            dim, num_heads=num_heads, key_dim=key_dim, value_dim=value_dim, conv_size=conv_size, backend=backend
        )
        keys, rank, values = num_heads * self.qkv.key_dim, self.qkv.value_dim, num_heads * self.qkv.value_dim
        self.strongest, self.backend = 2 if negative_eigenvalues else 1, backend
        self.step = LowRank(dim, rank, keys)
        self.decay = ChannelDecay(num_heads, self.qkv.key_dim)
        self.erase = nn.Linear(dim, keys, bias=False)
        self.write = nn.Linear(dim, values, bias=False)
        self.norm = GroupRMSNorm(self.qkv.value_dim, eps=norm_eps, activation=gate, backend=backend)
        self.gate = LowRank(dim, rank, values, bias=True)
        self.out = nn.Linear(values, dim, bias=False)
        self._draw()

    @torch.no_grad()
    def _draw(self) -> None:
        step, gate = self.step, self.gate
        draw_shrunk(*self.qkv.projection.weight.split(self.qkv.widths))
        for linear in (step.down, step.up, self.erase, self.write, gate.down, gate.up, self.out):
            draw_shrunk(linear.weight)
        nn.init.zeros_(gate.up.bias)

    def reset_parameters(self) -> None:
        super().reset_parameters()
        self._draw()

    def forward(
        self,
        x: Float[Tensor, "batch time dim"],
        state: DeltaRuleState | None = None,
        starts: Bool[Tensor, "batch time"] | None = None,
    ) -> tuple[Float[Tensor, "batch time dim"], DeltaRuleState]:
        q, k, v, conv = self.qkv(x, state and state.conv, starts)
        log_decay = self.decay(self.step(x))
        erase, write = (
            rearrange(gate(x).sigmoid(), "b t (h d) -> b t h d", h=k.shape[2]) for gate in (self.erase, self.write)
        )
        # The operator reads the memory before it decays: so what reads it decays instead.
        read = (self.strongest * log_decay.exp() * erase * k).to(k.dtype)
        y, memory = dplr_delta_rule(
            q, k, write * v, read, -k, log_decay, state and state.memory, starts, backend=self.backend
        )
        y = self.norm(rearrange(y, "b t h d -> b t (h d)"), self.gate(x))
        return self.out(y), DeltaRuleState(memory, conv)

    def state_bytes(self, length: int, *, dtype: torch.dtype = torch.float32) -> int:
        return self.qkv.state_bytes(dtype)
