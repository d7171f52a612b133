"""The Triton kernels as ops of torch: one for the forward, one for the backward."""

from __future__ import annotations

import torch

from seqzoo.kernels.torch_operators import define, differentiable
from seqzoo.kernels.triton_support import DEVICES, launcher

# Tokens in a chunk.
CHUNK = 64
# So few tokens are stepped one by one, and make one short chunk in the backward.
FEW = 16
# Chunks of all heads together whose matrices are in memory at a time. More would gain no speed: they fill any GPU.
CELLS = 2048


def segment(heads: int) -> int:
    """Tokens in a segment of ``heads`` heads, all rows of the batch together."""
    return max(CELLS // max(heads, 1), 4) * CHUNK


def _fake(q, k, v, log_decay, beta, state, starts):
    batch, time, heads, value = v.shape
    wide = torch.promote_types(v.dtype, torch.float32)
    shape = (batch, heads, q.shape[3], value)
    between_segments = (time - 1) // segment(batch * heads)
    return v.new_empty(v.shape), v.new_empty(shape, dtype=wide), v.new_empty((between_segments, *shape), dtype=wide)


_FORWARD = define(
    "gated_delta_rule_triton(Tensor q, Tensor k, Tensor v, Tensor? log_decay, Tensor beta, Tensor? state,"
    " Tensor? starts) -> (Tensor o, Tensor last, Tensor states)",
    launcher("gated_delta_rule", "forward"),
    _fake,
    device=DEVICES,
)
differentiable(
    _FORWARD,
    "o_grad, last_grad, q, k, v, log_decay, beta, state, starts, states -> q, k, v, log_decay, beta, state",
    launcher("gated_delta_rule", "backward"),
    device=DEVICES,
)


def gated_delta_rule(q, k, v, log_decay, beta, state, starts):
    return _FORWARD(q, k, v, log_decay, beta, state, starts)[:2]
