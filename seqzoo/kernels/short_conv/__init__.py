"""Causal depthwise convolution over the last few tokens, with its state.

    y_t = act(bias + sum_j weight_{size-1-j} * x_{t-j}),   j = 0 .. size-1,   x before a document's start is 0

``weight`` has PyTorch's ``Conv1d`` order: its last column meets the current token.

``split_short_conv`` gives the same in several tensors of some channels each, as layers want it that convolve queries,
keys and values at once. Channels know nothing of each other: so no gradients are put together before they are read.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal

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


def _cut_after(run: Callable[..., tuple[Tensor, Tensor]]) -> Callable[..., tuple[tuple[Tensor, ...], Tensor]]:
    """``run`` with its output cut into views."""

    def cut(*inputs: Any) -> tuple[tuple[Tensor, ...], Tensor]:
        *given, widths = inputs
        y, last = run(*given)
        return y.split(widths, -1), last

    return cut


SPLIT_IMPLEMENTATIONS = {name: _cut_after(run) for name, run in IMPLEMENTATIONS.items()}
SPLIT_IMPLEMENTATIONS["native"] = native.split_short_conv


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
    _check(x, weight, bias, state, starts, activation)
    return dispatch("short_conv", IMPLEMENTATIONS, backend, x, x, weight, bias, state, starts, activation)


def split_short_conv(
    x: Float[Tensor, "batch time channel"],
    widths: Sequence[int],
    weight: Float[Tensor, "channel size"],
    bias: Float[Tensor, " channel"] | None = None,
    state: Float[Tensor, "batch size_minus_one channel"] | None = None,
    starts: Bool[Tensor, "batch time"] | None = None,
    *,
    activation: Literal["silu"] | None = None,
    backend: str = "auto",
) -> tuple[tuple[Float[Tensor, "batch time _"], ...], Float[Tensor, "batch size_minus_one channel"]]:
    """``short_conv`` with its outputs cut into tensors of ``widths`` channels; all other arguments are the same.

    Args:
        widths: channels of each tensor, at least 1, together those of ``x``.
        backend: ``auto`` or a name in ``IMPLEMENTATIONS``: ``native`` writes dense tensors, all others cut one.

    Returns:
        The outputs in the dtype of ``x``, and the new state of all channels.

    Raises:
        ValueError: shapes or ``widths`` do not fit together, or ``activation`` or ``backend`` cannot serve.
    """
    _check(x, weight, bias, state, starts, activation)
    widths = list(widths)
    if sum(widths) != x.shape[2] or min(widths, default=0) < 1:
        raise ValueError(
            f"short_conv: widths={widths} do not cut {x.shape[2]} channels; expected numbers of 1 or more with that sum"
        )
    inputs = x, weight, bias, state, starts, activation, widths
    return dispatch("short_conv", SPLIT_IMPLEMENTATIONS, backend, x, *inputs)


def _check(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    state: Tensor | None,
    starts: Tensor | None,
    activation: str | None,
) -> None:
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
