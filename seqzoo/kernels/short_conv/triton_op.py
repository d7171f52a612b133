"""The Triton kernels as ops of torch: one for the forward, one for the backward."""

from __future__ import annotations

from seqzoo.kernels.torch_operators import define, differentiable
from seqzoo.kernels.triton_support import DEVICES, launcher


def _fake(x, weight, bias, state, starts, silu):
    return x.new_empty(x.shape), x.new_empty(x.shape[0], weight.shape[1] - 1, x.shape[2])


_FORWARD = define(
    "short_conv_triton(Tensor x, Tensor weight, Tensor? bias, Tensor? state, Tensor? starts, bool silu)"
    " -> (Tensor y, Tensor last)",
    launcher("short_conv", "forward"),
    _fake,
    device=DEVICES,
)
differentiable(
    _FORWARD,
    "y_grad, last_grad, x, weight, bias, state, starts, silu -> x, weight, bias, state",
    launcher("short_conv", "backward"),
    device=DEVICES,
)


def short_conv(x, weight, bias, state, starts, activation):
    return _FORWARD(x, weight, bias, state, starts, activation == "silu")
