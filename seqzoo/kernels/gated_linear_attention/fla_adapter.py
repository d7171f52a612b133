"""flash-linear-attention's kernels: RWKV-6's with a bonus, GLA's for a decay per channel, simple GLA's for the rest."""

from __future__ import annotations

from functools import partial

from seqzoo.kernels.adapters import by_documents, imported
from seqzoo.kernels.backends import share_heads
from seqzoo.kernels.gated_linear_attention.weights import weighted


def gated_linear_attention(q, k, v, log_decay, bonus, state, starts, write=None, skip=None):
    return weighted(_run, q, k, v, log_decay, bonus, state, starts, write, skip)


def _run(q, k, v, log_decay, bonus, state, starts):
    q, k = share_heads(q, v).to(v.dtype), share_heads(k, v).to(v.dtype)
    inputs = (q, k, v) if log_decay is None else (q, k, v, log_decay)
    run = _simple
    if bonus is not None:
        if log_decay is None:
            log_decay = q.new_zeros(q.shape[:3])
        per_channel = log_decay if log_decay.ndim == 4 else log_decay[..., None].expand(q.shape)
        inputs, run = (q, k, v, per_channel), partial(_rwkv6, bonus=bonus)
    elif log_decay is not None and log_decay.ndim == 4:
        run = _per_channel
    return by_documents(run, inputs, state, starts)


# Every kernel scales queries by key ** -0.5 unless it is told not to.


def _simple(q, k, v, log_decay=None, **documents):
    return imported("fla.ops.simple_gla", "chunk_simple_gla")(
        q=q, k=k, v=v, g=log_decay, scale=1.0, output_final_state=True, **documents
    )


def _per_channel(q, k, v, log_decay, **documents):
    return imported("fla.ops.gla", "chunk_gla")(
        q=q, k=k, v=v, g=log_decay, scale=1.0, output_final_state=True, **documents
    )


def _rwkv6(q, k, v, log_decay, *, bonus, **documents):
    return imported("fla.ops.rwkv6", "chunk_rwkv6")(
        r=q, k=k, v=v, w=log_decay, u=bonus, scale=1.0, output_final_state=True, **documents
    )
