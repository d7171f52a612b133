"""What the layers of the delta rule share: queries, keys and values from one projection, and the state they leave."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor, nn

from seqzoo.kernels.backends import check_shape
from seqzoo.parts.heads import head_size
from seqzoo.parts.norm import l2_normalize
from seqzoo.parts.short_conv import SplitCausalConv


class DeltaRuleState(NamedTuple):
    """What a sequence leaves behind: the memory (float32 or better), and the convolution's last inputs."""

    memory: Float[Tensor, "batch head key value"]
    conv: Float[Tensor, "batch size_minus_one channel"]


class QueryKeyValue(nn.Module):
    """``q, k = l2(silu(conv(W x))), v = silu(conv(W x))`` in heads, with q divided by the root of ``key_dim`` or not.

    Args:
        dim: width of the input.
        num_heads: heads of the values.
        num_key_heads: heads of queries and keys, which must divide ``num_heads``; None for as many.
        key_dim: size of a key; None for ``key_share * dim / num_heads`` rounded down.
        value_dim: size of a value; None for ``value_share * key_dim``.
        conv_size: taps of the short convolution; None for none.
        steps: keys and values are made this many times a token, along an axis of their own; None for once.
        key_share: the width of all keys, as a share of ``dim``, where ``key_dim`` is None.
        value_share: the size of a value, as a multiple of ``key_dim``, where ``value_dim`` is None.
        scaled: whether queries are divided by the root of ``key_dim``, or of length one as keys are.
        backend: the layer's.

    Raises:
        ValueError: a size is below 1, ``num_key_heads`` does not fit, or ``dim`` is too small for ``num_heads``.
    """

    def __init__(
        self,
        dim: int,
        *,
        num_heads: int,
        key_dim: int | None,
        value_dim: int | None,
        conv_size: int | None,
        num_key_heads: int | None = None,
        steps: int | None = None,
        key_share: float = 1.0,
        value_share: int = 1,
        scaled: bool = True,
        backend: str = "auto",
    ) -> None:
        super().__init__()
        key_dim = head_size("key_dim", key_dim, dim=dim, num_heads=num_heads, share=key_share)
        value_dim = value_share * key_dim if value_dim is None else value_dim
        value_dim = head_size("value_dim", value_dim, dim=dim, num_heads=num_heads)
        num_key_heads = num_heads if num_key_heads is None else num_key_heads
        if num_key_heads < 1 or num_heads % num_key_heads:
            raise ValueError(f"num_key_heads={num_key_heads} does not divide num_heads={num_heads}")
        self.num_heads, self.key_dim, self.value_dim, self.steps = num_heads, key_dim, value_dim, steps
        self.num_key_heads, self.backend = num_key_heads, backend
        self.scale = key_dim**-0.5 if scaled else 1.0
        keys, values = num_key_heads * key_dim, num_heads * value_dim
        self.widths = [keys, (steps or 1) * keys, (steps or 1) * values]
        self.projection = nn.Linear(dim, sum(self.widths), bias=False)
        if conv_size is None:
            self.conv = None
        else:
            self.conv = SplitCausalConv(self.widths, conv_size, activation="silu", backend=backend)

    def forward(
        self,
        x: Float[Tensor, "batch time dim"],
        state: Float[Tensor, "batch size_minus_one channel"] | None = None,
        starts: Bool[Tensor, "batch time"] | None = None,
    ) -> tuple[
        Float[Tensor, "batch time key_head key"],
        Float[Tensor, "batch time *steps key_head key"],
        Float[Tensor, "batch time *steps head value"],
        Float[Tensor, "batch size_minus_one channel"],
    ]:
        """Queries, keys, values and the convolution's state."""
        mixed = self.projection(x)
        if self.conv is None:
            check_shape("conv_size=None", "state.conv", state, (len(x), 0, mixed.shape[2]))
            (q, k, v), last = F.silu(mixed).split(self.widths, -1), mixed[:, :0].clone()
        else:
            (q, k, v), last = self.conv(mixed, state, starts)
        steps = () if self.steps is None else (self.steps,)
        q, k = q.unflatten(-1, (-1, self.key_dim)), k.unflatten(-1, (*steps, -1, self.key_dim))
        v = v.unflatten(-1, (*steps, -1, self.value_dim))
        q = l2_normalize(q, scale=self.scale, backend=self.backend)
        return q, l2_normalize(k, backend=self.backend), v, last

    def state_bytes(self, dtype: torch.dtype) -> int:
        """Bytes of one sequence's ``DeltaRuleState``: a memory for each head, and the convolution's."""
        memory = self.num_heads * self.key_dim * self.value_dim * torch.promote_types(dtype, torch.float32).itemsize
        return memory + (0 if self.conv is None else self.conv.state_bytes(dtype))
