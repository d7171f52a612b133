"""The equation in C++ (native.cpp), for the CPU: one pass over memory forward, one backward that computes it again."""

from __future__ import annotations

import torch

from seqzoo.kernels.native.tensors import DTYPES, Function, addresses, fresh, rows_of
from seqzoo.kernels.torch_operators import define, differentiable

_forward = Function("gated_output_forward")
_backward = Function("gated_output_backward")
# Below this many outputs waking a second thread costs more than it saves.
SMALL = 1 << 15
ACTIVATIONS = {None: 0, "silu": 1, "sigmoid": 2, "gelu": 3}


def gated_output(x, gate, skip, weight, activation):
    dtype = x.dtype
    if dtype == torch.float16:
        x, gate, skip = x.float(), *(None if z is None else z.float() for z in (gate, skip))
    weight = None if weight is None else weight.to(torch.promote_types(x.dtype, torch.float32))
    return FORWARD(x, gate, skip, weight, ACTIVATIONS[activation]).to(dtype)


def _prepared(x, gate, skip, weight, activation):
    """What both functions take: threads, dtype and sizes; then tensors by address, for tokens may lie apart."""
    threads = torch.get_num_threads() if x.numel() > SMALL else 1
    tensors = [None if z is None else rows_of(z) for z in (x, gate, skip)]
    strides = [0 if z is None else z.stride(0) for z in tensors]
    heads = 1 if weight is None else weight.shape[-1]
    rows = heads * x.shape[:-1].numel()
    tensors.append(None if weight is None else weight.contiguous())
    return (threads, DTYPES[x.dtype], rows, heads, x.shape[-1] // heads, activation, *strides), tensors


def _run(x, gate, skip, weight, activation):
    y = x.new_empty(x.shape)
    fresh(y)
    if x.numel():
        settings, tensors = _prepared(x, gate, skip, weight, activation)
        _forward(*settings, *addresses(*tensors), y)
    return y


def _fake(x, gate, skip, weight, activation):
    return x.new_empty(x.shape)


def _run_backward(dy, x, gate, skip, weight, activation):
    gradients = [None if z is None else z.new_empty(z.shape) for z in (x, gate, skip, weight)]
    fresh(*gradients)
    if not x.numel():
        return [None if z is None else z.zero_() for z in gradients]
    settings, tensors = _prepared(x, gate, skip, weight, activation)
    _backward(*settings, *addresses(*tensors), dy.contiguous(), *gradients)
    return gradients


FORWARD = define(
    "gated_output_native(Tensor x, Tensor? gate, Tensor? skip, Tensor? weight, int activation) -> (Tensor y)",
    _run,
    _fake,
    device="CPU",
)
differentiable(
    FORWARD,
    "y_grad, x, gate, skip, weight, activation -> x, gate, skip, weight",
    _run_backward,
    device="CPU",
)
