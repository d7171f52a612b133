"""The equation in C++ (native.cpp), for the CPU: one pass over memory forward, and one backward."""

from __future__ import annotations

import torch

from seqzoo.kernels.native.tensors import DTYPES, Function, array_of, dense, fresh
from seqzoo.kernels.torch_operators import define, differentiable

_forward = Function("token_shift_forward")
_backward = Function("token_shift_backward")
# Below this many outputs waking a second thread costs more than it saves.
SMALL = 1 << 15


def token_shift(x, mix, last, starts, more, dtype):
    # Inside, glances and what is added to mixes are as wide as x, or both in bfloat16.
    narrow = dtype == torch.bfloat16 and x.dtype != torch.float64 and (more is None or more.dtype == dtype)
    if x.dtype == torch.float16 or (x.dtype == torch.bfloat16 and not narrow):
        x = x.float()
    inner = torch.bfloat16 if narrow else x.dtype
    mix = mix.to(torch.promote_types(x.dtype, torch.float32))
    last, more = None if last is None else last.to(x.dtype), None if more is None else more.to(inner)
    glances = FORWARD(x, mix, last, more, starts, narrow)
    return tuple(glances) if inner == dtype else tuple(z.to(dtype) for z in glances)


def _settings(x, mix, narrow):
    """What both functions take first: threads, and the codes of the dtypes."""
    threads = torch.get_num_threads() if x.numel() * len(mix) > SMALL else 1
    return threads, DTYPES[x.dtype], DTYPES[torch.bfloat16 if narrow else x.dtype]


def _run(x, mix, last, more, starts, narrow):
    glances = _fake(x, mix, last, more, starts, narrow)
    x, mix, last, more, starts = dense(x, mix, last, more, starts)
    fresh(*glances)
    if x.numel():
        _forward(*_settings(x, mix, narrow), x, mix, last, starts, more, array_of(glances), len(mix), *x.shape)
    return glances


def _fake(x, mix, last, more, starts, narrow):
    dtype = torch.bfloat16 if narrow else x.dtype
    return [x.new_empty(x.shape, dtype=dtype) for _ in range(len(mix))]


def _run_backward(grads, x, mix, last, more, starts, narrow):
    grads = dense(*grads)
    x, mix, last, more, starts = dense(x, mix, last, more, starts)
    gradients = [None if z is None else z.new_empty(z.shape) for z in (x, mix, last, more)]
    if not x.numel():
        return [None if z is None else z.zero_() for z in gradients]
    fresh(gradients[0], gradients[3])
    inputs = array_of(grads), x, mix, last, starts, more
    _backward(*_settings(x, mix, narrow), *inputs, *gradients, len(mix), *x.shape)
    return gradients


FORWARD = define(
    "token_shift_native(Tensor x, Tensor mix, Tensor? last, Tensor? more, Tensor? starts, bool narrow)"
    " -> (Tensor[] glances)",
    _run,
    _fake,
    device="CPU",
)
differentiable(
    FORWARD, "glances_grad, x, mix, last, more, starts, narrow -> x, mix, last, more", _run_backward, device="CPU"
)
