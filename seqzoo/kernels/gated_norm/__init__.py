"""Normalisation of groups of channels, with a scale and a shift a channel, and a gate.

    u = x, or x * act(gate) where the gate comes first,    c = mean(u) where the norm is centered, else 0
    n = (u - c) / sqrt(mean((u - c)^2) + eps),    y = (scale * weight * n + bias) * act(gate)

RMSNorm (Zhang & Sennrich 2019, https://arxiv.org/abs/1910.07467) or, centered, LayerNorm (Ba et al. 2016,
https://arxiv.org/abs/1607.06450), over each of ``groups`` equal parts of the last axis. Queries and keys of length one
are it too: ``x / sqrt(sum x^2 + eps)`` is the norm with ``eps / size``, times ``size ** -0.5``.

No token sees another: so there is no state, and its place is in ``TOKENWISE``, not in ``OPERATORS``.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from seqzoo.kernels.backends import check_backend, check_numbers, choose
from seqzoo.kernels.gated_norm import native, reference, triton_op

Activation = Literal["silu", "sigmoid"]

IMPLEMENTATIONS = {
    "reference": reference.gated_norm,
    "native": native.gated_norm,
    "triton": triton_op.gated_norm,
}


def gated_norm(
    x: Float[Tensor, "... channel"],
    gate: Float[Tensor, "... channel"] | None = None,
    weight: Float[Tensor, " learned"] | None = None,
    bias: Float[Tensor, " learned"] | None = None,
    *,
    groups: int = 1,
    eps: float = 1e-5,
    scale: float = 1.0,
    centered: bool = False,
    activation: Activation = "silu",
    gate_first: bool = False,
    backend: str = "auto",
) -> Float[Tensor, "... channel"]:
    """Normalise each group of channels of each token.

    Args:
        x: inputs.
        gate: multiplies the outputs, or the inputs where ``gate_first``, through ``activation``.
        weight: one number a channel, or one a channel of a group for all groups alike.
        bias: the same, added after the weight.
        groups: equal parts of the last axis, each normalised by itself.
        eps: added to the mean square, positive.
        scale: multiplies what is normalised.
        centered: the mean is subtracted first.
        activation: of the gate, ``silu`` or ``sigmoid``.
        gate_first: what is normalised is gated already.
        backend: a layer's setting: ``native`` and ``triton`` are kernels, ``auto`` that of the device where it can run,
            and all others are plain PyTorch.

    Returns:
        y in the dtype of ``x``, or that of ``gate`` where it is wider.

    Raises:
        ValueError: shapes or dtypes do not fit together, there is no such ``activation``, or ``backend`` cannot serve.
    """
    check_numbers("gated_norm", None, {"gate": gate, "weight": weight, "bias": bias}, x=x)
    if x.ndim < 1 or not x.shape[-1]:
        raise ValueError(f"gated_norm: x has shape {tuple(x.shape)}; expected [..., channel] of 1 channel or more")
    if groups < 1 or x.shape[-1] % groups:
        raise ValueError(f"gated_norm: groups={groups} does not divide the {x.shape[-1]} channels of x")
    if not 0 < eps < math.inf:
        raise ValueError(f"gated_norm: eps={eps}; expected a finite number above 0")
    if activation not in reference.ACTIVATIONS:
        raise ValueError(f"gated_norm: activation={activation!r}; use silu or sigmoid")
    if gate is not None and gate.shape != x.shape:
        raise ValueError(f"gated_norm: gate has shape {tuple(gate.shape)}; expected that of x, {tuple(x.shape)}")
    size = x.shape[-1] // groups
    for name, learned in {"weight": weight, "bias": bias}.items():
        if learned is not None and (learned.ndim != 1 or len(learned) not in (size, x.shape[-1])):
            raise ValueError(
                f"gated_norm: {name} has shape {tuple(learned.shape)}; expected ({size},) or ({x.shape[-1]},)"
            )
    if weight is not None and bias is not None and len(weight) != len(bias):
        raise ValueError(f"gated_norm: bias has {len(bias)} numbers; expected as many as weight, {len(weight)}")
    if gate is not None and gate.dtype != x.dtype:
        dtype = torch.promote_types(x.dtype, gate.dtype)
        x, gate = x.to(dtype), gate.to(dtype)
    check_backend("gated_norm", backend)
    # A layer may ask for code that its operators have and norms have not.
    name = backend if backend == "auto" or backend in IMPLEMENTATIONS else "reference"
    run = IMPLEMENTATIONS[choose("gated_norm", IMPLEMENTATIONS, name, x, 1)]
    with torch.autocast(x.device.type, enabled=False):
        return run(x, gate, weight, bias, groups, eps, scale, centered, activation, gate_first)
