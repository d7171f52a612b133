"""The WY form: a triangular inverse inside each chunk, a short recurrence between chunks (Yang et al. 2024, section 3).

With G the running sum of g inside a chunk, S the state that enters it, and M_ij = beta_i (k_i . k_j) e^{G_i - G_j} for
j < i:

    N = (I + M)^{-1} (beta V - (beta K e^G) S),    O = (Q e^G) S + (Q K^T o e^{G_i - G_j}) N,
    S' = e^{G_C} S + (K e^{G_C - G})^T N
"""

from __future__ import annotations

import torch
from einops import rearrange

from seqzoo.kernels.backends import accumulation_dtype, share_heads
from seqzoo.kernels.chunks import Chunks, UnitLowerInverse

CHUNK = 32


def gated_delta_rule(q, k, v, log_decay, beta, state, starts):
    dtype, time = accumulation_dtype(v), v.shape[1]
    chunks = Chunks(log_decay.to(dtype), starts, CHUNK)
    inputs = (share_heads(q, v), share_heads(k, v), v)
    q, k, wide_v = (rearrange(chunks.split(z.to(dtype)), "b n c h d -> b n h c d") for z in inputs)
    beta = rearrange(chunks.split(beta.to(dtype)), "b n c h -> b n h c 1")
    between, from_start = chunks.decay_between(), chunks.decay_from_start()[..., None]

    written = beta * k
    solve = UnitLowerInverse.apply((written @ k.mT) * between)
    values, reads = solve @ (beta * wide_v), solve @ (written * from_start)
    writes = (k * chunks.decay_to_end()[..., None]).mT

    batch, _, heads, _, key = k.shape
    memory = k.new_zeros(batch, heads, key, v.shape[-1]) if state is None else state.to(dtype)
    entering, corrected = [], []
    steps = (values, reads, writes, chunks.decay_over()[..., None, None])
    for value, read, write, keep in zip(*(z.unbind(1) for z in steps), strict=True):
        new = value - read @ memory
        entering.append(memory)
        corrected.append(new)
        memory = keep * memory + write @ new
    o = (q * from_start) @ torch.stack(entering, 1) + (q @ k.mT * between) @ torch.stack(corrected, 1)
    return rearrange(o, "b n h c d -> b (n c) h d")[:, :time].to(v.dtype), memory
