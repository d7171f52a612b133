"""The Triton kernels as ops of torch: one for the forward, one for the backward."""

from __future__ import annotations

import torch

from seqzoo.kernels.gated_linear_attention.weights import weighted
from seqzoo.kernels.torch_operators import define, differentiable
from seqzoo.kernels.triton_support import DEVICES, launcher


def _fake(q, k, v, log_decay, bonus, state, starts):
    last = v.new_empty(
        v.shape[0], v.shape[2], q.shape[3], v.shape[3], dtype=torch.promote_types(v.dtype, torch.float32)
    )
    return v.new_empty(v.shape), last


_FORWARD = define(
    "gated_linear_attention_triton(Tensor q, Tensor k, Tensor v, Tensor? log_decay, Tensor? bonus, Tensor? state,"
    " Tensor? starts) -> (Tensor o, Tensor last)",
    launcher("gated_linear_attention", "forward"),
    _fake,
    device=DEVICES,
)
differentiable(
    _FORWARD,
    "o_grad, last_grad, q, k, v, log_decay, bonus, state, starts -> q, k, v, log_decay, bonus, state",
    launcher("gated_linear_attention", "backward"),
    device=DEVICES,
)


def gated_linear_attention(q, k, v, log_decay, bonus, state, starts, write=None, skip=None):
    return weighted(_FORWARD, q, k, v, log_decay, bonus, state, starts, write, skip)
