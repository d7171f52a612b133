"""Steps as tokens of the gated delta rule: a token's decay and its document's start stand on its first step."""

from __future__ import annotations

import torch
from torch import Tensor


def gated_delta_product(rule, q, k, v, log_decay, beta, state, starts):
    """Run ``rule``, an implementation of the gated delta rule, over all steps, and keep each token's last output."""
    steps = k.shape[2]
    k, v, beta = (x.flatten(1, 2) for x in (k, v, beta))
    log_decay, starts = (x if x is None else _on_first_step(x, steps) for x in (log_decay, starts))
    o, memory = rule(q.repeat_interleave(steps, 1), k, v, log_decay, beta, state, starts)
    return o.unflatten(1, (-1, steps))[:, :, -1], memory


def _on_first_step(x: Tensor, steps: int) -> Tensor:
    others = x.new_zeros(*x.shape[:2], steps - 1, *x.shape[2:])
    return torch.cat([x[:, :, None], others], 2).flatten(1, 2)
