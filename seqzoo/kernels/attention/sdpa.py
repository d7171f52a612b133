"""PyTorch's own kernels, where they need no mask of all pairs: all that came before is visible, or one token looks."""

from __future__ import annotations

import torch.nn.functional as F

from seqzoo.kernels.attention.reference import visible


def serves(q, k, log_forget, sink, first, window, soft_cap) -> bool:
    """Whether they can run it so."""
    if log_forget is not None or sink is not None or soft_cap is not None:
        return False
    return q.shape[1] == 1 or (q.shape[1] == k.shape[1] and first is None and window is None)


def attention(q, k, v, decay, sink, first, cutoff, window, sinks, soft_cap, scale):
    time, slots, shared = q.shape[1], k.shape[1], q.shape[2] > k.shape[2]
    seen = None
    if first is not None or window is not None:
        seen = visible(first, time, slots, window, sinks, q.device)[:, None]
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    o = F.scaled_dot_product_attention(
        q, k, v, seen, is_causal=seen is None and time == slots, scale=scale, enable_gqa=shared
    )
    return o.transpose(1, 2)
