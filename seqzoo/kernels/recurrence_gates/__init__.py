"""The gates of a real-gated linear recurrent unit: how much stays of each channel, and how much enters.

    r = sigmoid(recurrence + recurrence_bias),    i = sigmoid(input + input_bias),    a = e^{-rate r}
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
    recurrence: Float[Tensor, "... channel"],
    input: Float[Tensor, "... channel"],
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
        recurrence: what r is made from.
        input: what i is made from.
        recurrence_bias: added to ``recurrence``.
        input_bias: added to ``input``.
        rate: the decay, in nats a token, of a channel whose r is 1; at or above 0.
        begins: where there is no memory to make room for; None is nowhere.
        backend: a layer's setting: ``native`` is the native kernel, ``auto`` the same where it can run, and all others
            are plain PyTorch.

    Raises:
        ValueError: shapes or dtypes do not fit together, or ``backend`` cannot serve.
    """
    per_token: dict[str, Any] = {"recurrence": recurrence, "input": input}
    learned: dict[str, Any] = {"recurrence_bias": recurrence_bias, "input_bias": input_bias, "rate": rate}
    check_numbers("recurrence_gates", begins, u=u, **per_token, **learned)
    if u.ndim < 1:
        raise ValueError(f"recurrence_gates: u has shape {tuple(u.shape)}; expected [..., channel]")
    for name, tensor in per_token.items():
        check_shape("recurrence_gates", name, tensor, tuple(u.shape))
    for name, tensor in learned.items():
        check_shape("recurrence_gates", name, tensor, (u.shape[-1],))
    check_shape("recurrence_gates", "begins", begins, tuple(u.shape[:-1]))
    dtype = u.dtype
    for tensor in per_token.values():
        dtype = torch.promote_types(dtype, tensor.dtype)
    wide = torch.promote_types(dtype, torch.float32)
    inputs = [*(z.to(dtype) for z in (u, recurrence, input)), *(z.to(wide) for z in learned.values()), begins]
    return dispatch_elementwise("recurrence_gates", IMPLEMENTATIONS, backend, u, *inputs)
