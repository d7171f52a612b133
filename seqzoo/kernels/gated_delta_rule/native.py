"""The CPU kernels of native.cpp as operators of torch."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from seqzoo.kernels.backends import accumulation_dtype
from seqzoo.kernels.native.tensors import DTYPES, Function, dense
from seqzoo.kernels.torch_operators import define, differentiable

SEGMENT = 512  # as in native.cpp


def gated_delta_rule(q, k, v, log_decay, beta, state, starts):
    wide = accumulation_dtype(v)
    dtype = torch.float32 if v.dtype == torch.float16 else v.dtype
    log_decay, state = (x if x is None else x.to(wide) for x in (log_decay, state))
    o, memory, _ = _FORWARD(q.to(dtype), k.to(dtype), v.to(dtype), log_decay, beta.to(wide), state, starts)
    return o.to(v.dtype), memory


_entry = Function("gated_delta_rule_forward")
_backward_entry = Function("gated_delta_rule_backward")


def _sizes(q: Tensor, v: Tensor, log_decay: Tensor | None) -> tuple[int, ...]:
    return (
        0 if log_decay is None else log_decay.ndim - 2,
        *v.shape[:2],
        *q.shape[2:3],
        v.shape[2],
        q.shape[3],
        v.shape[3],
    )


def _results(q: Tensor, k: Tensor, v: Tensor, log_decay: Any, beta: Tensor, state: Any, starts: Any):
    batch, time, heads, value = v.shape
    memory = batch, heads, q.shape[3], value
    kept = batch, heads, (time - 1) // SEGMENT, q.shape[3], value
    return v.new_empty(v.shape), beta.new_empty(memory), beta.new_empty(kept)


def _forward(q: Tensor, k: Tensor, v: Tensor, log_decay: Any, beta: Tensor, state: Any, starts: Any):
    sizes = _sizes(q, v, log_decay)
    inputs = dense(q, k, v, log_decay, beta, state, starts)
    results = _results(q, k, v, log_decay, beta, state, starts)
    _entry(DTYPES[v.dtype], torch.get_num_threads(), *inputs, *results, *sizes)
    return results


def _backward(o_grad: Tensor, memory_grad: Tensor, kept: Tensor, q, k, v, log_decay, beta, state, starts):
    per_head = q.new_empty(*v.shape[:3], q.shape[3])
    of_decay = None if log_decay is None else log_decay.new_empty(log_decay.shape)
    of_beta, of_state = beta.new_empty(beta.shape), memory_grad.new_empty(memory_grad.shape)
    gradients = [per_head, torch.empty_like(per_head), v.new_empty(v.shape), of_decay, of_beta, of_state]
    inputs = dense(q, k, v, log_decay, beta, state, starts, kept, o_grad, memory_grad)
    _backward_entry(DTYPES[v.dtype], torch.get_num_threads(), *inputs, *gradients, *_sizes(q, v, log_decay))
    if q.shape[2] != v.shape[2]:
        shared = q.shape[2], v.shape[2] // q.shape[2]
        gradients[:2] = (x.unflatten(2, shared).sum(3) for x in gradients[:2])
    return gradients


_FORWARD = define(
    "gated_delta_rule_native(Tensor q, Tensor k, Tensor v, Tensor? log_decay, Tensor beta, Tensor? state,"
    " Tensor? starts) -> (Tensor o, Tensor memory, Tensor kept)",
    _forward,
    _results,
    device="CPU",
)
differentiable(
    _FORWARD,
    "o_grad, memory_grad, kept, q, k, v, log_decay, beta, state, starts -> q, k, v, log_decay, beta, state",
    _backward,
    device="CPU",
)
