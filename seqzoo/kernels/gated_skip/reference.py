"""The equation in plain PyTorch, for any device, with everything inside in float32 or better."""

from __future__ import annotations

import torch
import torch.nn.functional as F


def gated_skip(x, skip, weight, gate, activation):
    wide = torch.promote_types(x.dtype, torch.float32)
    weight = weight.to(wide).repeat_interleave(x.shape[-1] // weight.shape[-1], -1)
    y = x.to(wide) + weight * skip.to(wide)
    if gate is not None:
        y = y * (F.silu(gate.to(wide)) if activation == "silu" else gate.to(wide))
    return y.to(x.dtype)
