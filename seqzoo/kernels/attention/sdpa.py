"""PyTorch's own kernels, where nothing but the order of tokens says what is visible."""

from __future__ import annotations

import torch.nn.functional as F


def serves(q, k, log_forget, sink, first, window, soft_cap) -> bool:
    """Whether they can run it without a mask: all is visible that came before, and all of it is here."""
    special = log_forget is not None or sink is not None or first is not None or window is not None
    return not special and soft_cap is None and q.shape[1] in (1, k.shape[1])


def attention(q, k, v, decay, sink, first, cutoff, window, sinks, soft_cap, scale):
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    several, shared = q.shape[2] > 1, q.shape[1] > k.shape[1]
    o = F.scaled_dot_product_attention(q, k, v, is_causal=several, scale=scale, enable_gqa=shared)
    return o.transpose(1, 2)
