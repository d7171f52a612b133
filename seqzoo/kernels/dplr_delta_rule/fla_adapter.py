"""flash-linear-attention's kernels for a transition that is diagonal plus low rank."""

from __future__ import annotations

from seqzoo.kernels.adapters import by_documents, imported


def dplr_delta_rule(q, k, v, a, b, log_decay, state, starts):
    q, k, a, b = (x.to(v.dtype) for x in (q, k, a, b))
    return by_documents(_run, (q, k, v, a, b, log_decay), state, starts)


def _run(q, k, v, a, b, log_decay, **documents):
    # Queries come scaled.
    return imported("fla.ops.generalized_delta_rule", "chunk_dplr_delta_rule")(
        q=q, k=k, v=v, a=a, b=b, gk=log_decay, scale=1.0, output_final_state=True, **documents
    )  # fmt: skip
