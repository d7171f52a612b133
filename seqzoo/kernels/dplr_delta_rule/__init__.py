"""The delta rule in general form: a transition that is diagonal plus low rank (DPLR), and one write a token.

    S_t = diag(e^{g_t}) S_{t-1} + b_t (a_t^T S_{t-1}) + k_t v_t^T,    o_t = S_t^T q_t,    g_t <= 0

RWKV-7 is this with a = -kk and b = kk o (in-context learning rate) (Peng et al. 2025, https://arxiv.org/abs/2503.14456);
the read a_t^T S_{t-1} is of the memory before this token's decay. Rules that read the decayed memory fit in with
a_t = e^{g_t} o (what they read with): Gated DeltaNet-2 is a = e^g o (b o k), b = -k.
"""

from __future__ import annotations

from jaxtyping import Bool, Float
from torch import Tensor

from seqzoo.kernels.backends import check_kind, check_log_decay, check_numbers, check_shape, dispatch, explained
from seqzoo.kernels.dplr_delta_rule import chunked, fla_adapter, native, reference, triton_op

IMPLEMENTATIONS = {
    "reference": reference.dplr_delta_rule,
    "chunked": chunked.dplr_delta_rule,
    "native": native.dplr_delta_rule,
    "triton": triton_op.dplr_delta_rule,
    "fla": fla_adapter.dplr_delta_rule,
}
explain = explained("dplr_delta_rule", IMPLEMENTATIONS)


def dplr_delta_rule(
    q: Float[Tensor, "batch time head key"],
    k: Float[Tensor, "batch time head key"],
    v: Float[Tensor, "batch time head value"],
    a: Float[Tensor, "batch time head key"],
    b: Float[Tensor, "batch time head key"],
    log_decay: Float[Tensor, "batch time head key"],
    state: Float[Tensor, "batch head key value"] | None = None,
    starts: Bool[Tensor, "batch time"] | None = None,
    *,
    backend: str = "auto",
) -> tuple[Float[Tensor, "batch time head value"], Float[Tensor, "batch head key value"]]:
    """Run the recurrence above over ``time``.

    Args:
        q: queries, unscaled: multiply by ``key ** -0.5`` where the layer's equation has it (RWKV-7's has not).
        k: keys of what is written.
        v: values.
        a: what the memory is read with, before it decays.
        b: where that reading is written to; the memory may grow without bound unless e^g + b a^T is a contraction.
        log_decay: g, at most 0, for each channel of the keys.
        state: S after the tokens before, float32 (float64 for float64 inputs); None is zero.
        starts: True where a new document begins: the state is dropped before that token.
        backend: ``auto`` or a name in ``IMPLEMENTATIONS``.

    Returns:
        o in the dtype of ``v``, and S after the last token.

    Raises:
        ValueError: shapes or dtypes do not fit together, or ``backend`` cannot serve.
    """
    check_numbers("dplr_delta_rule", starts, {"state": state}, q=q, k=k, v=v, a=a, b=b, log_decay=log_decay)
    if q.ndim != 4 or v.ndim != 4 or q.shape[:3] != v.shape[:3] or not q.shape[2]:
        raise ValueError(
            f"dplr_delta_rule: q {tuple(q.shape)}, v {tuple(v.shape)} do not fit together; expected "
            "[batch, time, head, key] and [batch, time, head, value] with a head at least"
        )
    for name, tensor in {"k": k, "a": a, "b": b, "log_decay": log_decay}.items():
        check_shape("dplr_delta_rule", name, tensor, tuple(q.shape))
    check_kind("dplr_delta_rule", "v", v, q=q, k=k, a=a, b=b)
    check_shape("dplr_delta_rule", "state", state, (v.shape[0], *q.shape[2:], v.shape[3]))
    check_shape("dplr_delta_rule", "starts", starts, tuple(v.shape[:2]))
    check_log_decay("dplr_delta_rule", log_decay)
    return dispatch("dplr_delta_rule", IMPLEMENTATIONS, backend, v, q, k, v, a, b, log_decay, state, starts)
