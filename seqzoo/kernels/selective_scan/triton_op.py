"""The Triton kernels as ops of torch: one for the forward, one for the backward."""

from __future__ import annotations

from seqzoo.kernels.backends import accumulation_dtype
from seqzoo.kernels.torch_operators import define, differentiable
from seqzoo.kernels.triton_support import DEVICES

TOKENS = 64
"""Of a tile. The states that enter each tile are kept for the backward, where there are several."""

_INPUTS = (
    "Tensor x, Tensor dt, Tensor A, Tensor B, Tensor C, Tensor? D, Tensor? gate, Tensor? dt_bias, Tensor? state,"
    " Tensor? starts"
)


def _run_forward(*inputs):
    from seqzoo.kernels.selective_scan import triton_kernels

    return triton_kernels.forward(*inputs)


def _run_backward(*inputs):
    from seqzoo.kernels.selective_scan import triton_kernels

    return triton_kernels.backward(*inputs)


def _fake_forward(x, dt, A, B, C, D, gate, dt_bias, state, starts):
    (batch, time, channels), size = x.shape, A.shape[1]
    last = x.new_empty(batch, channels, size, dtype=accumulation_dtype(x))
    tiles = (time + TOKENS - 1) // TOKENS
    return x.new_empty(x.shape), last, last.new_empty((batch, tiles, size, channels) if time > TOKENS else (0,))


def _fake_backward(dy, dlast, x, dt, A, B, C, D, gate, dt_bias, state, starts, entering):
    inputs = (x, dt, A, B, C, D, gate, dt_bias, state)
    return tuple(x.new_empty(0) if z is None else z.new_empty(z.shape) for z in inputs)


_FORWARD = define(
    f"selective_scan_triton({_INPUTS}) -> (Tensor, Tensor, Tensor)", _run_forward, _fake_forward, device=DEVICES
)
_BACKWARD = define(
    f"selective_scan_triton_backward(Tensor dy, Tensor dlast, {_INPUTS}, Tensor entering) -> ("
    + ", ".join(["Tensor"] * 9)
    + ")",
    _run_backward,
    _fake_backward,
    device=DEVICES,
)


def _save(ctx, inputs, outputs):
    ctx.save_for_backward(*inputs, outputs[2])


def _backward(ctx, dy, dlast, _):
    *inputs, starts, entering = ctx.saved_tensors
    gradients = _BACKWARD(dy, dlast, *inputs, starts, entering)
    return *(None if z is None else dz for z, dz in zip(inputs, gradients, strict=True)), None


differentiable(_FORWARD, _save, _backward)


def selective_scan(x, dt, A, B, C, D, gate, dt_bias, state, starts):
    y, last, _ = _FORWARD(x, dt, A, B, C, D, gate, dt_bias, state, starts)
    return y, last
