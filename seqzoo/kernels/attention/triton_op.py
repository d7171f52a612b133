"""The Triton kernels as ops of torch: one for the forward, one for the backward."""

from __future__ import annotations

from seqzoo.kernels.backends import accumulation_dtype
from seqzoo.kernels.torch_operators import define, differentiable
from seqzoo.kernels.triton_support import DEVICES, launcher

WIDEST = 256
"""Keys and values of a head: blocks hold whole ones."""


def serves(q, v) -> bool:
    """Whether they can run it so."""
    return max(q.shape[3], v.shape[3]) <= WIDEST


def _fake(q, k, v, decay, sink, first, cutoff, window, sinks, prefix, soft_cap, scale):
    batch, time, heads, _ = q.shape
    return q.new_empty(batch, time, heads, v.shape[3]), q.new_empty(batch, heads, time, dtype=accumulation_dtype(v))


_FORWARD = define(
    "attention_triton(Tensor q, Tensor k, Tensor v, Tensor? decay, Tensor? sink, Tensor? first, Tensor? cutoff,"
    " int window, int sinks, int prefix, float soft_cap, float scale) -> (Tensor o, Tensor sums)",
    launcher("attention", "forward"),
    _fake,
    device=DEVICES,
)
differentiable(
    _FORWARD,
    "o_grad, q, k, v, decay, sink, first, cutoff, o, sums, window, sinks, prefix, soft_cap, scale"
    " -> q, k, v, decay, sink",
    launcher("attention", "backward"),
    device=DEVICES,
)


def attention(q, k, v, decay, sink, first, cutoff, window, sinks, prefix, soft_cap, scale):
    """A window and a cap of 0 are none to the kernels."""
    decay, cutoff = (x if x is None else x.double() for x in (decay, cutoff))
    sink = None if sink is None else sink.to(accumulation_dtype(v))
    o, _ = _FORWARD(q, k, v, decay, sink, first, cutoff, window or 0, sinks, prefix, float(soft_cap or 0), scale)
    return o
