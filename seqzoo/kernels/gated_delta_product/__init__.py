"""The gated delta product: a decaying memory that takes several delta updates a token before it is read.

    R_0 = e^{g_t} S_{t-1},    R_j = R_{j-1} + beta_tj k_tj (v_tj - R_{j-1}^T k_tj)^T,    S_t = R_n,    o_t = S_t^T q_t

A token's transition is then a product of n Householder-like matrices, which one delta rule cannot express
(Siems et al. 2025, https://arxiv.org/abs/2502.10297). Queries and keys may be shared by groups of consecutive heads.
"""

from __future__ import annotations

from functools import partial

from jaxtyping import Bool, Float
from torch import Tensor

from seqzoo.kernels import gated_delta_rule as _rule
from seqzoo.kernels.backends import check_decay, check_heads, check_numbers, check_shape, dispatch, explained
from seqzoo.kernels.gated_delta_product import interleaved, reference

IMPLEMENTATIONS = {"reference": reference.gated_delta_product} | {
    name: partial(interleaved.gated_delta_product, rule)
    for name, rule in _rule.IMPLEMENTATIONS.items()
    if name != "reference"
}
explain = explained("gated_delta_product", IMPLEMENTATIONS)


def gated_delta_product(
    q: Float[Tensor, "batch time group key"],
    k: Float[Tensor, "batch time step group key"],
    v: Float[Tensor, "batch time step head value"],
    log_decay: Float[Tensor, "batch time head"] | Float[Tensor, "batch time head key"] | None,
    beta: Float[Tensor, "batch time step head"],
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
        log_decay: g, at most 0, per head or per key channel; None is 0. It acts once a token, before its first update.
        beta: writing strength, 0 to 1; up to 2 for negative eigenvalues.
        state: S after the tokens before, float32 (float64 for float64 inputs); None is zero.
        starts: True where a new document begins: the state is dropped before that token.
        backend: ``auto`` or a name in ``IMPLEMENTATIONS``.

    Returns:
        o in the dtype of ``v``, and S after the last token.

    Raises:
        ValueError: shapes do not fit together, or ``backend`` cannot serve.
    """
    operator = "gated_delta_product"
    check_numbers(operator, starts, {"log_decay": log_decay, "state": state}, q=q, k=k, v=v, beta=beta)
    if k.ndim != 5 or v.ndim != 5 or k.shape[:3] != v.shape[:3] or k.shape[2] < 1:
        raise ValueError(
            f"{operator}: k {tuple(k.shape)}, v {tuple(v.shape)} do not fit together; expected "
            "[batch, time, step, group, key] and [batch, time, step, head, value]"
        )
    check_heads(operator, q, k[:, :, 0], v[:, :, 0], {}, state, starts)
    check_decay(operator, log_decay, q, v[:, :, 0])
    check_shape(operator, "beta", beta, tuple(v.shape[:4]))
    return dispatch(operator, IMPLEMENTATIONS, backend, v, q, k, v, log_decay, beta, state, starts)
