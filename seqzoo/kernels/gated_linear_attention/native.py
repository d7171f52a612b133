"""The C++ kernels of native.cpp as operators of torch."""

from __future__ import annotations

import torch
from torch import Tensor

from seqzoo.kernels.backends import accumulation_dtype
from seqzoo.kernels.gated_linear_attention.weights import weighted
from seqzoo.kernels.native.tensors import DTYPES, Function, dense, fresh
from seqzoo.kernels.torch_operators import define, differentiable

# Up to so many tokens a matrix product gains nothing, and states of so many numbers stay in a core's cache.
SHORT, BLOCK = 16, 1 << 17
# Steps between states that the forward keeps for the backward, as in problem.h.
SPAN = 1024

_FORWARD = Function("gated_linear_attention_forward")
_BACKWARD = Function("gated_linear_attention_backward")


def gated_linear_attention(q, k, v, log_decay, bonus, state, starts, write=None, skip=None):
    if bonus is not None or (log_decay is not None and log_decay.ndim == 4):
        return weighted(_run_in_cpp, q, k, v, log_decay, bonus, state, starts, write, skip)
    return _run_in_cpp(q, k, v, log_decay, bonus, state, starts, write, skip)


def _run_in_cpp(q, k, v, log_decay, bonus, state, starts, write=None, skip=None):
    dtype, wide = v.dtype, accumulation_dtype(v)
    if dtype == torch.float16:
        q, k, v = q.float(), k.float(), v.float()
    more = (None if x is None else x.to(wide) for x in (log_decay, bonus, state, write, skip))
    inputs = q, k, v, *more
    keep = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in inputs)
    o, last, _ = FORWARD(*inputs, starts, keep)
    return o.to(dtype), last


def _blocks(q: Tensor, v: Tensor) -> int:
    """Into how many blocks the heads of a group are cut: one for each thread, or more where their states are large."""
    batch, _, groups, heads, key, value = _sizes(q, v)
    shared = heads // groups
    wanted = max(-(-torch.get_num_threads() // max(batch * groups, 1)), shared * key * value // BLOCK)
    most = -(-shared // min(shared, max(wanted, 1)))
    return -(-shared // most)


def _sizes(q: Tensor, v: Tensor) -> tuple[int, ...]:
    return *q.shape[:3], *v.shape[2:3], *q.shape[3:], *v.shape[3:]


def _run(q, k, v, log_decay, bonus, state, write, skip, starts, keep):
    o, last, kept = _fake(q, k, v, log_decay, bonus, state, write, skip, starts, keep)
    per_channel = log_decay is not None and log_decay.ndim == 4
    q, k, v, log_decay, bonus, state, starts, write, skip = dense(q, k, v, log_decay, bonus, state, starts, write, skip)
    blocks = 0 if per_channel or bonus is not None or v.shape[1] <= SHORT else _blocks(q, v)
    inputs = q, k, v, log_decay, per_channel, bonus, state, starts, write, skip
    fresh(o, last, kept)
    _FORWARD(DTYPES[v.dtype], torch.get_num_threads(), blocks, *_sizes(q, v), *inputs, o, last, kept if keep else None)
    return o, last, kept


def _fake(q, k, v, log_decay, bonus, state, write, skip, starts, keep):
    batch, time, _, heads, key, value = _sizes(q, v)
    # A bonus takes one step more than there are tokens.
    spans = (time + (bonus is not None) - 1) // SPAN if keep else 0
    wide = accumulation_dtype(v)
    last = v.new_empty(batch, heads, key, value, dtype=wide)
    return v.new_empty(v.shape), last, v.new_empty(batch, spans, heads, key, value, dtype=wide)


def _run_backward(o_grad, last_grad, kept, q, k, v, log_decay, bonus, state, write, skip, starts):
    per_channel = log_decay is not None and log_decay.ndim == 4
    o_grad, last_grad, q, k, v, log_decay, bonus, state, starts, write, skip = dense(
        o_grad, last_grad, q, k, v, log_decay, bonus, state, starts, write, skip
    )
    batch, _, _, heads, key, _ = sizes = _sizes(q, v)
    wide = accumulation_dtype(v)
    blocks = 0 if per_channel or bonus is not None else _blocks(q, v)
    parts = v.new_empty(2, blocks, *q.shape, dtype=wide) if blocks > 1 else None
    q_grad, k_grad, v_grad = q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)
    by_channel = () if blocks else (key,)
    decay_grad = None if log_decay is None else v.new_empty(*v.shape[:3], *by_channel, dtype=wide)
    bonus_grad = None if bonus is None else v.new_zeros(batch, heads, key, dtype=wide)
    state_grad = kept.new_empty(batch, *kept.shape[2:])
    write_grad = None if write is None else write.new_empty(write.shape)
    skip_grad = None if skip is None else skip.new_empty(batch, heads)
    inputs = q, k, v, log_decay, per_channel, bonus, state, starts, write, skip, o_grad, last_grad, kept
    gradients = q_grad, k_grad, v_grad, decay_grad, bonus_grad, state_grad, write_grad, skip_grad, parts
    fresh(*gradients)
    _BACKWARD(DTYPES[v.dtype], torch.get_num_threads(), blocks, *sizes, *inputs, *gradients)
    if decay_grad is not None and decay_grad.ndim == 4 and not per_channel:
        decay_grad = decay_grad.sum(-1)
    bonus_grad, skip_grad = (None if x is None else x.sum(0) for x in (bonus_grad, skip_grad))
    return q_grad, k_grad, v_grad, decay_grad, bonus_grad, state_grad, write_grad, skip_grad


FORWARD = define(
    "gated_linear_attention_native(Tensor q, Tensor k, Tensor v, Tensor? log_decay, Tensor? bonus, Tensor? state,"
    " Tensor? write, Tensor? skip, Tensor? starts, bool keep) -> (Tensor o, Tensor last, Tensor kept)",
    _run,
    _fake,
    device="CPU",
)
differentiable(
    FORWARD,
    "o_grad, last_grad?, kept, q, k, v, log_decay, bonus, state, write, skip, starts"
    " -> q, k, v, log_decay, bonus, state, write, skip",
    _run_backward,
    device="CPU",
)
