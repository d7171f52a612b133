"""The Triton kernels as ops of torch: one for the forward, one for the backward."""

from __future__ import annotations

import torch

from seqzoo.kernels.torch_operators import define, differentiable
from seqzoo.kernels.triton_support import DEVICES

# Tokens in a chunk. What a chunk needs inside grows with its length, what the walk needs between them falls with it.
CHUNK = 32
# The same where numbers of 32 bits are multiplied, which take more registers.
SHORT_CHUNK = 16
# So few tokens are stepped one by one, and make one short chunk in the backward.
FEW = 16
# Chunks of all heads together that are in memory at a time. More would gain no speed: they fill any GPU.
CELLS = 4096


def segment(heads: int) -> int:
    """Tokens in a segment of ``heads`` heads, all rows of the batch together."""
    return max(CELLS // max(heads, 1), 4) * CHUNK


def _run_forward(q, k, v, a, b, log_decay, state, starts):
    from seqzoo.kernels.dplr_delta_rule import triton_kernels

    return triton_kernels.forward(q, k, v, a, b, log_decay, state, starts)


def _run_backward(do, dlast, q, k, v, a, b, log_decay, state, starts, states):
    from seqzoo.kernels.dplr_delta_rule import triton_kernels

    return triton_kernels.backward(do, dlast, q, k, v, a, b, log_decay, state, starts, states)


def _fake_forward(q, k, v, a, b, log_decay, state, starts):
    batch, time, heads, value = v.shape
    wide = torch.promote_types(v.dtype, torch.float32)
    shape = (batch, heads, q.shape[3], value)
    between_segments = (time - 1) // segment(batch * heads)
    return v.new_empty(v.shape), v.new_empty(shape, dtype=wide), v.new_empty((between_segments, *shape), dtype=wide)


def _fake_backward(do, dlast, q, k, v, a, b, log_decay, state, starts, states):
    inputs = (q, k, v, a, b, log_decay, state)
    return tuple(v.new_empty(0) if z is None else z.new_empty(z.shape) for z in inputs)


_INPUTS = "Tensor q, Tensor k, Tensor v, Tensor a, Tensor b, Tensor log_decay, Tensor? state, Tensor? starts"
_FORWARD = define(
    f"dplr_delta_rule_triton({_INPUTS}) -> (Tensor, Tensor, Tensor)", _run_forward, _fake_forward, device=DEVICES
)
_BACKWARD = define(
    f"dplr_delta_rule_triton_backward(Tensor do, Tensor dlast, {_INPUTS}, Tensor states)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    _run_backward,
    _fake_backward,
    device=DEVICES,
)


def _save(ctx, inputs, outputs):
    ctx.mark_non_differentiable(outputs[2])
    ctx.save_for_backward(*inputs, outputs[2])


def _backward(ctx, do, dlast, _):
    inputs = ctx.saved_tensors[:7]
    gradients = _BACKWARD(do, dlast, *ctx.saved_tensors)
    return *(None if z is None else dz for z, dz in zip(inputs, gradients, strict=True)), None


differentiable(_FORWARD, _save, _backward)


def dplr_delta_rule(q, k, v, a, b, log_decay, state, starts):
    return _FORWARD(q, k, v, a, b, log_decay, state, starts)[:2]
