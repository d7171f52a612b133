"""The equation in plain PyTorch, with a weight for each pair of a token and a slot; everything in float32 or better."""

from __future__ import annotations

import torch

from seqzoo.kernels.backends import accumulation_dtype


def attention(q, k, v, decay, sink, first, cutoff, window, sinks, soft_cap, scale):
    """``decay`` is the running sum ``[batch head slot]`` of logarithms of what is forgotten; ``cutoff`` is not used."""
    wide, shared = accumulation_dtype(v), q.shape[2] // k.shape[2]
    keys, values = (x.to(wide).repeat_interleave(shared, 2) for x in (k, v))
    logits = torch.einsum("bthk,bshk->bhts", q.to(wide), keys) * scale
    if soft_cap is not None:
        logits = soft_cap * torch.tanh(logits / soft_cap)
    if decay is not None:
        own = decay[..., decay.shape[-1] - q.shape[1] :]
        logits = logits + (own[..., None] - decay[..., None, :]).to(wide)
    seen = visible(first, q.shape[1], k.shape[1], window, sinks, q.device)
    logits = logits.masked_fill(~seen[:, None], -torch.inf)
    if sink is not None:
        beside = sink.to(wide)[:, None, None].expand(*logits.shape[:-1], 1)
        logits = torch.cat([logits, beside], -1)
    weights = logits.softmax(-1)[..., : k.shape[1]]
    return torch.einsum("bhts,bshv->bthv", weights, values).to(v.dtype)


def visible(first, time, slots, window, sinks, device, begin=0, end=None):
    """Which slots, from ``begin`` to before ``end``, each token sees: ``[batch or 1, time, slot]`` of bools."""
    slot = torch.arange(begin, slots if end is None else end, device=device)
    own = torch.arange(slots - time, slots, device=device)[:, None]
    since = 0 if first is None else first[..., None]
    seen = (slot <= own) & (slot >= since)
    if window is not None:
        seen = seen & ((own - slot < window) | (slot - since < sinks))
    return seen if first is not None else seen[None]
