"""The gate at the end of a layer, and before it what a token gives itself beside what it has read.

    y = (x + weight * skip) * act(gate)

Either part may be left out. A gate alone ends RG-LRU's and TTT's layers and stands in a gated MLP. The skip is that of
state spaces, with one weight a head (Mamba-3: D plus what its own key and query give), and RWKV-7's bonus.

No token sees another: so there is no state, and no place for it in ``OPERATORS``.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from seqzoo.kernels.backends import check_numbers, check_shape, dispatch_elementwise
from seqzoo.kernels.gated_output import native, reference

Activation = Literal["silu", "sigmoid", "gelu"]

IMPLEMENTATIONS = {"reference": reference.gated_output, "native": native.gated_output}

# Up to so many outputs of a gate alone, as a decoding step has, a kernel's call costs more than PyTorch's two.
FEW = 1 << 14


def gated_output(
    x: Float[Tensor, "... channel"],
    gate: Float[Tensor, "... channel"] | None = None,
    skip: Float[Tensor, "... channel"] | None = None,
    weight: Float[Tensor, "... head"] | None = None,
    *,
    activation: Activation | None = None,
    backend: str = "auto",
) -> Float[Tensor, "... channel"]:
    """Add the weighted ``skip`` to ``x``, and multiply by the gate.

    Args:
        x: what was read.
        gate: multiplies the sum, through ``activation``; None is 1.
        skip: what is added; None is nothing.
        weight: of the skip, one for each of the equal parts of the channels that heads are.
        activation: of the gate, ``silu``, ``sigmoid``, ``gelu`` (by its tanh) or None.
        backend: a layer's setting: ``native`` is the native kernel, ``auto`` the same where it can run (but for few
            outputs of a gate alone), and all others are plain PyTorch.

    Returns:
        y in the widest dtype of ``x``, ``gate`` and ``skip``.

    Raises:
        ValueError: shapes or dtypes do not fit together, ``skip`` or ``weight`` is without the other, there is neither
            a skip nor a gate, there is no such ``activation``, or ``backend`` cannot serve.
    """
    optional: dict[str, Any] = {"gate": gate, "skip": skip, "weight": weight}
    check_numbers("gated_output", None, optional, x=x)
    if x.ndim < 1:
        raise ValueError(f"gated_output: x has shape {tuple(x.shape)}; expected [..., channel]")
    if (skip is None) != (weight is None):
        given, missing = ("weight", "skip") if skip is None else ("skip", "weight")
        raise ValueError(f"gated_output: {given} is given and {missing} is None; expected both or neither")
    if skip is None and gate is None:
        raise ValueError("gated_output: gate and skip are None; expected at least one of them")
    if activation not in reference.ACTIVATIONS:
        raise ValueError(f"gated_output: activation={activation!r}; use silu, sigmoid, gelu or None")
    if weight is not None and (
        weight.shape[:-1] != x.shape[:-1] or not weight.shape[-1] or x.shape[-1] % weight.shape[-1]
    ):
        raise ValueError(
            f"gated_output: x {tuple(x.shape)}, weight {tuple(weight.shape)} do not fit together; expected "
            "[..., channel] and [..., head] with channel a multiple of head"
        )
    dtype = x.dtype
    for name, tensor in {"gate": gate, "skip": skip}.items():
        check_shape("gated_output", name, tensor, tuple(x.shape))
        dtype = dtype if tensor is None else torch.promote_types(dtype, tensor.dtype)
    x, gate, skip = x.to(dtype), *(None if z is None else z.to(dtype) for z in (gate, skip))
    if backend == "auto" and skip is None and x.numel() <= FEW:
        return reference.gated_output(x, gate, skip, weight, activation)
    return dispatch_elementwise("gated_output", IMPLEMENTATIONS, backend, x, x, gate, skip, weight, activation)
