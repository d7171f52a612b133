"""The equation in C++ (native.cpp), for the CPU: one pass over memory forward, one backward that computes it again."""

from __future__ import annotations

import ctypes

import torch

from seqzoo.kernels.native.tensors import DTYPES, Function, array_of, dense, dense_rows, fresh
from seqzoo.kernels.torch_operators import define, differentiable

_forward = Function("short_conv_forward")
_backward = Function("short_conv_backward")
# Below this many outputs waking a second thread costs more than it saves.
SMALL = 1 << 15


def short_conv(x, weight, bias, state, starts, activation):
    y, last = FORWARD(*_operands(x, weight, bias, state), starts, activation == "silu")
    return (y, last) if y.dtype == x.dtype else (y.to(x.dtype), last.to(x.dtype))


def split_short_conv(x, weight, bias, state, starts, activation, widths):
    if x.shape[1] == 1:  # a list of results costs more than views, which are dense here, or small
        y, last = short_conv(x, weight, bias, state, starts, activation)
        return y.split(widths, -1), last
    *parts, last = SPLIT_FORWARD(*_operands(x, weight, bias, state), starts, widths, activation == "silu")
    return tuple(y.to(x.dtype) for y in parts), last.to(x.dtype)


def _operands(x, weight, bias, state):
    """In dtypes that C++ takes."""
    if x.dtype == torch.float16:
        x = x.float()
    weight, bias = (z.float() if z is not None and z.dtype == torch.float16 else z for z in (weight, bias))
    return x, weight, bias, state.to(x.dtype) if state is not None and state.dtype != x.dtype else state


def _run(x, weight, bias, state, starts, silu):
    y, last = results = _fake(x, weight, bias, state, starts, silu)
    fresh(y)
    _convolve(x, weight, bias, state, starts, (y, None, 1, last), silu)
    return results


def _run_split(x, weight, bias, state, starts, widths, silu):
    *parts, last = results = _fake_split(x, weight, bias, state, starts, widths, silu)
    fresh(*parts)
    _convolve(x, weight, bias, state, starts, (*_cut(parts, widths), last), silu)
    return results


def _fake(x, weight, bias, state, starts, silu):
    (batch, time, channels), size = x.shape, weight.shape[1]
    return x.new_empty(batch, time, channels), x.new_empty(batch, size - 1, channels)


def _fake_split(x, weight, bias, state, starts, widths, silu):
    last = x.new_empty(x.shape[0], weight.shape[1] - 1, x.shape[2])
    return [*(x.new_empty(*x.shape[:2], width) for width in widths), last]


def _run_backward(y_grad, last_grad, x, weight, bias, state, starts, silu):
    y_grad, last_grad = dense(y_grad, last_grad)
    return _gradients((y_grad, None, 1, last_grad), x, weight, bias, state, starts, silu)


def _run_split_backward(grads, x, weight, bias, state, starts, widths, silu):
    *parts, last_grad = dense(*grads)
    return _gradients((*_cut(parts, widths), last_grad), x, weight, bias, state, starts, silu)


def _cut(parts, widths):
    """Tensors that hold the channels one after the other, as C++ takes them."""
    return array_of(parts), (ctypes.c_int64 * len(widths))(*widths), len(widths)


def _convolve(x, weight, bias, state, starts, results, silu):
    if x.numel():
        inputs = *dense_rows(x), *dense(weight, bias, state, starts)
        _forward(*_settings(x, weight, bias), *inputs, *results, *x.shape, weight.shape[1], silu)


def _gradients(of_results, x, weight, bias, state, starts, silu):
    gradients = [None if z is None else z.new_empty(z.shape) for z in (x, weight, bias, state)]
    if not x.numel():
        return [None if z is None else z.zero_() for z in gradients]
    fresh(gradients[0])
    inputs = *of_results, *dense_rows(x), *dense(weight, bias, state, starts)
    _backward(*_settings(x, weight, bias), *inputs, *gradients, *x.shape, weight.shape[1], silu)
    return gradients


def _settings(x, weight, bias):
    """What both functions take first: threads, and the codes of the dtypes."""
    threads = torch.get_num_threads() if x.numel() > SMALL else 1
    return threads, DTYPES[x.dtype], DTYPES[weight.dtype], DTYPES[weight.dtype if bias is None else bias.dtype]


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
SPLIT_FORWARD = define(
    "split_short_conv_native(Tensor x, Tensor weight, Tensor? bias, Tensor? state, Tensor? starts, int[] widths,"
    " bool silu) -> (Tensor[] results)",
    _run_split,
    _fake_split,
    device="CPU",
)
differentiable(
    SPLIT_FORWARD,
    "results_grad, x, weight, bias, state, starts, widths, silu -> x, weight, bias, state",
    _run_split_backward,
    device="CPU",
)
