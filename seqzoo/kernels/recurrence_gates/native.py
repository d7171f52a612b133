"""The equation in C++ (native.cpp), for the CPU: one pass over memory forward, one backward that computes it again."""

from __future__ import annotations

import torch

from seqzoo.kernels.native.tensors import DTYPES, Function, dense, fresh
from seqzoo.kernels.recurrence_gates.reference import TINY
from seqzoo.kernels.torch_operators import define, differentiable

_forward = Function("recurrence_gates_forward")
_backward = Function("recurrence_gates_backward")
# Below this many numbers waking a second thread costs more than it saves.
SMALL = 1 << 13


def recurrence_gates(u, gates, recurrence_bias, input_bias, rate, begins):
    dtype = u.dtype
    if dtype == torch.float16:
        u, gates = u.float(), gates.float()
    decay, entering = FORWARD(u, gates, recurrence_bias, input_bias, rate, begins)
    return decay, entering.to(dtype)


def _settings(u, gates):
    """What both functions take first: threads, dtype, sizes and the constant."""
    threads = torch.get_num_threads() if u.numel() > SMALL else 1
    return threads, DTYPES[u.dtype], u.numel() // u.shape[-1], len(gates), gates.shape[-1] // 2, TINY


def _run(*inputs):
    outputs = _fake(*inputs)
    fresh(*outputs)
    if inputs[0].numel():
        _forward(*_settings(*inputs[:2]), *dense(*inputs), *outputs)
    return outputs


def _fake(u, gates, recurrence_bias, input_bias, rate, begins):
    return rate.new_empty(u.shape), u.new_empty(u.shape)


def _run_backward(decay_grad, entering_grad, *inputs):
    gradients = [z.new_empty(z.shape) for z in inputs[:-1]]
    fresh(*gradients)
    if not inputs[0].numel():
        return [z.zero_() for z in gradients]
    _backward(*_settings(*inputs[:2]), *dense(decay_grad, entering_grad, *inputs), *gradients)
    return gradients


_INPUTS = "u, gates, recurrence_bias, input_bias, rate"
FORWARD = define(
    f"recurrence_gates_native({', '.join('Tensor ' + name for name in _INPUTS.split(', '))}, Tensor? begins)"
    " -> (Tensor decay, Tensor entering)",
    _run,
    _fake,
    device="CPU",
)
differentiable(FORWARD, f"decay_grad, entering_grad, {_INPUTS}, begins -> {_INPUTS}", _run_backward, device="CPU")
