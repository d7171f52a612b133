"""Gated linear attention: a decaying sum of key-value outer products, read by a query.

    S_t = e^{g_t} S_{t-1} + k_t v_t^T,    o_t = S_t^T q_t,    g_t <= 0

Mamba-2's state-space duality is this with q = C, k = B, v = dt x, g = A dt (Dao & Gu 2024, https://arxiv.org/abs/2405.21060);
RetNet is this with a constant g. Queries and keys may be shared by groups of consecutive heads.
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from seqzoo.kernels.backends import check_heads, choose
from seqzoo.kernels.backends import explain as _explain
from seqzoo.kernels.gated_linear_attention import chunked, reference

IMPLEMENTATIONS = {"reference": reference.gated_linear_attention, "chunked": chunked.gated_linear_attention}


def gated_linear_attention(
    q: Float[Tensor, "batch time group key"],
    k: Float[Tensor, "batch time group key"],
    v: Float[Tensor, "batch time head value"],
    log_decay: Float[Tensor, "batch time head"],
    state: Float[Tensor, "batch head key value"] | None = None,
    starts: Bool[Tensor, "batch time"] | None = None,
    *,
    backend: str = "auto",
) -> tuple[Float[Tensor, "batch time head value"], Float[Tensor, "batch head key value"]]:
    """Run the recurrence above over ``time``.

    Args:
        q: queries, unscaled: multiply by ``key ** -0.5`` where the layer's equation has it.
        k: keys.
        v: values; the number of heads must be a multiple of the number of groups.
        log_decay: g, at most 0.
        state: S after the tokens before, float32 (float64 for float64 inputs); None is zero.
        starts: True where a new document begins: the state is dropped before that token.
        backend: ``auto``, ``reference`` or ``chunked``.

    Returns:
        o in the dtype of ``v``, and S after the last token.

    Raises:
        ValueError: shapes do not fit together, or ``backend`` cannot serve.
    """
    check_heads("gated_linear_attention", q, k, v, {"log_decay": log_decay}, state, starts)
    run = IMPLEMENTATIONS[choose("gated_linear_attention", IMPLEMENTATIONS, backend, v, v.shape[1])]
    # Autocast would round every product inside: the operator itself chooses the precision of each step.
    with torch.autocast(v.device.type, enabled=False):
        return run(q, k, v, log_decay, state, starts)


def explain(time: int, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32) -> str:
    """Which implementation ``backend="auto"`` takes for ``time`` tokens, and why not the others."""
    return _explain("gated_linear_attention", IMPLEMENTATIONS, time, device, dtype)
