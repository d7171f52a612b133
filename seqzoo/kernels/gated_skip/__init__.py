"""What a token gives itself, added to what it has read, and the gate after it.

    y = (x + weight * skip) * act(gate)

The skip of state spaces, with one weight a head (Mamba-3: D plus what its own key and query give), and RWKV-7's bonus.

No token sees another: so there is no state, and no place for it in ``OPERATORS``.
"""

from __future__ import annotations

from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from seqzoo.kernels.backends import check_numbers, check_shape, dispatch_elementwise
from seqzoo.kernels.gated_skip import native, reference

IMPLEMENTATIONS = {"reference": reference.gated_skip, "native": native.gated_skip}


def gated_skip(
    x: Float[Tensor, "... channel"],
    skip: Float[Tensor, "... channel"],
    weight: Float[Tensor, "... head"],
    gate: Float[Tensor, "... channel"] | None = None,
    *,
    activation: Literal["silu"] | None = None,
    backend: str = "auto",
) -> Float[Tensor, "... channel"]:
    """Add the weighted ``skip`` to ``x``, and multiply by the gate.

    Args:
        x: what was read.
        skip: what is added.
        weight: one for each of the equal parts of the channels that heads are.
        gate: multiplies the sum, through ``activation``; None is 1.
        activation: of the gate, ``silu`` or None.
        backend: a layer's setting: ``native`` is the native kernel, ``auto`` the same where it can run, and all others
            are plain PyTorch.

    Returns:
        y in the widest dtype of ``x``, ``skip`` and ``gate``.

    Raises:
        ValueError: shapes or dtypes do not fit together, there is no such ``activation``, or ``backend`` cannot serve.
    """
    check_numbers("gated_skip", None, {"gate": gate}, x=x, skip=skip, weight=weight)
    if x.ndim < 1 or weight.shape[:-1] != x.shape[:-1] or not weight.shape[-1] or x.shape[-1] % weight.shape[-1]:
        raise ValueError(
            f"gated_skip: x {tuple(x.shape)}, weight {tuple(weight.shape)} do not fit together; expected "
            "[..., channel] and [..., head] with channel a multiple of head"
        )
    if activation not in (None, "silu"):
        raise ValueError(f"gated_skip: activation={activation!r}; use silu or None")
    check_shape("gated_skip", "skip", skip, tuple(x.shape))
    check_shape("gated_skip", "gate", gate, tuple(x.shape))
    dtype = torch.promote_types(x.dtype, skip.dtype)
    dtype = dtype if gate is None else torch.promote_types(dtype, gate.dtype)
    x, skip, gate = x.to(dtype), skip.to(dtype), None if gate is None else gate.to(dtype)
    return dispatch_elementwise("gated_skip", IMPLEMENTATIONS, backend, x, x, skip, weight, gate, activation)
