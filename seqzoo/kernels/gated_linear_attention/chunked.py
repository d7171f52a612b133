"""Matmuls inside chunks, a short recurrence between them (Dao & Gu 2024, section 6; Yang et al. 2023, section 4).

With G the running sum of g inside a chunk and S the state that enters it:

    O = (Q e^G) S + (Q K^T o e^{G_i - G_j}) V,    S' = e^{G_C} S + (K e^{G_C - G})^T V

Differences of G are masked before ``exp``: above the diagonal they would overflow, and their gradient would be NaN.
"""

from __future__ import annotations

import torch
from einops import rearrange

from seqzoo.kernels.backends import accumulation_dtype
from seqzoo.kernels.chunks import Chunks

CHUNK = 64


def gated_linear_attention(q, k, v, log_decay, state, starts):
    dtype = accumulation_dtype(v)
    time, heads, groups = v.shape[1], v.shape[2], q.shape[2]
    chunks = Chunks(log_decay.to(dtype), starts, CHUNK)
    # Heads that share a query and key stand beside each other: [batch, chunk, group, token, share * value].
    q, k = (rearrange(chunks.split(z.to(dtype)), "b n c g k -> b n g c k") for z in (q, k))
    values = rearrange(chunks.split(v.to(dtype)), "b n c h v -> b n h c v")

    scores = (q @ k.mT).repeat_interleave(heads // groups, 2)
    within = (scores * chunks.decay_between()) @ values
    q, k = (z.repeat_interleave(heads // groups, 2) for z in (q, k))
    writes = (k * chunks.decay_to_end()[..., None]).mT @ values

    memory = writes.new_zeros(writes[:, 0].shape) if state is None else state.to(dtype)
    entering = []
    for write, keep in zip(writes.unbind(1), chunks.decay_over()[..., None, None].unbind(1), strict=True):
        entering.append(memory)
        memory = keep * memory + write
    o = within + (q * chunks.decay_from_start()[..., None]) @ torch.stack(entering, 1)
    return rearrange(o, "b n h c v -> b (n c) h v")[:, :time].to(v.dtype), memory
