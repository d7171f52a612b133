"""The equation in C++ (native.cpp), for the CPU: one pass over memory forward, one backward that computes it again."""

from __future__ import annotations

import torch

from seqzoo.kernels.backends import accumulation_dtype
from seqzoo.kernels.native.tensors import DTYPES, Function, dense, fresh, rows_of
from seqzoo.kernels.torch_operators import define, differentiable

_forward = Function("turned_keys_forward")
_backward = Function("turned_keys_backward")
# Below this many numbers of queries waking a second thread costs more than it saves.
SMALL = 1 << 14
# Tokens between angles that the forward keeps for the backward, as in native.cpp.
CHUNK = 32


def turned_keys(write, read, write_bias, read_bias, turn, step, gain, values, angle, key, value, starts):
    dtype, wide = values.dtype, accumulation_dtype(values)
    if dtype == torch.float16:
        write, read, values = write.float(), read.float(), values.float()
    angle, key = (None if z is None else z.to(wide) for z in (angle, key))
    value = None if value is None else value.to(values.dtype)
    inputs = write, read, write_bias, read_bias, turn, step, gain, values, angle, key, value, starts
    q, k, v, own, last_angle, last_key, _ = FORWARD(*inputs)
    return *(z.to(dtype) for z in (q, k, v)), own, last_angle, last_key


def _settings(write, write_bias, turn, values):
    """What both functions take first: threads, dtype and sizes."""
    threads = torch.get_num_threads() if write_bias.numel() * turn.shape[1] > SMALL else 1
    return threads, DTYPES[write.dtype], *write.shape, *values.shape[2:], turn.shape[2]


def _run(write, read, write_bias, read_bias, turn, step, gain, values, angle, key, value, starts):
    inputs = write, read, write_bias, read_bias, turn, step, gain, values, angle, key, value, starts
    outputs = _fake(*inputs)
    rows = rows_of(values, 2)
    before, after = dense(*inputs[:7]), dense(*inputs[8:])
    fresh(*outputs[:3])
    if outputs[0].numel():
        settings = _settings(write, write_bias, turn, values)
        # Tokens of values may lie apart, which a tensor that is handed over may not.
        _forward(*settings, rows.stride(0), *before, rows.data_ptr(), *after, *outputs)
    return outputs


def _fake(write, read, write_bias, read_bias, turn, step, gain, values, angle, key, value, starts):
    batch, time, heads = values.shape[:3]
    size, pairs, wide = write.shape[3], turn.shape[2], accumulation_dtype(values)
    q, k = (write.new_empty(batch, time, heads, size) for _ in range(2))
    own = step.new_empty(batch, time, heads)
    last_angle, last_key = step.new_empty(batch, heads, pairs, dtype=wide), step.new_empty(batch, heads, size)
    kept = step.new_empty(batch, -(-time // CHUNK), heads, pairs, dtype=torch.float64)
    return q, k, values.new_empty(values.shape), own, last_angle, last_key, kept


def _run_backward(*tensors):
    given, inputs, kept = tensors[:6], tensors[6:-1], tensors[-1]
    write, read, write_bias, read_bias, turn, step, gain, values, _, key, _, starts = inputs
    gradients = [None if z is None else z.new_empty(z.shape) for z in inputs[:-1]]
    if not given[0].numel():
        return [None if z is None else z.zero_() for z in gradients]
    fresh(gradients[7])
    used = dense(*given, kept, write, read, write_bias, read_bias, turn, step, gain, key, starts)
    _backward(*_settings(write, write_bias, turn, values), *used, *gradients)
    return gradients


_INPUTS = "write, read, write_bias, read_bias, turn, step, gain, values, angle, key, value"
FORWARD = define(
    "turned_keys_native(Tensor write, Tensor read, Tensor write_bias, Tensor read_bias, Tensor turn, Tensor step,"
    " Tensor gain, Tensor values, Tensor? angle, Tensor? key, Tensor? value, Tensor? starts)"
    " -> (Tensor q, Tensor k, Tensor v, Tensor own, Tensor last_angle, Tensor last_key, Tensor kept)",
    _run,
    _fake,
    device="CPU",
)
differentiable(
    FORWARD,
    f"q_grad, k_grad, v_grad, own_grad, last_angle_grad, last_key_grad, {_INPUTS}, starts, kept -> {_INPUTS}",
    _run_backward,
    device="CPU",
)
