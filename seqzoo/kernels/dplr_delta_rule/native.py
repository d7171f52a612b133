"""The CPU kernels of native.cpp as operators of torch."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from seqzoo.kernels.backends import accumulation_dtype
from seqzoo.kernels.native.tensors import DTYPES, Function, dense
from seqzoo.kernels.torch_operators import define, differentiable

SEGMENT = 256  # as in native.cpp


def dplr_delta_rule(q, k, v, a, b, log_decay, state, starts):
    wide = accumulation_dtype(v)
    narrow = torch.float32 if v.dtype == torch.float16 else v.dtype
    q, k, values, a, b = (x.to(narrow) for x in (q, k, v, a, b))
    state = None if state is None else state.to(wide)
    o, memory, _, _ = _FORWARD(q, k, values, a, b, log_decay.to(wide), state, starts)
    return o.to(v.dtype), memory


_entry = Function("dplr_delta_rule_forward")
_backward_entry = Function("dplr_delta_rule_backward")


def _results(q: Tensor, k: Tensor, v: Tensor, a: Tensor, b: Tensor, log_decay: Tensor, state: Any, starts: Any):
    batch, time, heads, value = v.shape
    key = q.shape[3]
    kept = batch, heads, (time - 1) // SEGMENT, key, value
    last = log_decay.new_empty(batch, heads, key, value)
    return v.new_empty(v.shape), last, log_decay.new_empty(v.shape), log_decay.new_empty(kept)


def _forward(q: Tensor, k: Tensor, v: Tensor, a: Tensor, b: Tensor, log_decay: Tensor, state: Any, starts: Any):
    results = _results(q, k, v, a, b, log_decay, state, starts)
    inputs = dense(q, k, v, a, b, log_decay, state, starts)
    _entry(DTYPES[v.dtype], torch.get_num_threads(), *inputs, *results, *v.shape[:3], q.shape[3], v.shape[3])
    return results


def _backward(o_grad: Tensor, memory_grad: Tensor, z, kept, q, k, v, a, b, log_decay, state, starts):
    gradients = [*(x.new_empty(x.shape) for x in (q, k, v, a, b, log_decay)), memory_grad.new_empty(memory_grad.shape)]
    inputs = dense(q, k, v, a, b, log_decay, state, starts, z, kept, o_grad, memory_grad)
    _backward_entry(DTYPES[v.dtype], torch.get_num_threads(), *inputs, *gradients, *v.shape[:3], q.shape[3], v.shape[3])
    return gradients


_FORWARD = define(
    "dplr_delta_rule_native(Tensor q, Tensor k, Tensor v, Tensor a, Tensor b, Tensor log_decay, Tensor? state,"
    " Tensor? starts) -> (Tensor o, Tensor memory, Tensor z, Tensor kept)",
    _forward,
    _results,
    device="CPU",
)
differentiable(
    _FORWARD,
    "o_grad, memory_grad, z, kept, q, k, v, a, b, log_decay, state, starts -> q, k, v, a, b, log_decay, state",
    _backward,
    device="CPU",
)
