"""The Triton kernels as ops of torch: one for the forward, one for the backward."""

from __future__ import annotations

from seqzoo.kernels.torch_operators import define, differentiable
from seqzoo.kernels.triton_support import DEVICES


def _run_forward(x, weight, bias, state, starts, silu):
    from seqzoo.kernels.short_conv import triton_kernels

    return triton_kernels.forward(x, weight, bias, state, starts, silu)


def _run_backward(dy, dlast, x, weight, bias, state, starts, silu):
    from seqzoo.kernels.short_conv import triton_kernels

    return triton_kernels.backward(dy, dlast, x, weight, bias, state, starts, silu)


def _fake_forward(x, weight, bias, state, starts, silu):
    return x.new_empty(x.shape), x.new_empty(x.shape[0], weight.shape[1] - 1, x.shape[2])


def _fake_backward(dy, dlast, x, weight, bias, state, starts, silu):
    return tuple(x.new_empty(0) if z is None else z.new_empty(z.shape) for z in (x, weight, bias, state))


_FORWARD = define(
    "short_conv_triton(Tensor x, Tensor weight, Tensor? bias, Tensor? state, Tensor? starts, bool silu)"
    " -> (Tensor, Tensor)",
    _run_forward,
    _fake_forward,
    device=DEVICES,
)
_BACKWARD = define(
    "short_conv_triton_backward(Tensor dy, Tensor dlast, Tensor x, Tensor weight, Tensor? bias, Tensor? state,"
    " Tensor? starts, bool silu) -> (Tensor, Tensor, Tensor, Tensor)",
    _run_backward,
    _fake_backward,
    device=DEVICES,
)


def _save(ctx, inputs, outputs):
    *tensors, ctx.silu = inputs
    ctx.save_for_backward(*tensors)


def _backward(ctx, dy, dlast):
    x, weight, bias, state, starts = ctx.saved_tensors
    gradients = _BACKWARD(dy, dlast, x, weight, bias, state, starts, ctx.silu)
    inputs = (x, weight, bias, state)
    return *(None if z is None else dz for z, dz in zip(inputs, gradients, strict=True)), None, None


differentiable(_FORWARD, _save, _backward)


def short_conv(x, weight, bias, state, starts, activation):
    return _FORWARD(x, weight, bias, state, starts, activation == "silu")
