"""The Triton kernels as ops of torch: one for the forward, one for the backward."""

from __future__ import annotations

from seqzoo.kernels.backends import accumulation_dtype
from seqzoo.kernels.torch_operators import define, differentiable
from seqzoo.kernels.triton_support import DEVICES


def _run_forward(a, b, state, starts):
    from seqzoo.kernels.linear_scan import triton_kernels

    return triton_kernels.forward(a, b, state, starts)


def _run_backward(dh, dlast, a, h, state, starts):
    from seqzoo.kernels.linear_scan import triton_kernels

    return triton_kernels.backward(dh, dlast, a, h, state, starts)


def _fake_forward(a, b, state, starts):
    return b.new_empty(b.shape), b.new_empty(b.shape[0], b.shape[2], dtype=accumulation_dtype(b))


def _fake_backward(dh, dlast, a, h, state, starts):
    return a.new_empty(a.shape), h.new_empty(h.shape), dlast.new_empty(dlast.shape)


_FORWARD = define(
    "linear_scan_triton(Tensor a, Tensor b, Tensor? state, Tensor? starts) -> (Tensor, Tensor)",
    _run_forward,
    _fake_forward,
    device=DEVICES,
)
_BACKWARD = define(
    "linear_scan_triton_backward(Tensor dh, Tensor dlast, Tensor a, Tensor h, Tensor? state, Tensor? starts)"
    " -> (Tensor, Tensor, Tensor)",
    _run_backward,
    _fake_backward,
    device=DEVICES,
)


def _save(ctx, inputs, outputs):
    a, _, state, starts = inputs
    ctx.save_for_backward(a, outputs[0], state, starts)


def _backward(ctx, dh, dlast):
    a, h, state, starts = ctx.saved_tensors
    da, db, dstate = _BACKWARD(dh, dlast, a, h, state, starts)
    return da, db, None if state is None else dstate.to(state.dtype), None


differentiable(_FORWARD, _save, _backward)


def linear_scan(a, b, state, starts):
    return _FORWARD(a, b, state, starts)
