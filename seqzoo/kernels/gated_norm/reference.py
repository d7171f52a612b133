"""The equation in plain PyTorch, for any device, with everything inside in float32 or better."""

from __future__ import annotations

import torch
import torch.nn.functional as F

ACTIVATIONS = {"silu": F.silu, "sigmoid": torch.sigmoid}


def gated_norm(x, gate, weight, bias, groups, eps, scale, centered, activation, gate_first):
    wide = torch.promote_types(x.dtype, torch.float32)
    factor = None if gate is None else ACTIVATIONS[activation](gate.to(wide))
    y = x.to(wide)
    if factor is not None and gate_first:
        y = y * factor
    parts = y.unflatten(-1, (groups, -1))
    shape = parts.shape[-1:]
    parts = F.layer_norm(parts, shape, eps=eps) if centered else F.rms_norm(parts, shape, eps=eps)
    if scale != 1:
        parts = parts * scale
    # What is learned is for all channels, or the same for each group.
    for learned, apply in ((weight, torch.mul), (bias, torch.add)):
        if learned is not None:
            parts = apply(parts, learned.to(wide).view(-1, parts.shape[-1]))
    y = parts.flatten(-2)
    if factor is not None and not gate_first:
        y = y * factor
    return y.to(x.dtype)
