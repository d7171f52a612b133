"""PyTorch's own kernels, where they need no mask of all pairs: all that came before is visible, or one token looks.

On the CPU they keep a weight for each pair where keys and values differ in size: there only when asked for.
"""

from __future__ import annotations

import torch.nn.functional as F

from seqzoo.kernels.attention.reference import visible


def serves(q, k, log_forget, sink, first, window, soft_cap) -> bool:
    """Whether they can run it so."""
    if log_forget is not None or sink is not None or soft_cap is not None:
        return False
    return q.shape[1] == 1 or (q.shape[1] == k.shape[1] and first is None and window is None)


def is_fused(q, v) -> bool:
    """Whether they keep no weight for each pair."""
    return q.device.type != "cpu" or q.shape[3] == v.shape[3]


def attention(q, k, v, decay, sink, first, cutoff, window, sinks, prefix, soft_cap, scale):
    time, slots, groups = q.shape[1], k.shape[1], k.shape[2]
    seen, causal, shared = None, False, False
    if first is not None or window is not None:
        seen = visible(first, time, slots, window, sinks, prefix, q.device)[:, None]
    elif time == slots:  # as branches, for where sizes are symbols a comparison is none of bool
        causal = True
    if q.shape[2] > groups:
        shared = True
    if time == 1:
        # Heads that share keys are rows of one product, where PyTorch would copy keys for each.
        q = q.squeeze(1).unflatten(1, (groups, -1))
        o = F.scaled_dot_product_attention(q, k.transpose(1, 2), v.transpose(1, 2), seen, scale=scale)
        return o.flatten(1, 2)[:, None]
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, seen, is_causal=causal, scale=scale, enable_gqa=shared).transpose(
        1, 2
    )
