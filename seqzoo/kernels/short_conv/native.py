"""The equation in C++ (native.cpp), for the CPU: one pass over memory forward, one backward that computes it again."""

from __future__ import annotations

import torch

from seqzoo.kernels.native.tensors import DTYPES, Function, dense, fresh
from seqzoo.kernels.torch_operators import define, differentiable

_forward = Function("short_conv_forward")
_backward = Function("short_conv_backward")
# Below this many outputs waking a second thread costs more than it saves.
SMALL = 1 << 15


def short_conv(x, weight, bias, state, starts, activation):
    dtype = x.dtype
    if dtype == torch.float16:
        x = x.float()
    weight, bias = (z.float() if z is not None and z.dtype == torch.float16 else z for z in (weight, bias))
    if state is not None and state.dtype != x.dtype:
        state = state.to(x.dtype)
    y, last = FORWARD(x, weight, bias, state, starts, activation == "silu")
    return (y, last) if y.dtype == dtype else (y.to(dtype), last.to(dtype))


def _settings(x, weight, bias):
    """What both functions take first: threads, and the codes of the dtypes."""
    threads = torch.get_num_threads() if x.numel() > SMALL else 1
    return threads, DTYPES[x.dtype], DTYPES[weight.dtype], DTYPES[weight.dtype if bias is None else bias.dtype]


def _run(x, weight, bias, state, starts, silu):
    x, weight, bias, state, starts = dense(x, weight, bias, state, starts)
    (batch, time, channels), size = x.shape, weight.shape[1]
    y, last = torch.empty_like(x), x.new_empty(batch, size - 1, channels)
    fresh(y)
    sizes = batch, time, channels, size
    if x.numel():
        _forward(*_settings(x, weight, bias), x, weight, bias, state, starts, y, last, *sizes, silu)
    return y, last


def _fake(x, weight, bias, state, starts, silu):
    return x.new_empty(x.shape), x.new_empty(x.shape[0], weight.shape[1] - 1, x.shape[2])


def _run_backward(y_grad, last_grad, x, weight, bias, state, starts, silu):
    inputs = dense(y_grad, last_grad, x, weight, bias, state, starts)
    _, _, x, weight, bias, state, _ = inputs
    gradients = [None if z is None else torch.empty_like(z) for z in (x, weight, bias, state)]
    fresh(gradients[0])
    sizes = *x.shape, weight.shape[1]
    if x.numel():
        _backward(*_settings(x, weight, bias), *inputs, *gradients, *sizes, silu)
    else:
        gradients = [None if z is None else z.zero_() for z in gradients]
    return gradients


FORWARD = define(
    "short_conv_native(Tensor x, Tensor weight, Tensor? bias, Tensor? state, Tensor? starts, bool silu)"
    " -> (Tensor y, Tensor last)",
    _run,
    _fake,
    device="CPU",
)
differentiable(
    FORWARD,
    "y_grad, last_grad, x, weight, bias, state, starts, silu -> x, weight, bias, state",
    _run_backward,
    device="CPU",
)
