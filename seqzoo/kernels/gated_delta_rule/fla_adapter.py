"""flash-linear-attention: KDA's kernels for a decay per channel, Gated DeltaNet's for a scalar, DeltaNet's for none."""

from __future__ import annotations

from seqzoo.kernels.adapters import by_documents, imported
from seqzoo.kernels.backends import share_heads


def gated_delta_rule(q, k, v, log_decay, beta, state, starts):
    q, k = share_heads(q, v).to(v.dtype), share_heads(k, v).to(v.dtype)
    if log_decay is None:
        return by_documents(_without_decay, (q, k, v, beta.to(v.dtype)), state, starts)
    return by_documents(_scalar if log_decay.ndim == 3 else _per_channel, (q, k, v, log_decay, beta), state, starts)


# By keyword: the order of g and beta differs between this package's own functions. Queries come scaled.


def _without_decay(q, k, v, beta, **documents):
    return imported("fla.ops.delta_rule", "chunk_delta_rule")(
        q=q, k=k, v=v, beta=beta, scale=1.0, output_final_state=True, **documents
    )


def _scalar(q, k, v, log_decay, beta, **documents):
    return imported("fla.ops.gated_delta_rule", "chunk_gated_delta_rule")(
        q=q, k=k, v=v, g=log_decay, beta=beta, scale=1.0, output_final_state=True, **documents
    )


def _per_channel(q, k, v, log_decay, beta, **documents):
    return imported("fla.ops.kda", "chunk_kda")(
        q=q, k=k, v=v, g=log_decay, beta=beta, scale=1.0, output_final_state=True, **documents
    )
