"""The equation in C++ (native.cpp), for the CPU: one pass over memory forward, one backward that computes it again."""

from __future__ import annotations

import torch

from seqzoo.kernels.native.tensors import DTYPES, Function, fresh, rows_of
from seqzoo.kernels.torch_operators import define, differentiable

_forward = Function("gated_skip_forward")
_backward = Function("gated_skip_backward")
# Below this many outputs waking a second thread costs more than it saves.
SMALL = 1 << 15


def gated_skip(x, skip, weight, gate, activation):
    dtype = x.dtype
    if dtype == torch.float16:
        x, skip, gate = x.float(), skip.float(), None if gate is None else gate.float()
    weight = weight.to(torch.promote_types(x.dtype, torch.float32))
    return FORWARD(x, skip, weight, gate, activation == "silu").to(dtype)


def _prepared(x, skip, weight, gate, silu):
    """What both functions take: threads, dtype and sizes; then addresses, for tokens may lie apart."""
    threads = torch.get_num_threads() if x.numel() > SMALL else 1
    tensors = [None if z is None else rows_of(z) for z in (x, skip, gate)]
    strides = [0 if z is None else z.stride(0) for z in tensors]
    weight = weight.contiguous()
    heads = weight.shape[-1]
    settings = threads, DTYPES[x.dtype], weight.numel(), heads, x.shape[-1] // heads, silu, *strides
    return settings, [*tensors, weight]


def _run(x, skip, weight, gate, silu):
    y = x.new_empty(x.shape)
    fresh(y)
    if x.numel():
        settings, tensors = _prepared(x, skip, weight, gate, silu)
        _forward(*settings, *(0 if z is None else z.data_ptr() for z in tensors), y)
    return y


def _fake(x, skip, weight, gate, silu):
    return x.new_empty(x.shape)


def _run_backward(dy, x, skip, weight, gate, silu):
    gradients = [None if z is None else z.new_empty(z.shape) for z in (x, skip, weight, gate)]
    fresh(*gradients)
    if not x.numel():
        return [None if z is None else z.zero_() for z in gradients]
    settings, tensors = _prepared(x, skip, weight, gate, silu)
    addresses = (0 if z is None else z.data_ptr() for z in tensors)
    _backward(*settings, *addresses, dy.contiguous(), *gradients)
    return gradients


FORWARD = define(
    "gated_skip_native(Tensor x, Tensor skip, Tensor weight, Tensor? gate, bool silu) -> (Tensor y)",
    _run,
    _fake,
    device="CPU",
)
differentiable(FORWARD, "y_grad, x, skip, weight, gate, silu -> x, skip, weight, gate", _run_backward, device="CPU")
