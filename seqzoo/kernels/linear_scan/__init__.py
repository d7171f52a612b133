"""The elementwise linear recurrence: every channel forgets and adds by itself.

    h_t = a_t h_{t-1} + b_t

RG-LRU, HGRN and minGRU are this with a gate a_t in (0, 1) per token; S4D, S5 and the LRU with a constant complex a,
|a| <= 1. The operator takes a itself, not its logarithm: a = 0 is legal and exact, and nothing is ever divided by a
product of a's, so no decay is too strong. A gate close to 1 loses nothing either, as long as the layer computes
factors such as 1 - a from the gate's logits (``expm1``) instead of from the rounded a.
"""

from __future__ import annotations

from jaxtyping import Bool, Inexact
from torch import Tensor

from seqzoo.kernels.backends import check_kind, check_numbers, check_shape, dispatch, explained
from seqzoo.kernels.linear_scan import chunked, native, reference, triton_op

IMPLEMENTATIONS = {
    "reference": reference.linear_scan,
    "chunked": chunked.linear_scan,
    "native": native.linear_scan,
    "triton": triton_op.linear_scan,
}
explain = explained("linear_scan", IMPLEMENTATIONS)


def linear_scan(
    a: Inexact[Tensor, "batch time channel"] | Inexact[Tensor, " channel"],
    b: Inexact[Tensor, "batch time channel"],
    state: Inexact[Tensor, "batch channel"] | None = None,
    starts: Bool[Tensor, "batch time"] | None = None,
    *,
    backend: str = "auto",
) -> tuple[Inexact[Tensor, "batch time channel"], Inexact[Tensor, "batch channel"]]:
    """Run the recurrence above over ``time``.

    Args:
        a: what is kept, |a| <= 1 or the state may grow without bound; per token, or ``[channel]`` where it is constant.
            Gates are best given in float32, whatever ``b`` is.
        b: what is added. Complex (complex64 or complex128) where ``a`` is, and only there.
        state: h after the tokens before, float32 or complex64 (64 and 128 for inputs that are); None is zero.
        starts: True where a new document begins: the state is dropped before that token.
        backend: ``auto`` or a name in ``IMPLEMENTATIONS``.

    Returns:
        h in the dtype of ``b``, and h after the last token in the state's.

    Raises:
        ValueError: shapes or dtypes do not fit together, or ``backend`` cannot serve.
    """
    check_numbers("linear_scan", starts, {"state": state}, complex_too=True, a=a, b=b)
    if b.ndim != 3 or a.shape not in (b.shape, b.shape[2:]):
        raise ValueError(
            f"linear_scan: a {tuple(a.shape)}, b {tuple(b.shape)} do not fit together; expected [batch, time, channel] "
            "twice, or [channel] for a constant a"
        )
    if a.is_complex() != b.is_complex() or (state is not None and state.is_complex() != b.is_complex()):
        dtypes = f"a {a.dtype}, b {b.dtype}" + ("" if state is None else f", state {state.dtype}")
        raise ValueError(f"linear_scan: {dtypes}; expected all to be real, or all complex")
    batch, time, channels = b.shape
    check_shape("linear_scan", "state", state, (batch, channels))
    if starts is not None and starts.shape != (batch, time):
        raise ValueError(
            f"linear_scan: starts has shape {tuple(starts.shape)}, b {tuple(b.shape)}; expected {(batch, time)}"
        )
    check_kind("linear_scan", "b", b)
    return dispatch("linear_scan", IMPLEMENTATIONS, backend, b, a, b, state, starts)
