"""Rows of queries against all slots, for any device; each chunk of them is computed again in the backward pass.

Within an earlier block b the weights are g_ib softmax_j(s_ij), and g is a softmax: so all weights of a query are one
softmax over its slots, of s_ij in its own block and of s_ij - logsumexp_{j in b} s_ij + l_ib in earlier ones.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from seqzoo.kernels.backends import accumulation_dtype

# Logits that are in memory at a time, of which there are some copies.
ROOM = 1 << 22


def landmark_attention(q, k, v, landmarks, place, block, top_k, scale):
    time, slots, heads = q.shape[1], k.shape[1], q.shape[2]
    size = max(1, min(time, ROOM // max(1, len(q) * heads * slots)))
    wide = accumulation_dtype(v)
    slot = torch.arange(slots, device=q.device)
    # The slot where each one's block ends, if it does.
    ends = slot - place % block + block - 1
    keys, values, marks = (x.to(wide).transpose(1, 2) for x in (k, v, landmarks))
    outputs, own = [], slot[slots - time :]
    for rows, mine, before in zip(
        q.split(size, 1), own.split(size), place[:, slots - time :].split(size, 1), strict=True
    ):
        inputs = rows, keys, values, marks, mine, before, ends, block, top_k, scale
        if torch.is_grad_enabled():
            outputs.append(checkpoint(_attend, *inputs, use_reentrant=False, preserve_rng_state=False))
        else:
            outputs.append(_attend(*inputs))
    return torch.cat(outputs, 1).to(v.dtype)


def _attend(q, keys, values, marks, own, place, ends, block, top_k, scale) -> Tensor:
    """Outputs ``[batch token head value]`` of tokens in the slots ``own``, before which ``place`` of theirs stand."""
    time, groups, slots = q.shape[1], *keys.shape[1:3]
    # Heads that share keys are so many more rows of a group.
    q = (q.to(keys.dtype).unflatten(2, (groups, -1)).permute(0, 2, 3, 1, 4) * scale).flatten(2, 3)
    logits = (q @ keys.mT).unflatten(2, (-1, time)).flatten(1, 2)
    slot = torch.arange(slots, device=q.device)
    first = own - place
    begin = (own - place % block)[:, None, :, None]
    visible = (slot <= own[:, None])[None, None] & (slot >= first[:, None, :, None])
    earlier = visible & (slot < begin)
    nothing = logits.new_tensor(-torch.inf)

    # Of each block, in the slot of its last token: the sum of its weights, and its landmark's logit.
    index = ends.clamp(max=slots - 1)[:, None, None].expand(logits.shape)
    hidden = torch.where(earlier, logits, nothing)
    most = torch.full_like(logits, -torch.inf).scatter_reduce(3, index, hidden.detach(), "amax").gather(3, index)
    most = torch.where(earlier, most, 0)
    shares = torch.where(earlier, (hidden - most).exp(), 0)
    sums = torch.zeros_like(logits).scatter_add(3, index, shares).gather(3, index)
    of_blocks = (q @ marks.mT).unflatten(2, (-1, time)).flatten(1, 2)
    if top_k is not None and top_k * block < slots:
        is_end = (slot == ends)[:, None, None] & earlier
        candidates = torch.where(is_end, of_blocks, nothing)
        least = candidates.topk(top_k, -1).values[..., -1:]
        of_blocks = torch.where(of_blocks >= least, of_blocks, nothing)
    of_blocks = of_blocks.gather(3, index)

    through = of_blocks + torch.where(earlier, logits - most - sums.clamp(min=torch.finfo(sums.dtype).tiny).log(), 0)
    weights = torch.where(earlier, through, torch.where(visible, logits, nothing)).softmax(-1)
    values = weights.unflatten(1, (groups, -1)).flatten(2, 3) @ values
    return values.unflatten(2, (-1, time)).flatten(1, 2).transpose(1, 2)
