"""The equation in plain PyTorch, with a weight for each pair of a token and a slot; everything in float32 or better."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from seqzoo.kernels.backends import accumulation_dtype

# What PyTorch's kernels cannot do.
VARIANTS = {
    "documents": {"documents": True},
    "window": {"window": 96, "sinks": 4, "documents": True},
    "prefix": {"window": 96, "prefix": 4, "documents": True},
    "forgetting": {"forgets": True, "prune": 1e-6},
    "cap and sink": {"soft_cap": 20.0, "sink": True},
}


def attention(q, k, v, decay, sink, first, cutoff, window, sinks, prefix, soft_cap, scale):
    """``decay`` is the running sum ``[batch head slot]`` of logarithms of what is forgotten; ``cutoff`` is not used."""
    wide, groups = accumulation_dtype(v), k.shape[2]
    # Heads that share keys are h of a group g.
    queries, keys, values = q.to(wide).unflatten(2, (groups, -1)), k.to(wide), v.to(wide)
    logits = torch.einsum("btghk,bsgk->bghts", queries, keys).flatten(1, 2) * scale
    if soft_cap is not None:
        logits = soft_cap * torch.tanh(logits / soft_cap)
    if decay is not None:
        own = decay[..., decay.shape[-1] - q.shape[1] :]
        logits = logits + (own[..., None] - decay[..., None, :]).to(wide)
    seen = visible(first, q.shape[1], k.shape[1], window, sinks, prefix, q.device)
    logits = logits.masked_fill(~seen[:, None], -torch.inf)
    if sink is not None:
        beside = sink.to(wide)[:, None, None].expand(*logits.shape[:-1], 1)
        logits = torch.cat([logits, beside], -1)
    weights = logits.softmax(-1)[..., : k.shape[1]].unflatten(1, (groups, -1))
    return torch.einsum("bghts,bsgv->btghv", weights, values).flatten(2, 3).to(v.dtype)


def visible(first, time, slots, window, sinks, prefix, device, begin=0, end=None):
    """Which slots, from ``begin`` to before ``end``, each token sees: ``[batch or 1, time, slot]`` of bools."""
    slot = torch.arange(begin, slots if end is None else end, device=device)
    own = torch.arange(slots - time, slots, device=device)[:, None]
    since = prefix if first is None else first[..., None]
    seen = (slot <= own) & (slot >= since)
    if window is not None:
        seen = seen & ((own - slot < window) | (slot - since < sinks))
    if prefix:
        seen = seen | (slot < prefix)
    return seen if first is not None else seen[None]


def example(
    batch: int = 2,
    time: int = 37,
    before: int = 0,
    groups: int = 2,
    heads: int = 4,
    key: int = 16,
    value: int = 16,
    documents: bool = False,
    forgets: bool = False,
    sink: bool = False,
    prefix: int = 0,
    dtype: torch.dtype = torch.float64,
    seed: int = 0,
    **settings: Any,
) -> dict[str, Any]:
    """Random inputs in legal ranges, as keyword arguments of the operator, with a prefix and slots from ``before``."""
    random = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=random, dtype=torch.float64).to(dtype)

    slots, wide = prefix + before + time, torch.promote_types(dtype, torch.float32)
    inputs: dict[str, Any] = {"q": draw(batch, time, heads, key)}
    inputs |= {"k": draw(batch, slots, groups, key), "v": draw(batch, slots, groups, value)}
    if forgets:
        inputs["log_forget"] = F.logsigmoid(draw(batch, slots, heads).to(wide) + 2)
    if sink:
        inputs["sink"] = draw(heads).to(wide)
    if documents:
        begins = torch.rand(batch, slots, generator=random) < 1 / 16
        first = torch.where(begins, torch.arange(slots), 0).cummax(1).values[:, prefix + before :]
        inputs["first"] = first.clamp(min=prefix)
    return inputs | ({"prefix": prefix} if prefix else {}) | settings
