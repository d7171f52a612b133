"""A triangular inverse inside each chunk, a short recurrence between chunks.

With G the running sum of g inside a chunk, S the state that enters it, A_xy the products x_i . y_j decayed from j to i,
below the diagonal where x is read before the decay (a) and with it where after (q), and z_i = a_i^T S_{i-1}:

    Z = (I - A_ab)^{-1} (A_ak V + (a e^{G-g}) S),    O = A_qk V + A_qb Z + (q e^G) S,
    S' = e^{G_C} S + (K e^{G_C - G})^T V + (B e^{G_C - G})^T Z
"""

from __future__ import annotations

import torch
from einops import rearrange

from seqzoo.kernels.backends import accumulation_dtype
from seqzoo.kernels.chunks import ChannelChunks, UnitLowerInverse
from seqzoo.kernels.segments import by_segments

CHUNK = 32


def dplr_delta_rule(q, k, v, a, b, log_decay, state, starts):
    return by_segments(_segment, (q, k, v, a, b, log_decay), state, starts)


def _segment(q, k, v, a, b, log_decay, state, starts):
    dtype, time = accumulation_dtype(v), v.shape[1]
    chunks = ChannelChunks(log_decay.to(dtype), starts, CHUNK)
    q, k, v_, a, b = (rearrange(chunks.split(z.to(dtype)), "b n c h d -> b n h c d") for z in (q, k, v, a, b))
    to_end = chunks.decay_to_end()

    solve = UnitLowerInverse.apply(-chunks.scores(a, b, before=True))
    read_values = solve @ (chunks.scores(a, k, before=True) @ v_)
    read_state = solve @ (a * chunks.decay_from_start(before=True))
    writes = (k * to_end).mT @ v_
    steps = read_values, read_state, writes, (b * to_end).mT, chunks.decay_over()[..., None]

    memory = torch.zeros_like(writes[:, 0]) if state is None else state.to(dtype)
    entering, readings = [], []
    for value, read, write, rewrite, keep in zip(*(z.unbind(1) for z in steps), strict=True):
        reading = value + read @ memory
        entering.append(memory)
        readings.append(reading)
        memory = keep * memory + write + rewrite @ reading
    o = (q * chunks.decay_from_start()) @ torch.stack(entering, 1)
    o = o + chunks.scores(q, k) @ v_ + chunks.scores(q, b) @ torch.stack(readings, 1)
    return rearrange(o, "b n h c d -> b (n c) h d")[:, :time].to(v.dtype), memory
