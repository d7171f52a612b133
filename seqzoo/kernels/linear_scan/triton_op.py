"""The Triton kernels as ops of torch: one for the forward, one for the backward."""

from __future__ import annotations

from seqzoo.kernels.backends import accumulation_dtype
from seqzoo.kernels.torch_operators import define, differentiable
from seqzoo.kernels.triton_support import DEVICES, launcher


def _fake(a, b, state, starts):
    return b.new_empty(b.shape), b.new_empty(b.shape[0], b.shape[2], dtype=accumulation_dtype(b))


_FORWARD = define(
    "linear_scan_triton(Tensor a, Tensor b, Tensor? state, Tensor? starts) -> (Tensor h, Tensor last)",
    launcher("linear_scan", "forward"),
    _fake,
    device=DEVICES,
)
differentiable(
    _FORWARD,
    "h_grad, last_grad, a, h, state, starts -> a, h, state",
    launcher("linear_scan", "backward"),
    device=DEVICES,
)


def linear_scan(a, b, state, starts):
    return _FORWARD(a, b, state, starts)
