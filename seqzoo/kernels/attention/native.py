"""The CPU kernels of native.cpp as operators of torch."""

from __future__ import annotations

import torch

from seqzoo.kernels.backends import accumulation_dtype
from seqzoo.kernels.native.tensors import DTYPES, Function, dense, dense_rows, fresh
from seqzoo.kernels.torch_operators import define, differentiable

_entry = Function("attention_forward")
_backward_entry = Function("attention_backward")


def attention(q, k, v, decay, sink, first, cutoff, window, sinks, prefix, soft_cap, scale):
    dtype = torch.float32 if v.dtype == torch.float16 else v.dtype
    wide = accumulation_dtype(v)
    decay, cutoff = (x if x is None else x.double() for x in (decay, cutoff))
    sink = None if sink is None else sink.to(wide)
    settings = window or 0, sinks, prefix, float(soft_cap or 0), float(scale)
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
    tensors = *dense_rows(q, k, v), *dense(*inputs[3:7]), *results
    _entry(DTYPES[v.dtype], torch.get_num_threads(), *tensors, *_sizes(q, k, v), *inputs[7:])
    return results


def _backward(do, *tensors_and_settings):
    q, k, v, decay, sink, first, cutoff, o, sums, *settings = tensors_and_settings
    gradients = [None if x is None else x.new_empty(x.shape) for x in (q, k, v, decay, sink)]
    if not do.numel():
        return [None if x is None else x.zero_() for x in gradients]
    fresh(*gradients[:3])
    tensors = *dense_rows(q, k, v), *dense(decay, sink, first, cutoff, o, sums, do)
    _backward_entry(DTYPES[v.dtype], torch.get_num_threads(), *tensors, *gradients, *_sizes(q, k, v), *settings)
    return gradients


_FORWARD = define(
    "attention_native(Tensor q, Tensor k, Tensor v, Tensor? decay, Tensor? sink, Tensor? first, Tensor? cutoff,"
    " int window, int sinks, int prefix, float soft_cap, float scale) -> (Tensor o, Tensor sums)",
    _forward,
    _results,
    device="CPU",
)
differentiable(
    _FORWARD,
    "o_grad, q, k, v, decay, sink, first, cutoff, o, sums, window, sinks, prefix, soft_cap, scale"
    " -> q, k, v, decay, sink",
    _backward,
    device="CPU",
)
