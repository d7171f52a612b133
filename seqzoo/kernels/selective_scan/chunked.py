"""Segments of tokens, each scanned in parallel in plain torch; the backward walks them again from their first states.

A segment's decays and states take ``tokens x channel x state`` numbers, the largest thing there is at any time. Kept
for the backward are the inputs and one state a segment.
"""

from __future__ import annotations

import torch.nn.functional as F

from seqzoo.kernels.backends import accumulation_dtype
from seqzoo.kernels.linear_scan.chunked import LinearScan
from seqzoo.kernels.segments import by_segments
from seqzoo.kernels.selective_scan.reference import LINEAR_FROM

SEGMENT = 64


def selective_scan(x, dt, A, B, C, D, gate, dt_bias, state, starts):
    dtype = accumulation_dtype(x)
    A, (D, dt_bias) = A.to(dtype), (z if z is None else z.to(dtype) for z in (D, dt_bias))

    def run(x, dt, B, C, gate, memory, starts):
        u, dt, B, C = (z.to(dtype) for z in (x, dt, B, C))
        delta = F.softplus(dt if dt_bias is None else dt + dt_bias, threshold=LINEAR_FROM)
        decay = (delta[..., None] * A).exp()
        if starts is not None:
            decay = decay.masked_fill(starts[..., None, None], 0)
        writes = (delta * u)[..., None] * B[:, :, None]
        states, memory = LinearScan.apply(decay.flatten(2), writes.flatten(2), memory.flatten(1))
        y = (states.unflatten(2, A.shape) @ C[..., None]).squeeze(-1)
        if D is not None:
            y = y + D * u
        if gate is not None:
            y = y * F.silu(gate.to(dtype))
        return y.to(x.dtype), memory.unflatten(1, A.shape)

    memory = A.new_zeros(len(x), *A.shape) if state is None else state.to(dtype)
    return by_segments(run, (x, dt, B, C, gate), memory, starts, SEGMENT)
