"""The gates of a real-gated linear recurrent unit: how much stays of each channel, and how much enters.

    r = sigmoid(p + recurrence_bias),    i = sigmoid(q + input_bias),    a = e^{-rate r},    [p, q] = gates
    entering = sqrt(1 - a^2) i u,   or i u where a document begins

(De et al. 2024, https://arxiv.org/abs/2402.19427.) The root keeps the memory's size what that of u is.

No token sees another: so there is no state, and no place for it in ``OPERATORS``.
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from seqzoo.kernels.backends import check_numbers, check_shape, dispatch_elementwise
from seqzoo.kernels.recurrence_gates import native, reference

IMPLEMENTATIONS = {"reference": reference.recurrence_gates, "native": native.recurrence_gates}


def recurrence_gates(
    u: Float[Tensor, "... channel"],
    gates: Float[Tensor, "block ... both"],
    recurrence_bias: Float[Tensor, " channel"],
    input_bias: Float[Tensor, " channel"],
    rate: Float[Tensor, " channel"],
    begins: Bool[Tensor, ...] | None = None,
    *,
    backend: str = "auto",
) -> tuple[Float[Tensor, "... channel"], Float[Tensor, "... channel"]]:
    """What ``linear_scan`` takes: the decays a, in float32 or better, and what enters.

    Args:
        u: what would enter through an open gate.
        gates: p and q side by side, of each of equal blocks of the channels, as products of blocks give them.
        recurrence_bias: added to p.
        input_bias: added to q.
        rate: the decay, in nats a token, of a channel whose r is 1; at or above 0.
        begins: where there is no memory to make room for; None is nowhere.
        backend: a layer's setting: ``native`` is the native kernel, ``auto`` the same where it can run, and all others
            are plain PyTorch.

    Raises:
        ValueError: shapes or dtypes do not fit together, or ``backend`` cannot serve.
    """
    learned: dict[str, Any] = {"recurrence_bias": recurrence_bias, "input_bias": input_bias, "rate": rate}
    check_numbers("recurrence_gates", begins, u=u, gates=gates, **learned)
    if u.ndim < 1:
        raise ValueError(f"recurrence_gates: u has shape {tuple(u.shape)}; expected [..., channel]")
    *tokens, channels = u.shape
    blocks = len(gates) if gates.ndim else 0
    if not blocks or channels % blocks or gates.shape != (blocks, *tokens, 2 * channels // blocks):
        raise ValueError(
            f"recurrence_gates: u {tuple(u.shape)}, gates {tuple(gates.shape)} do not fit together; expected "
            "[..., channel] and [block, ..., 2 channel / block] with channel a multiple of block"
        )
    for name, tensor in learned.items():
        check_shape("recurrence_gates", name, tensor, (u.shape[-1],))
    check_shape("recurrence_gates", "begins", begins, tuple(u.shape[:-1]))
    dtype = torch.promote_types(u.dtype, gates.dtype)
    wide = torch.promote_types(dtype, torch.float32)
    inputs = [u.to(dtype), gates.to(dtype), *(z.to(wide) for z in learned.values()), begins]
    return dispatch_elementwise("recurrence_gates", IMPLEMENTATIONS, backend, u, *inputs)
