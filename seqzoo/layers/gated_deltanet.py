"""Gated DeltaNet: an erasable, decaying key-value memory (Yang et al. 2024, https://arxiv.org/abs/2412.06464).

Left out: negative eigenvalues and more value heads than key heads. The decay rate starts in (0.01, 16), not (0, 16),
whose lower end is a logarithm of zero.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Bool, Float
from torch import Tensor, nn

from seqzoo.kernels.gated_delta_rule import gated_delta_rule
from seqzoo.mixer import Mixer
from seqzoo.parts.decay import SoftplusDecay
from seqzoo.parts.norm import GroupRMSNorm, l2_normalize
from seqzoo.parts.short_conv import CausalConv


class GatedDeltaNetState(NamedTuple):
    """What a sequence leaves behind: the memory (float32 or better), and the convolution's last inputs."""

    memory: Float[Tensor, "batch head key value"]
    conv: Float[Tensor, "batch size_minus_one channel"]


class GatedDeltaNet(Mixer):
    """Linear-time memory that overwrites the value stored at a key, and forgets by a gate.

        q, k = l2(silu(conv(W x))),  v = silu(conv(W x)),  beta = sigmoid(W x),  g = -exp(A_log) softplus(W x + dt_bias)
        S_t = e^g S_{t-1} + beta k (v - e^g S_{t-1}^T k)^T,   y = W_out(rmsnorm(S_t^T q / sqrt(key)) * silu(W x))

    Args:
        dim: width of the input and output.
        num_heads: memories kept side by side; each is ``key_dim`` by ``value_dim``.
        key_dim: size of a key; None for three quarters of ``dim / num_heads``.
        value_dim: size of a value; None for ``2 * key_dim``.
        conv_size: taps of the short convolution on queries, keys and values.
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
        conv_size: int = 4,
        use_gate: bool = True,
        norm_eps: float = 1e-5,
        backend: str = "auto",
    ) -> None:
        super().__init__()
        if num_heads < 1:
            raise ValueError(f"num_heads={num_heads}: a layer needs at least 1 head")
        key_dim = 3 * dim // (4 * num_heads) if key_dim is None else key_dim
        value_dim = 2 * key_dim if value_dim is None else value_dim
        if key_dim < 1 or value_dim < 1:
            raise ValueError(
                f"key_dim={key_dim}, value_dim={value_dim}: both are at least 1 (dim={dim} with num_heads={num_heads}; "
                "their default is three quarters of dim/num_heads, and twice that)"
            )
        self.num_heads, self.key_dim, self.value_dim, self.backend = num_heads, key_dim, value_dim, backend
        self.widths = [num_heads * key_dim, num_heads * key_dim, num_heads * value_dim]
        self.qkv = nn.Linear(dim, sum(self.widths), bias=False)
        self.conv = CausalConv(sum(self.widths), conv_size, activation="silu", backend=backend)
        self.step = nn.Linear(dim, num_heads, bias=False)
        self.decay = SoftplusDecay(num_heads, rate_range=(0.01, 16.0))
        self.write = nn.Linear(dim, num_heads, bias=False)
        self.norm = GroupRMSNorm(value_dim, eps=norm_eps)
        self.gate = nn.Linear(dim, num_heads * value_dim, bias=False) if use_gate else None
        self.out = nn.Linear(num_heads * value_dim, dim, bias=False)

    def forward(
        self,
        x: Float[Tensor, "batch time dim"],
        state: GatedDeltaNetState | None = None,
        starts: Bool[Tensor, "batch time"] | None = None,
    ) -> tuple[Float[Tensor, "batch time dim"], GatedDeltaNetState]:
        qkv, conv = self.conv(self.qkv(x), state and state.conv, starts)
        q, k, v = (rearrange(z, "b t (h d) -> b t h d", h=self.num_heads) for z in qkv.split(self.widths, -1))
        q, k = l2_normalize(q) * self.key_dim**-0.5, l2_normalize(k)
        _, log_decay = self.decay(self.step(x))
        y, memory = gated_delta_rule(
            q, k, v, log_decay, self.write(x).sigmoid(), state and state.memory, starts, backend=self.backend
        )
        y = rearrange(self.norm(y), "b t h d -> b t (h d)")
        if self.gate is not None:
            y = y * F.silu(self.gate(x))
        return self.out(y), GatedDeltaNetState(memory, conv)

    def state_bytes(self, length: int, *, dtype: torch.dtype = torch.float32) -> int:
        wide = torch.promote_types(dtype, torch.float32)
        return self.num_heads * self.key_dim * self.value_dim * wide.itemsize + self.conv.state_bytes(dtype)
