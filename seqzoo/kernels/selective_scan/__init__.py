"""Mamba's selective scan with its discretisation, skip and gate (Gu & Dao 2023, https://arxiv.org/abs/2312.00752).

    delta_t = softplus(dt_t + dt_bias)
    S_t = e^{delta_t A} o S_{t-1} + (delta_t x_t) B_t^T
    y_t = (S_t C_t + D o x_t) o silu(gate_t)

S is ``[channel, state]``; A decays each of its entries, B and C are shared by all channels. As in the authors' code B
is discretised by Euler's rule, not exactly.
"""

from __future__ import annotations

from jaxtyping import Bool, Float
from torch import Tensor

from seqzoo.kernels.backends import check_kind, check_log_decay, check_numbers, check_shape, dispatch, explained
from seqzoo.kernels.selective_scan import chunked, mamba_ssm_adapter, native, reference, triton_op

IMPLEMENTATIONS = {
    "reference": reference.selective_scan,
    "chunked": chunked.selective_scan,
    "native": native.selective_scan,
    "triton": triton_op.selective_scan,
    "mamba_ssm": mamba_ssm_adapter.selective_scan,
}
explain = explained("selective_scan", IMPLEMENTATIONS)


def selective_scan(
    x: Float[Tensor, "batch time channel"],
    dt: Float[Tensor, "batch time channel"],
    A: Float[Tensor, "channel state"],
    B: Float[Tensor, "batch time state"],
    C: Float[Tensor, "batch time state"],
    D: Float[Tensor, " channel"] | None = None,
    gate: Float[Tensor, "batch time channel"] | None = None,
    dt_bias: Float[Tensor, " channel"] | None = None,
    state: Float[Tensor, "batch channel state"] | None = None,
    starts: Bool[Tensor, "batch time"] | None = None,
    *,
    backend: str = "auto",
) -> tuple[Float[Tensor, "batch time channel"], Float[Tensor, "batch channel state"]]:
    """Run the recurrence above over ``time``.

    Args:
        x: inputs, after the layer's convolution and activation.
        dt: steps before softplus, which is always applied here.
        A: rates, below 0: -exp(A_log).
        B: how the input writes.
        C: how the output reads.
        D: the skip's weights; None for no skip.
        gate: z before silu; None for no gate.
        dt_bias: added to ``dt`` before softplus; None for none.
        state: S after the tokens before, float32 (float64 for float64 inputs); None is zero.
        starts: True where a new document begins: the state is dropped before that token.
        backend: ``auto`` or a name in ``IMPLEMENTATIONS``.

    Returns:
        y in the dtype of ``x``, and S after the last token.

    Raises:
        ValueError: shapes do not fit together, or ``backend`` cannot serve.
    """
    optional = {"D": D, "gate": gate, "dt_bias": dt_bias, "state": state}
    check_numbers("selective_scan", starts, optional, x=x, dt=dt, A=A, B=B, C=C)
    if x.ndim != 3 or A.ndim != 2 or A.shape[0] != x.shape[2] or dt.shape != x.shape:
        raise ValueError(
            f"selective_scan: x {tuple(x.shape)}, dt {tuple(dt.shape)}, A {tuple(A.shape)} do not fit together; "
            "expected [batch, time, channel] twice and [channel, state]"
        )
    batch, time, channels = x.shape
    size = A.shape[1]
    shapes = {"B": (B, (batch, time, size)), "C": (C, (batch, time, size)), "gate": (gate, tuple(x.shape))}
    shapes |= {"D": (D, (channels,)), "dt_bias": (dt_bias, (channels,)), "state": (state, (batch, channels, size))}
    for name, (tensor, expected) in shapes.items():
        if tensor is not None and tensor.shape != expected:
            raise ValueError(
                f"selective_scan: x {tuple(x.shape)}, A {tuple(A.shape)}, {name} {tuple(tensor.shape)} do not fit "
                f"together; {name} is expected {expected}"
            )
    check_shape("selective_scan", "starts", starts, (batch, time))
    check_kind("selective_scan", "x", x, B=B, C=C, gate=gate)
    check_log_decay("selective_scan", A, "A")
    return dispatch("selective_scan", IMPLEMENTATIONS, backend, x, x, dt, A, B, C, D, gate, dt_bias, state, starts)
