"""The equation in C++ (native.cpp), for the CPU: the backward reads the outputs, so nothing else is kept for it."""

from __future__ import annotations

import torch
from torch import Tensor

from seqzoo.kernels.backends import accumulation_dtype
from seqzoo.kernels.native.tensors import DTYPES, Function, dense
from seqzoo.kernels.torch_operators import define, differentiable

_forward = Function("linear_scan_forward")
_backward = Function("linear_scan_backward")
# Below this many outputs waking a second thread costs more than it saves.
SMALL = 1 << 15
# Ranges of channels are no narrower than this: memory is read in rows of them.
NARROWEST = 64


def linear_scan(a, b, state, starts):
    dtype, wide = b.dtype, accumulation_dtype(b)
    if dtype == torch.float16:
        b = b.float()
    if a.dtype not in (b.dtype, wide):
        a = a.to(wide)
    if state is not None and state.dtype != wide:
        state = state.to(wide)
    h, last = FORWARD(a, b, state, starts)
    return (h if h.dtype == dtype else h.to(dtype)), last


def _settings(a, b):
    """What both functions take first: dtypes, threads, ranges of channels, and how far apart the a's of tokens lie."""
    threads = torch.get_num_threads() if b.numel() > SMALL else 1
    batch, _, channels = b.shape
    parts = max(1, min(-(-2 * threads // max(batch, 1)), channels // NARROWEST)) if threads > 1 else 1
    dtype, a_dtype = (DTYPES[z.dtype.to_real() if z.is_complex() else z.dtype] for z in (b, a))
    return dtype, a_dtype, b.is_complex(), threads, parts, _width(b) if a.ndim == 3 else 0


def _width(b: Tensor) -> int:
    return b.shape[2] * (2 if b.is_complex() else 1)


def _run(a, b, state, starts):
    a, b, state, starts = dense(a, b, state, starts)
    h, last = _fake(a, b, state, starts)
    _forward(*_settings(a, b), a, b, state, starts, h, last, b.shape[0], b.shape[1], _width(b))
    return h, last


def _fake(a, b, state, starts):
    return b.new_empty(b.shape), b.new_empty(b.shape[0], b.shape[2], dtype=accumulation_dtype(b))


def _run_backward(h_grad, last_grad, a, h, state, starts):
    h_grad, last_grad, a, h, state, starts = dense(h_grad, last_grad, a, h, state, starts)
    da, db, dstate = a.new_empty(a.shape), h.new_empty(h.shape), last_grad.new_empty(last_grad.shape)
    by_row = da if a.ndim == 3 else dstate.new_empty(dstate.shape)
    sizes = h.shape[0], h.shape[1], _width(h)
    _backward(*_settings(a, h), a, h, state, starts, h_grad, last_grad, by_row, db, dstate, *sizes)
    return da if a.ndim == 3 else by_row.sum(0), db, dstate


FORWARD = define(
    "linear_scan_native(Tensor a, Tensor b, Tensor? state, Tensor? starts) -> (Tensor h, Tensor last)",
    _run,
    _fake,
    device="CPU",
)
differentiable(FORWARD, "h_grad, last_grad, a, h, state, starts -> a, h, state", _run_backward, device="CPU")
