"""The short causal convolution as a module: the local mixing in front of most recurrent layers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from seqzoo.kernels.short_conv import short_conv, split_short_conv


class CausalConv(nn.Module):
    """A learned short filter for each channel; parameters start as ``nn.Conv1d`` starts them.

    Args:
        channels: number of channels.
        size: taps of each filter, at least 1; the state holds ``size - 1`` inputs.
        bias: whether a constant is learned for each channel.
        activation: applied last.
        backend: passed to the operator.

    Raises:
        ValueError: ``size`` is below 1.
    """

    def __init__(
        self,
        channels: int,
        size: int,
        *,
        bias: bool = False,
        activation: Literal["silu"] | None = None,
        backend: str = "auto",
    ) -> None:
        super().__init__()
        if size < 1:
            raise ValueError(f"conv_size={size}: a filter needs at least 1 tap")
        self.activation: Literal["silu"] | None = activation
        self.backend = backend
        self.weight = nn.Parameter(torch.empty(channels, size))
        self.bias = nn.Parameter(torch.empty(channels)) if bias else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        bound = self.weight.shape[1] ** -0.5
        for parameter in self.parameters():
            nn.init.uniform_(parameter, -bound, bound)

    def forward(
        self,
        x: Float[Tensor, "batch time channel"],
        state: Float[Tensor, "batch size_minus_one channel"] | None = None,
        starts: Bool[Tensor, "batch time"] | None = None,
    ) -> tuple[Float[Tensor, "batch time channel"], Float[Tensor, "batch size_minus_one channel"]]:
        return short_conv(x, self.weight, self.bias, state, starts, activation=self.activation, backend=self.backend)

    def state_bytes(self, dtype: torch.dtype) -> int:
        """Bytes of one sequence's state."""
        return (self.weight.shape[1] - 1) * self.weight.shape[0] * dtype.itemsize


class SplitCausalConv(CausalConv):
    """A ``CausalConv`` whose output comes in several tensors, one for each that reads some of the channels.

    Args:
        widths: channels of each tensor, at least 1. All else is as in ``CausalConv``.

    Raises:
        ValueError: ``size`` is below 1.
    """

    def __init__(
        self,
        widths: Sequence[int],
        size: int,
        *,
        bias: bool = False,
        activation: Literal["silu"] | None = None,
        backend: str = "auto",
    ) -> None:
        super().__init__(sum(widths), size, bias=bias, activation=activation, backend=backend)
        self.widths = tuple(widths)

    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        self,
        x: Float[Tensor, "batch time channel"],
        state: Float[Tensor, "batch size_minus_one channel"] | None = None,
        starts: Bool[Tensor, "batch time"] | None = None,
    ) -> tuple[tuple[Float[Tensor, "batch time _"], ...], Float[Tensor, "batch size_minus_one channel"]]:
        inputs = x, self.widths, self.weight, self.bias, state, starts
        return split_short_conv(*inputs, activation=self.activation, backend=self.backend)
