"""Matmuls inside chunks, a short recurrence between them (Dao & Gu 2024, section 6; Yang et al. 2023, section 4).

With G the running sum of g inside a chunk and S the state that enters it:

    O = (Q e^G) S + A V,    A_ij = sum_c q_ic k_jc e^{G_ic - G_jc} for j <= i,    S' = e^{G_C} S + (K e^{G_C - G})^T V

With a bonus the token reads ahead of its own decay: G_i - g_i stands for G_i in the reads, and A_ii = q_i . (u k_i).
"""

from __future__ import annotations

from functools import partial

import torch
from einops import rearrange

from seqzoo.kernels.backends import accumulation_dtype
from seqzoo.kernels.chunks import ChannelChunks, Chunks
from seqzoo.kernels.gated_linear_attention.weights import weighted
from seqzoo.kernels.segments import by_segments

CHUNK = 64


def gated_linear_attention(q, k, v, log_decay, bonus, state, starts, write=None, skip=None):
    return weighted(_by_segments, q, k, v, log_decay, bonus, state, starts, write, skip)


def _by_segments(q, k, v, log_decay, bonus, state, starts):
    return by_segments(partial(_segment, bonus), (q, k, v, log_decay), state, starts)


def _segment(bonus, q, k, v, log_decay, state, starts):
    dtype = accumulation_dtype(v)
    time, heads, groups = v.shape[1], v.shape[2], q.shape[2]
    log_decay = v.new_zeros(v.shape[:3], dtype=dtype) if log_decay is None else log_decay.to(dtype)
    chunks = (Chunks if log_decay.ndim == 3 else ChannelChunks)(log_decay, starts, CHUNK)
    before = bonus is not None
    q, k, values = (rearrange(chunks.split(z.to(dtype)), "b n c h d -> b n h c d") for z in (q, k, v))
    reads, writes, keeps = chunks.decay_from_start(before), chunks.decay_to_end(), chunks.decay_over()
    if isinstance(chunks, Chunks):
        # The products of a group's queries and keys are shared by its heads.
        scores = (q @ k.mT).repeat_interleave(heads // groups, 2) * chunks.decay_between(before)
        reads, writes, keeps = reads[..., None], writes[..., None], keeps[..., None]
    q, k = (z.repeat_interleave(heads // groups, 2) for z in (q, k))
    if isinstance(chunks, ChannelChunks):
        scores = chunks.scores(q, k, before)
    within = scores @ values
    if before:
        within = within + (q * bonus.to(dtype)[:, None] * k).sum(-1, keepdim=True) * values
    writes = (k * writes).mT @ values

    memory = torch.zeros_like(writes[:, 0]) if state is None else state.to(dtype)
    entering = []
    for write, keep in zip(writes.unbind(1), keeps[..., None].unbind(1), strict=True):
        entering.append(memory)
        memory = keep * memory + write
    o = within + (q * reads) @ torch.stack(entering, 1)
    return rearrange(o, "b n h c v -> b (n c) h v")[:, :time].to(v.dtype), memory
