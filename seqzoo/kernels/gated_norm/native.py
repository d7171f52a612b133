"""The equation in C++ (native.cpp), for the CPU: one pass over memory forward, one backward that computes it again."""

from __future__ import annotations

import torch

from seqzoo.kernels.native.tensors import DTYPES, Function, addresses, fresh, rows_of
from seqzoo.kernels.torch_operators import define, differentiable

_forward = Function("gated_norm_forward")
_backward = Function("gated_norm_backward")
# Below this many outputs waking a second thread costs more than it saves.
SMALL = 1 << 14
ACTIVATIONS = {None: 0, "silu": 1, "sigmoid": 2}


def gated_norm(x, gate, weight, bias, groups, eps, scale, centered, activation, gate_first):
    dtype = x.dtype
    if dtype == torch.float16:
        x, gate = x.float(), None if gate is None else gate.float()
    wide = torch.promote_types(x.dtype, torch.float32)
    weight, bias = (None if z is None else z.to(wide) for z in (weight, bias))
    activation = ACTIVATIONS[None if gate is None else activation]
    return FORWARD(x, gate, weight, bias, groups, eps, scale, centered, activation, gate_first).to(dtype)


def _settings(x, gate, weight, bias, groups, *numbers):
    """What both functions take last: sizes, strides and numbers."""
    tokens, width = x.shape
    learned = next((z.numel() for z in (weight, bias) if z is not None), width)
    size = width // groups
    sizes = tokens, groups, size, x.stride(0), 0 if gate is None else gate.stride(0), learned // size
    return *sizes, *numbers


def _threads(x):
    return torch.get_num_threads() if x.numel() > SMALL else 1


def _run(x, gate, weight, bias, groups, *numbers):
    y = x.new_empty(x.shape)
    fresh(y)
    x, gate = rows_of(x), None if gate is None else rows_of(gate)
    weight, bias = (None if z is None else z.contiguous() for z in (weight, bias))
    if x.numel():
        places = addresses(x, gate, weight, bias)
        _forward(_threads(x), DTYPES[x.dtype], *places, y, *_settings(x, gate, weight, bias, groups, *numbers))
    return y


def _fake(x, gate, weight, bias, groups, *numbers):
    return x.new_empty(x.shape)


def _run_backward(dy, x, gate, weight, bias, groups, *numbers):
    gradients = [None if z is None else z.new_empty(z.shape) for z in (x, gate, weight, bias)]
    fresh(*gradients[:2])
    x, gate = rows_of(x), None if gate is None else rows_of(gate)
    dy, weight, bias = (None if z is None else z.contiguous() for z in (dy, weight, bias))
    if not x.numel():
        return [None if z is None else z.zero_() for z in gradients]
    settings = _settings(x, gate, weight, bias, groups, *numbers)
    _backward(_threads(x), DTYPES[x.dtype], *addresses(dy, x, gate, weight, bias, *gradients), *settings)
    return gradients


FORWARD = define(
    "gated_norm_native(Tensor x, Tensor? gate, Tensor? weight, Tensor? bias, int groups, float eps, float scale,"
    " bool centered, int activation, bool gate_first) -> (Tensor y)",
    _run,
    _fake,
    device="CPU",
)
differentiable(
    FORWARD,
    "y_grad, x, gate, weight, bias, groups, eps, scale, centered, activation, gate_first -> x, gate, weight, bias",
    _run_backward,
    device="CPU",
)
