"""Gated linear attention: a decaying sum of key-value outer products, read by a query.

    S_t = e^{g_t} S_{t-1} + k_t v_t^T,    o_t = S_t^T q_t,    g_t <= 0

The decay g_t is nothing, a number for each head, or a vector that decays each row of S at its own rate:

- none: Based (Arora et al. 2024, https://arxiv.org/abs/2402.18668).
- scalar: Mamba-2's state-space duality with q = C, k = B, v = x, w = dt, g = A dt (Dao & Gu 2024,
  https://arxiv.org/abs/2405.21060), RetNet and Lightning Attention with a constant g.
- channel: GLA (Yang et al. 2023, https://arxiv.org/abs/2312.06635), HGRN2, and RWKV-6.

With a bonus u (RWKV-6, Peng et al. 2024, https://arxiv.org/abs/2404.05892) the output is read before the token's own
decay and write, and the token's own pair is weighted by u instead:

    o_t = S_{t-1}^T q_t + (q_t . (u k_t)) v_t

Writes may have weights w (Mamba-2's dt), and tokens a skip d to their own values (Mamba-2's D):

    S_t = e^{g_t} S_{t-1} + w_t k_t v_t^T,    o_t = S_t^T q_t + d v_t

Queries and keys may be shared by groups of consecutive heads.
"""

from __future__ import annotations

from jaxtyping import Bool, Float
from torch import Tensor

from seqzoo.kernels.backends import check_heads, check_log_decay, check_numbers, check_shape, dispatch, explained
from seqzoo.kernels.gated_linear_attention import chunked, fla_adapter, native, reference, triton_op

IMPLEMENTATIONS = {
    "reference": reference.gated_linear_attention,
    "chunked": chunked.gated_linear_attention,
    "native": native.gated_linear_attention,
    "triton": triton_op.gated_linear_attention,
    "fla": fla_adapter.gated_linear_attention,
}
explain = explained("gated_linear_attention", IMPLEMENTATIONS)


def gated_linear_attention(
    q: Float[Tensor, "batch time group key"],
    k: Float[Tensor, "batch time group key"],
    v: Float[Tensor, "batch time head value"],
    log_decay: Float[Tensor, "batch time head"] | Float[Tensor, "batch time head key"] | None = None,
    state: Float[Tensor, "batch head key value"] | None = None,
    starts: Bool[Tensor, "batch time"] | None = None,
    *,
    bonus: Float[Tensor, "head key"] | None = None,
    write: Float[Tensor, "batch time head"] | None = None,
    skip: Float[Tensor, " head"] | None = None,
    backend: str = "auto",
) -> tuple[Float[Tensor, "batch time head value"], Float[Tensor, "batch head key value"]]:
    """Run the recurrence above over ``time``.

    Args:
        q: queries, unscaled: multiply by ``key ** -0.5`` where the layer's equation has it.
        k: keys.
        v: values; the number of heads must be a multiple of the number of groups.
        log_decay: g, at most 0: one a head, one a channel of its keys, or None for no decay.
        state: S after the tokens before, float32 (float64 for float64 inputs); None is zero.
        starts: True where a new document begins: the state is dropped before that token.
        bonus: u, which makes the output the one above.
        write: w, the weight of each token's write, in float32 or better; None is 1.
        skip: d, how much of its own value a token reads beside the state; None is 0.
        backend: ``auto`` or a name in ``IMPLEMENTATIONS``.

    Returns:
        o in the dtype of ``v``, and S after the last token.

    Raises:
        ValueError: shapes do not fit together, or ``backend`` cannot serve.
    """
    optional = {"log_decay": log_decay, "bonus": bonus, "write": write, "skip": skip, "state": state}
    check_numbers("gated_linear_attention", starts, optional, q=q, k=k, v=v)
    check_heads("gated_linear_attention", q, k, v, {}, state, starts)
    per_channel = log_decay is not None and log_decay.ndim == 4
    check_shape("gated_linear_attention", "log_decay", log_decay, (*v.shape[:3], *q.shape[3:] * per_channel))
    check_shape("gated_linear_attention", "bonus", bonus, (v.shape[2], q.shape[3]))
    check_shape("gated_linear_attention", "write", write, (*v.shape[:3],))
    check_shape("gated_linear_attention", "skip", skip, (v.shape[2],))
    check_log_decay("gated_linear_attention", log_decay)
    inputs = q, k, v, log_decay, bonus, state, starts, write, skip
    return dispatch("gated_linear_attention", IMPLEMENTATIONS, backend, v, *inputs)
