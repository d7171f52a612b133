"""The operators of torch that stand on native.cpp."""

from __future__ import annotations

import torch
from torch import Tensor

from seqzoo.kernels.backends import accumulation_dtype
from seqzoo.kernels.native.tensors import DTYPES, Function, dense
from seqzoo.kernels.torch_operators import define, differentiable

# native.cpp has the same: tokens between two states that are kept for the backward, and the most channels in a vector.
BLOCK, LANES = 64, 16
# Ranges of channels for each thread: more of them wait less for the slowest, fewer read memory in longer rows.
RANGES = 2

_FORWARD = Function("selective_scan_forward")
_BACKWARD = Function("selective_scan_backward")


def selective_scan(x, dt, A, B, C, D, gate, dt_bias, state, starts):
    out, wide = x.dtype, accumulation_dtype(x)
    if out == torch.float16:
        x, B, C = x.float(), B.float(), C.float()
        gate = None if gate is None else gate.float()
    if dt.dtype not in (x.dtype, wide):
        dt = dt.to(wide)
    A, D, dt_bias, state = (z if z is None else z.to(wide) for z in (A, D, dt_bias, state))
    inputs = (x, dt, A, B, C, D, gate, dt_bias, state)
    keep = torch.is_grad_enabled() and any(z is not None and z.requires_grad for z in inputs)
    y, last, _ = FORWARD(*inputs, starts, keep)
    return y.to(out), last


def _parts(x: Tensor) -> int:
    """How many ranges of channels a batch row is cut into."""
    wanted = -(-RANGES * torch.get_num_threads() // max(1, x.shape[0]))
    return max(1, min(wanted, x.shape[2] // LANES))


def _run(x, dt, A, B, C, D, gate, dt_bias, state, starts, keep):
    x, dt, A, B, C, D, gate, dt_bias, state, starts = dense(x, dt, A, B, C, D, gate, dt_bias, state, starts)
    y, last, kept = _fake(x, dt, A, B, C, D, gate, dt_bias, state, starts, keep)
    kinds = DTYPES[x.dtype], DTYPES[dt.dtype], torch.get_num_threads(), _parts(x)
    inputs = (x, dt, A, B, C, D, gate, dt_bias, state, starts)
    _FORWARD(*kinds, *inputs, y, last, kept if keep else None, *x.shape, A.shape[1])
    return y, last, kept


def _fake(x, dt, A, B, C, D, gate, dt_bias, state, starts, keep):
    batch, time, channels = x.shape
    entries = A.shape[1]
    # Whole vectors of channels, for any width of vectors, and entries in fours.
    padded = -(-channels // LANES) * LANES * (-(-entries // 4) * 4)
    blocks = -(-time // BLOCK) if keep else 0
    return x.new_empty(x.shape), A.new_empty(batch, channels, entries), A.new_empty(batch, blocks, padded)


def _run_back(y_grad, last_grad, x, dt, A, B, C, D, gate, dt_bias, state, starts, kept):
    x, dt, A, B, C, D, gate, dt_bias, starts, kept, y_grad, last_grad = dense(
        x, dt, A, B, C, D, gate, dt_bias, starts, kept, y_grad, last_grad
    )
    dx, ddt, dB, dC, dgate = (None if z is None else z.new_empty(z.shape) for z in (x, dt, B, C, gate))
    dstate = last_grad.new_empty(last_grad.shape)
    # One row of each for each batch row, added up below.
    by_row = [z if z is None else z.new_empty(len(x), *z.shape) for z in (A, D, dt_bias)]
    dA, dD, ddt_bias = by_row
    kinds = DTYPES[x.dtype], DTYPES[dt.dtype], torch.get_num_threads(), _parts(x)
    inputs = (x, dt, A, B, C, D, gate, dt_bias, starts, kept, y_grad, last_grad)
    outputs = (dx, ddt, dA, dB, dC, dD, dgate, ddt_bias, dstate)
    _BACKWARD(*kinds, *inputs, *outputs, *x.shape, A.shape[1])
    dA, dD, ddt_bias = (None if z is None else z.sum(0) for z in by_row)
    return dx, ddt, dA, dB, dC, dD, dgate, ddt_bias, dstate


FORWARD = define(
    "selective_scan_native(Tensor x, Tensor dt, Tensor A, Tensor B, Tensor C, Tensor? D, Tensor? gate, "
    "Tensor? dt_bias, Tensor? state, Tensor? starts, bool keep) -> (Tensor y, Tensor last, Tensor kept)",
    _run,
    _fake,
    device="CPU",
)
differentiable(
    FORWARD,
    "y_grad, last_grad, x, dt, A, B, C, D, gate, dt_bias, state, starts, kept"
    " -> x, dt, A, B, C, D, gate, dt_bias, state",
    _run_back,
    device="CPU",
)
