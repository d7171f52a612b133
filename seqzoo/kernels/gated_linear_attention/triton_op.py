"""The Triton kernels as ops of torch: one for the forward, one for the backward."""

from __future__ import annotations

import torch

from seqzoo.kernels.torch_operators import define, differentiable
from seqzoo.kernels.triton_support import DEVICES


def _run_forward(q, k, v, log_decay, bonus, state, starts):
    from seqzoo.kernels.gated_linear_attention import triton_kernels

    return triton_kernels.forward(q, k, v, log_decay, bonus, state, starts)


def _run_backward(dout, dlast, q, k, v, log_decay, bonus, state, starts):
    from seqzoo.kernels.gated_linear_attention import triton_kernels

    return triton_kernels.backward(dout, dlast, q, k, v, log_decay, bonus, state, starts)


def _fake_forward(q, k, v, log_decay, bonus, state, starts):
    last = v.new_empty(
        v.shape[0], v.shape[2], q.shape[3], v.shape[3], dtype=torch.promote_types(v.dtype, torch.float32)
    )
    return v.new_empty(v.shape), last


def _fake_backward(dout, dlast, q, k, v, log_decay, bonus, state, starts):
    return tuple(v.new_empty(0) if z is None else z.new_empty(z.shape) for z in (q, k, v, log_decay, bonus, state))


_FORWARD = define(
    "gated_linear_attention_triton(Tensor q, Tensor k, Tensor v, Tensor? log_decay, Tensor? bonus, Tensor? state,"
    " Tensor? starts) -> (Tensor, Tensor)",
    _run_forward,
    _fake_forward,
    device=DEVICES,
)
_BACKWARD = define(
    "gated_linear_attention_triton_backward(Tensor dout, Tensor dlast, Tensor q, Tensor k, Tensor v,"
    " Tensor? log_decay, Tensor? bonus, Tensor? state, Tensor? starts)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    _run_backward,
    _fake_backward,
    device=DEVICES,
)


def _save(ctx, inputs, outputs):
    ctx.save_for_backward(*inputs)


def _backward(ctx, dout, dlast):
    *inputs, starts = ctx.saved_tensors
    gradients = _BACKWARD(dout, dlast, *inputs, starts)
    return *(None if z is None else dz for z, dz in zip(inputs, gradients, strict=True)), None


differentiable(_FORWARD, _save, _backward)


def gated_linear_attention(q, k, v, log_decay, bonus, state, starts):
    return _FORWARD(q, k, v, log_decay, bonus, state, starts)
