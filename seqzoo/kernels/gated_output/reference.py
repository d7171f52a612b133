"""The equation in plain PyTorch, for any device: sums in float32 or better, a gate alone as PyTorch rounds it."""

from __future__ import annotations

import functools

import torch
import torch.nn.functional as F

ACTIVATIONS = {
    None: lambda gate: gate,
    "silu": F.silu,
    "sigmoid": torch.sigmoid,
    "gelu": functools.partial(F.gelu, approximate="tanh"),
}


def gated_output(x, gate, skip, weight, activation):
    y = x
    if skip is not None:
        wide = torch.promote_types(x.dtype, torch.float32)
        weight = weight.to(wide).repeat_interleave(x.shape[-1] // weight.shape[-1], -1)
        y = x.to(wide) + weight * skip.to(wide)
    if gate is not None:
        y = y * ACTIVATIONS[activation](gate.to(y.dtype))
    return y.to(x.dtype)
