"""Causal depthwise convolution over the last few tokens, with its state.

    y_t = act(bias + sum_j weight_{size-1-j} * x_{t-j}),   j = 0 .. size-1,   x before a document's start is 0

``weight`` has PyTorch's ``Conv1d`` order: its last column meets the current token.
"""

from __future__ import annotations

from typing import Literal

from jaxtyping import Bool, Float
from torch import Tensor

from seqzoo.kernels.backends import check_kind, check_numbers, check_shape, dispatch, explained
from seqzoo.kernels.short_conv import causal_conv1d_adapter, chunked, fla_adapter, native, reference, triton_op

IMPLEMENTATIONS = {
    "reference": reference.short_conv,
    "chunked": chunked.short_conv,
    "native": native.short_conv,
    "triton": triton_op.short_conv,
    "fla": fla_adapter.short_conv,
    "causal_conv1d": causal_conv1d_adapter.short_conv,
}
explain = explained("short_conv", IMPLEMENTATIONS)


def short_conv(
    x: Float[Tensor, "batch time channel"],
    weight: Float[Tensor, "channel size"],
    bias: Float[Tensor, " channel"] | None = None,
    state: Float[Tensor, "batch size_minus_one channel"] | None = None,
    starts: Bool[Tensor, "batch time"] | None = None,
    *,
    activation: Literal["silu"] | None = None,
    backend: str = "auto",
) -> tuple[Float[Tensor, "batch time channel"], Float[Tensor, "batch size_minus_one channel"]]:
    """Convolve each channel with its own short causal filter.

    Args:
        x: inputs.
        weight: one filter a channel, oldest tap first; ``size >= 1``.
        bias: added before the activation.
        state: the last ``size - 1`` inputs of the open document, oldest first, zeros before its start; None is a start.
        starts: True where a new document begins.
        activation: applied last.
        backend: ``auto`` or a name in ``IMPLEMENTATIONS``.

    Returns:
        The outputs in the dtype of ``x``, and the new state.

    Raises:
        ValueError: shapes do not fit together, or ``activation`` or ``backend`` cannot serve.
    """
    check_numbers("short_conv", starts, {"bias": bias, "state": state}, x=x, weight=weight)
    if x.ndim != 3 or weight.ndim != 2 or weight.shape[0] != x.shape[2] or weight.shape[1] < 1:
        raise ValueError(
            f"short_conv: x {tuple(x.shape)}, weight {tuple(weight.shape)} do not fit together; expected "
            "[batch, time, channel] and [channel, size] with size at least 1"
        )
    if activation not in (None, "silu"):
        raise ValueError(f"short_conv: activation={activation!r}; use silu or None")
    batch, time, channels = x.shape
    check_shape("short_conv", "bias", bias, (channels,))
    check_shape("short_conv", "state", state, (batch, weight.shape[1] - 1, channels))
    check_shape("short_conv", "starts", starts, (batch, time))
    check_kind("short_conv", "x", x)
    return dispatch("short_conv", IMPLEMENTATIONS, backend, x, x, weight, bias, state, starts, activation)
