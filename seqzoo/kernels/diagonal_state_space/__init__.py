"""A diagonal state space for each channel, the same at every token (Gu et al. 2022, https://arxiv.org/abs/2206.11893).

    h_t = e^z h_{t-1} + w x_t,    y_t = Re(sum of c h_t),    Re z <= 0

h is ``[channel, state]`` and complex, and so are z (``exponent``), w (``write``) and c (``read``), which do not depend
on the token: S4D is this. So, unlike in a scan, outputs can be had without the states in between.
"""

from __future__ import annotations

from jaxtyping import Bool, Complex, Float
from torch import Tensor

from seqzoo.kernels.backends import (
    check_kind,
    check_log_decay,
    check_numbers,
    check_shape,
    check_tensor,
    dispatch,
    explained,
)
from seqzoo.kernels.diagonal_state_space import chunked, reference

IMPLEMENTATIONS = {"reference": reference.diagonal_state_space, "chunked": chunked.diagonal_state_space}
explain = explained("diagonal_state_space", IMPLEMENTATIONS)


def diagonal_state_space(
    x: Float[Tensor, "batch time channel"],
    exponent: Complex[Tensor, "channel state"],
    write: Complex[Tensor, "channel state"],
    read: Complex[Tensor, "channel state"],
    state: Complex[Tensor, "batch channel state"] | None = None,
    starts: Bool[Tensor, "batch time"] | None = None,
    *,
    backend: str = "auto",
) -> tuple[Float[Tensor, "batch time channel"], Complex[Tensor, "batch channel state"]]:
    """Run the recurrence above over ``time``.

    Args:
        x: inputs.
        exponent: z, a rate times a step; real parts at most 0, or the state may grow without bound.
        write: how the input enters.
        read: how the output is made; for pairs of conjugates of which one is kept, twice their weight.
        state: h after the tokens before, complex64 (complex128 for float64 inputs); None is zero.
        starts: True where a new document begins: the state is dropped before that token.
        backend: ``auto`` or a name in ``IMPLEMENTATIONS``.

    Returns:
        y in the dtype of ``x``, and h after the last token.

    Raises:
        ValueError: shapes or dtypes do not fit together, or ``backend`` cannot serve.
    """
    check_numbers("diagonal_state_space", starts, x=x)
    inputs = {"exponent": exponent, "write": write, "read": read} | ({} if state is None else {"state": state})
    for name, tensor in inputs.items():
        check_tensor("diagonal_state_space", name, tensor)
        if not tensor.is_complex() or tensor.device != x.device:
            kind = f"{tensor.dtype} on {tensor.device}"
            raise ValueError(f"diagonal_state_space: {name} is {kind}; expected complex numbers on {x.device}")
    if x.ndim != 3 or exponent.ndim != 2 or exponent.shape[0] != x.shape[2]:
        raise ValueError(
            f"diagonal_state_space: x {tuple(x.shape)}, exponent {tuple(exponent.shape)} do not fit together; expected "
            "[batch, time, channel] and [channel, state]"
        )
    shape = tuple(exponent.shape)
    for name, tensor, expected in (("write", write, shape), ("read", read, shape), ("state", state, (len(x), *shape))):
        if tensor is not None and tensor.shape != expected:
            raise ValueError(
                f"diagonal_state_space: x {tuple(x.shape)}, exponent {shape}, {name} {tuple(tensor.shape)} do not fit "
                f"together; {name} is expected {expected}"
            )
    check_shape("diagonal_state_space", "starts", starts, tuple(x.shape[:2]))
    check_kind("diagonal_state_space", "x", x)
    check_log_decay("diagonal_state_space", exponent.real, "the real part of exponent")
    return dispatch("diagonal_state_space", IMPLEMENTATIONS, backend, x, x, exponent, write, read, state, starts)
