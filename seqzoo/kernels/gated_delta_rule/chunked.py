"""The WY form: a triangular inverse inside each chunk, a short recurrence between chunks (Yang et al. 2024, section 3).

With G the running sum of g inside a chunk, S the state that enters it, and M_ij = beta_i (k_i . k_j e^{G_i - G_j}) for
j < i, where decays of key channels act inside the product:

    N = (I + M)^{-1} (beta V - (beta K e^G) S),    O = (Q e^G) S + (Q K^T e^{G_i - G_j}) N,
    S' = e^{G_C} S + (K e^{G_C - G})^T N
"""

from __future__ import annotations

import torch
from einops import rearrange
from torch import Tensor

from seqzoo.kernels.backends import accumulation_dtype, share_heads
from seqzoo.kernels.chunks import ChannelChunks, Chunks, UnitLowerInverse
from seqzoo.kernels.segments import by_segments

# The most tokens in a chunk. It has no more than the keys have channels: among more, keys depend on each other, and the
# errors of the inverse grow.
CHUNK = 32
SHORTEST_CHUNK = 8


def gated_delta_rule(q, k, v, log_decay, beta, state, starts):
    return by_segments(_segment, (q, k, v, log_decay, beta), state, starts)


def _segment(q, k, v, log_decay, beta, state, starts):
    dtype, time = accumulation_dtype(v), v.shape[1]
    log_decay = torch.zeros_like(beta, dtype=dtype) if log_decay is None else log_decay.to(dtype)
    chunks = (Chunks if log_decay.ndim == 3 else ChannelChunks)(log_decay, starts, _chunk_of(q))
    inputs = share_heads(q, v), share_heads(k, v), v, beta[..., None]
    q, k, values, beta = (rearrange(chunks.split(z.to(dtype)), "b n c h d -> b n h c d") for z in inputs)
    reads, writes, keeps = chunks.decay_from_start(), chunks.decay_to_end(), chunks.decay_over()
    written = beta * k
    if isinstance(chunks, Chunks):
        between = chunks.decay_between()
        scores, overlaps = (q @ k.mT) * between, (written @ k.mT) * between
        reads, writes, keeps = reads[..., None], writes[..., None], keeps[..., None]
    else:
        scores, overlaps = chunks.scores(q, k), chunks.scores(written, k)

    solve = UnitLowerInverse.apply(overlaps)
    steps = solve @ (beta * values), solve @ (written * reads), (k * writes).mT, keeps[..., None]
    batch, _, heads, _, key = k.shape
    memory = k.new_zeros(batch, heads, key, v.shape[-1]) if state is None else state.to(dtype)
    entering, corrected = [], []
    for value, read, write, keep in zip(*(z.unbind(1) for z in steps), strict=True):
        new = value - read @ memory
        entering.append(memory)
        corrected.append(new)
        memory = keep * memory + write @ new
    o = (q * reads) @ torch.stack(entering, 1) + scores @ torch.stack(corrected, 1)
    return rearrange(o, "b n h c d -> b (n c) h d")[:, :time].to(v.dtype), memory


def _chunk_of(q: Tensor) -> int:
    power_of_two = 1 << (q.shape[-1].bit_length() - 1)
    return min(max(power_of_two, SHORTEST_CHUNK), CHUNK)
