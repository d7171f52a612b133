"""The CPU kernels of native.cpp as operators of torch."""

from __future__ import annotations

import torch

from seqzoo.kernels.backends import accumulation_dtype
from seqzoo.kernels.native.tensors import DTYPES, Function, dense, fresh
from seqzoo.kernels.torch_operators import define, differentiable

_entry = Function("attention_forward")
_backward_entry = Function("attention_backward")


def attention(q, k, v, decay, sink, first, cutoff, window, sinks, soft_cap, scale):
    dtype = torch.float32 if v.dtype == torch.float16 else v.dtype
    wide = accumulation_dtype(v)
    decay, cutoff = (x if x is None else x.double() for x in (decay, cutoff))
    sink = None if sink is None else sink.to(wide)
    settings = k.shape[1] if window is None else window, sinks, float(soft_cap or 0), float(scale)
    o, _ = _FORWARD(q.to(dtype), k.to(dtype), v.to(dtype), decay, sink, first, cutoff, *settings)
    return o.to(v.dtype)


def _sizes(q, k, v):
    return *q.shape[:2], k.shape[1], q.shape[2], k.shape[2], q.shape[3], v.shape[3]


def _results(q, k, v, decay, sink, first, cutoff, *settings):
    batch, time, heads, _ = q.shape
    return q.new_empty(batch, time, heads, v.shape[3]), q.new_empty(batch, heads, time, dtype=accumulation_dtype(v))


def _forward(*inputs):
    q, k, v = inputs[:3]
    results = _results(*inputs)
    fresh(results[0])
    _entry(DTYPES[v.dtype], torch.get_num_threads(), *dense(*inputs[:7]), *results, *_sizes(q, k, v), *inputs[7:])
    return results


def _gradients(do, o, sums, q, k, v, decay, sink, *others):
    return tuple(q.new_empty(0) if x is None else x.new_empty(x.shape) for x in (q, k, v, decay, sink))


def _backward(do, o, sums, *inputs):
    q, k, v = inputs[:3]
    gradients = _gradients(do, o, sums, *inputs)
    fresh(*gradients[:3])
    given = [gradient if x is not None else None for x, gradient in zip(inputs[:5], gradients, strict=True)]
    tensors = dense(*inputs[:7], o, sums, do)
    _backward_entry(DTYPES[v.dtype], torch.get_num_threads(), *tensors, *given, *_sizes(q, k, v), *inputs[7:])
    return gradients


_INPUTS = (
    "Tensor q, Tensor k, Tensor v, Tensor? decay, Tensor? sink, Tensor? first, Tensor? cutoff, int window, int sinks,"
    " float soft_cap, float scale"
)
_FORWARD = define(f"attention_native({_INPUTS}) -> (Tensor, Tensor)", _forward, _results, device="CPU")
_BACKWARD = define(
    f"attention_native_backward(Tensor do, Tensor o, Tensor sums, {_INPUTS})"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    _backward,
    _gradients,
    device="CPU",
)


def _save(ctx, inputs, outputs):
    ctx.mark_non_differentiable(outputs[1])
    ctx.save_for_backward(*outputs, *inputs[:7])
    ctx.settings = inputs[7:]


def _differentiate(ctx, do, _):
    o, sums, *inputs = ctx.saved_tensors
    gradients = _BACKWARD(do, o, sums, *inputs, *ctx.settings)
    none = [None] * (2 + len(ctx.settings))
    return *(None if x is None else dx for x, dx in zip(inputs[:5], gradients, strict=True)), *none


differentiable(_FORWARD, _save, _differentiate)
