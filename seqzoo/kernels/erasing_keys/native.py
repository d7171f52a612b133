"""The equation in C++ (native.cpp), for the CPU: one pass over memory forward, one backward that computes it again."""

from __future__ import annotations

import torch

from seqzoo.kernels.erasing_keys.reference import EPS, FASTEST
from seqzoo.kernels.native.tensors import DTYPES, Function, dense, fresh
from seqzoo.kernels.torch_operators import define, differentiable

_forward = Function("erasing_keys_forward")
_backward = Function("erasing_keys_backward")
# Below this many keys waking a second thread costs more than it saves.
SMALL = 1 << 13


def erasing_keys(r, k, decay, rate, *learned):
    dtype = k.dtype
    if dtype == torch.float16:
        r, k, decay, rate = (z.float() for z in (r, k, decay, rate))
    log_decay, written, erased, restored, own = FORWARD(r, k, decay, rate, *learned)
    return log_decay, written.to(dtype), erased.to(dtype), restored.to(dtype), own


def _settings(k, bonus):
    """What both functions take first: threads, dtype, sizes and constants."""
    threads = torch.get_num_threads() if k.numel() > SMALL else 1
    return threads, DTYPES[k.dtype], k.numel() // max(bonus.numel(), 1), *bonus.shape, FASTEST, EPS


def _run(*inputs):
    inputs, outputs = dense(*inputs), _fake(*inputs)
    fresh(*outputs)
    if inputs[1].numel():
        _forward(*_settings(inputs[1], inputs[-1]), *inputs, *outputs)
    else:
        outputs[-1].zero_()  # a sum over no channels
    return outputs


def _fake(r, k, decay, rate, decay_bias, rate_bias, key_scale, key_rate, bonus):
    rows = *k.shape[:-1], *bonus.shape
    written, erased, restored = (k.new_empty(rows) for _ in range(3))
    return bonus.new_empty(rows), written, erased, restored, bonus.new_empty(rows[:-1])


def _run_backward(*tensors):
    tensors = dense(*tensors)
    inputs = tensors[5:]
    gradients = [z.new_empty(z.shape) for z in inputs]
    fresh(*gradients)
    if not inputs[1].numel():
        return [z.zero_() for z in gradients]
    _backward(*_settings(inputs[1], inputs[-1]), *tensors, *gradients)
    return gradients


_INPUTS = "r, k, decay, rate, decay_bias, rate_bias, key_scale, key_rate, bonus"
FORWARD = define(
    f"erasing_keys_native({', '.join('Tensor ' + name for name in _INPUTS.split(', '))})"
    " -> (Tensor log_decay, Tensor written, Tensor erased, Tensor restored, Tensor own)",
    _run,
    _fake,
    device="CPU",
)
differentiable(
    FORWARD,
    f"log_decay_grad, written_grad, erased_grad, restored_grad, own_grad, {_INPUTS} -> {_INPUTS}",
    _run_backward,
    device="CPU",
)
