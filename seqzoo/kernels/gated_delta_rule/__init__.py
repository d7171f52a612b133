"""The gated delta rule: a decaying memory that overwrites the value stored at a key.

    R_t = e^{g_t} S_{t-1},    S_t = R_t + beta_t k_t (v_t - R_t^T k_t)^T,    o_t = S_t^T q_t,    g_t <= 0

Gated DeltaNet has one g a head (Yang et al. 2024, https://arxiv.org/abs/2412.06464), Kimi Delta Attention one a key
channel (https://arxiv.org/abs/2510.26692), DeltaNet none (https://arxiv.org/abs/2406.06484). Queries and keys may be
shared by groups of consecutive heads.
"""

from __future__ import annotations

from jaxtyping import Bool, Float
from torch import Tensor

from seqzoo.kernels.backends import check_decay, check_heads, check_numbers, dispatch, explained
from seqzoo.kernels.gated_delta_rule import chunked, fla_adapter, native, reference, triton_op

IMPLEMENTATIONS = {
    "reference": reference.gated_delta_rule,
    "chunked": chunked.gated_delta_rule,
    "native": native.gated_delta_rule,
    "triton": triton_op.gated_delta_rule,
    "fla": fla_adapter.gated_delta_rule,
}
explain = explained("gated_delta_rule", IMPLEMENTATIONS)


def gated_delta_rule(
    q: Float[Tensor, "batch time group key"],
    k: Float[Tensor, "batch time group key"],
    v: Float[Tensor, "batch time head value"],
    log_decay: Float[Tensor, "batch time head"] | Float[Tensor, "batch time head key"] | None,
    beta: Float[Tensor, "batch time head"],
    state: Float[Tensor, "batch head key value"] | None = None,
    starts: Bool[Tensor, "batch time"] | None = None,
    *,
    backend: str = "auto",
) -> tuple[Float[Tensor, "batch time head value"], Float[Tensor, "batch head key value"]]:
    """Run the recurrence above over ``time``.

    Args:
        q: queries, unscaled: multiply by ``key ** -0.5`` where the layer's equation has it.
        k: keys of norm at most 1 (l2-normalised), or the memory may grow without bound.
        v: values; the number of heads must be a multiple of the number of groups.
        log_decay: g, at most 0, per head or per key channel; None is 0.
        beta: writing strength, 0 to 1; up to 2 for negative eigenvalues.
        state: S after the tokens before, float32 (float64 for float64 inputs); None is zero.
        starts: True where a new document begins: the state is dropped before that token.
        backend: ``auto`` or a name in ``IMPLEMENTATIONS``.

    Returns:
        o in the dtype of ``v``, and S after the last token.

    Raises:
        ValueError: shapes do not fit together, or ``backend`` cannot serve.
    """
    check_numbers("gated_delta_rule", starts, {"log_decay": log_decay, "state": state}, q=q, k=k, v=v, beta=beta)
    check_heads("gated_delta_rule", q, k, v, {"beta": beta}, state, starts)
    check_decay("gated_delta_rule", log_decay, q, v)
    return dispatch("gated_delta_rule", IMPLEMENTATIONS, backend, v, q, k, v, log_decay, beta, state, starts)
