"""The CPU kernels of native.cpp as operators of torch: the weights of all layers are one tensor to them."""

from __future__ import annotations

import ctypes
from typing import Any

import torch
from torch import Tensor

from seqzoo.kernels.backends import accumulation_dtype
from seqzoo.kernels.fast_weights.reference import FastWeightsState
from seqzoo.kernels.native.tensors import DTYPES, Function, array_of, dense, fresh
from seqzoo.kernels.torch_operators import define, differentiable

# As in native.cpp.
PIECE = 64
PIECES = 32

_entry = Function("fast_weights_forward")
_backward_entry = Function("fast_weights_backward")


def fast_weights(
    q,
    k,
    v,
    rate,
    weights,
    norm_weight,
    norm_bias,
    reach,
    log_momentum,
    log_keep,
    state,
    starts,
    chunk,
    gelu,
    norm_eps,
):
    wide = accumulation_dtype(v)
    dtype = torch.float32 if v.dtype == torch.float16 else v.dtype
    shapes = [w.shape[1:] for w in weights]
    gates = [None if z is None else z.to(wide) for z in (norm_weight, norm_bias, reach, log_momentum, log_keep)]
    learned = rate.to(wide), _packed(weights, wide), *gates
    given = [None] * 4
    if state is not None:
        given = [_packed(layers, wide) if layers else None for layers in state[:3]] + [state.position]
    sizes = [size for shape in shapes for size in shape]
    settings = sizes, chunk, gelu == "tanh", norm_eps
    o, *after, position, _ = _FORWARD(q.to(dtype), k.to(dtype), v.to(dtype), *learned, *given, starts, *settings)
    if log_momentum is None:
        after.pop()
    anchor, change, *momentum = (_unpacked(layers, shapes) for layers in after)
    return o.to(v.dtype), FastWeightsState(anchor, change, momentum[0] if momentum else (), position)


def _packed(layers, dtype):
    """``[..., head, input, output]`` of each layer to ``[..., head, number]`` of all."""
    flat = [w.to(dtype).flatten(-2) for w in layers]
    return flat[0] if len(flat) == 1 else torch.cat(flat, -1)


def _unpacked(layers, shapes):
    """The way back. Copies, where there is more than one: a state is not a view of anything larger."""
    if len(shapes) == 1:
        return (layers.unflatten(-1, shapes[0]),)
    pieces = layers.split([rows * columns for rows, columns in shapes], -1)
    return tuple(z.unflatten(-1, shape).contiguous() for z, shape in zip(pieces, shapes, strict=True))


def _settings(q, v, sizes, chunk, tanh, norm_eps):
    """What both functions take first."""
    batch, time, heads, value = v.shape
    numbers = batch, time, heads, q.shape[3], value, chunk, len(sizes) // 2
    arrays = ((ctypes.c_int64 * len(z))(*z) for z in (numbers, sizes))
    return DTYPES[v.dtype], torch.get_num_threads(), *arrays, tanh, norm_eps


def _results(q, k, v, rate, weights, *others):
    log_momentum, position, chunk = others[3], others[8], others[11]
    batch, time, heads, _ = v.shape
    numbers = weights.shape[1]
    memory = [weights.new_empty(batch, heads, numbers) for _ in range(2)]
    momentum = weights.new_empty(batch, heads, 0 if log_momentum is None else numbers)
    segments = (time - 1) // (PIECES * min(chunk, PIECE))
    parts = 1 + (log_momentum is not None) + (chunk > PIECE)
    kept = weights.new_empty(batch, heads, segments, parts * numbers)
    last = weights.new_empty(batch, dtype=torch.int64) if position is None else position.new_empty(position.shape)
    return v.new_empty(v.shape), *memory, momentum, last, kept


def _forward(*inputs):
    results, settings = _results(*inputs), _settings(inputs[0], inputs[2], *inputs[15:])
    tensors = dense(*inputs[:15])
    fresh(results[0], results[-1])
    if results[0].numel():
        _entry(*settings, array_of(tensors), array_of(results))
    return results


def _backward(*given):
    of_results, kept, inputs, settings = given[:4], given[4], given[5:20], given[20:]
    q, _, v, _, weights, norm_weight, _, reach, log_momentum, log_keep, *_ = inputs
    batch, _, heads, value = v.shape

    def each(shared: Tensor | None, size: int) -> Any:
        return None if shared is None else shared.new_empty(batch, heads, size)

    numbers, norm = weights.shape[1], [each(norm_weight, value) for _ in range(2)]
    tokens = [None if z is None else z.new_empty(z.shape) for z in (*inputs[:4], log_momentum, log_keep)]
    state = [each(z, numbers) for z in (weights, weights, log_momentum)]
    shared = each(weights, numbers), *norm, None if reach is None else each(reach, len(reach)).double()
    gradients = [*tokens[:4], *shared, *tokens[4:], *state]
    if not v.numel():
        return [None if z is None else z.new_zeros(z.shape) for z in inputs[:13]]
    of_results, tensors = dense(*of_results, kept), dense(*inputs)
    fresh(*gradients[:3])
    _backward_entry(*_settings(q, v, *settings), array_of(tensors), array_of(of_results), array_of(gradients))
    gradients[4:7] = (None if z is None else z.sum(0) for z in gradients[4:7])
    if reach is not None:
        gradients[7] = gradients[7].sum((0, 1))
    return gradients


_INPUTS = "q, k, v, rate, weights, norm_weight, norm_bias, reach, log_momentum, log_keep, anchor, change, momentum"
_FORWARD = define(
    "fast_weights_native(Tensor q, Tensor k, Tensor v, Tensor rate, Tensor weights, Tensor? norm_weight,"
    " Tensor? norm_bias, Tensor? reach, Tensor? log_momentum, Tensor? log_keep, Tensor? anchor, Tensor? change,"
    " Tensor? momentum, Tensor? position, Tensor? starts, int[] sizes, int chunk, bool tanh, float norm_eps)"
    " -> (Tensor o, Tensor last_anchor, Tensor last_change, Tensor last_momentum, Tensor last_position, Tensor kept)",
    _forward,
    _results,
    device="CPU",
)
differentiable(
    _FORWARD,
    f"o_grad, last_anchor_grad, last_change_grad, last_momentum_grad, kept, {_INPUTS}, position, starts, sizes, chunk,"
    f" tanh, norm_eps -> {_INPUTS}",
    _backward,
    device="CPU",
)
