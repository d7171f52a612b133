"""The Triton kernels as ops of torch: one for the forward, one for the backward."""

from __future__ import annotations

from seqzoo.kernels.backends import accumulation_dtype
from seqzoo.kernels.torch_operators import define, differentiable
from seqzoo.kernels.triton_support import DEVICES, launcher

TOKENS = 64
"""Of a tile. The states that enter each tile are kept for the backward, where there are several."""


def _fake(x, dt, A, B, C, D, gate, dt_bias, state, starts):
    (batch, time, channels), size = x.shape, A.shape[1]
    last = x.new_empty(batch, channels, size, dtype=accumulation_dtype(x))
    tiles = (time + TOKENS - 1) // TOKENS
    return x.new_empty(x.shape), last, last.new_empty((batch, tiles, size, channels) if time > TOKENS else (0,))


_FORWARD = define(
    "selective_scan_triton(Tensor x, Tensor dt, Tensor A, Tensor B, Tensor C, Tensor? D, Tensor? gate,"
    " Tensor? dt_bias, Tensor? state, Tensor? starts) -> (Tensor y, Tensor last, Tensor entering)",
    launcher("selective_scan", "forward"),
    _fake,
    device=DEVICES,
)
differentiable(
    _FORWARD,
    "y_grad, last_grad, x, dt, A, B, C, D, gate, dt_bias, state, starts, entering"
    " -> x, dt, A, B, C, D, gate, dt_bias, state",
    launcher("selective_scan", "backward"),
    device=DEVICES,
)


def selective_scan(x, dt, A, B, C, D, gate, dt_bias, state, starts):
    return _FORWARD(x, dt, A, B, C, D, gate, dt_bias, state, starts)[:2]
