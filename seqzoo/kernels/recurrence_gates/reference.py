"""The equation in plain PyTorch, for any device, with everything inside in float32 or better."""

from __future__ import annotations

import torch
from einops import rearrange

TINY = 1e-30  # below any square that counts: keeps the slope of its root finite


def recurrence_gates(u, gates, recurrence_bias, input_bias, rate, begins):
    wide = rate.dtype
    recurrence, input = rearrange(gates, "block ... (two channel) -> two ... (block channel)", two=2)
    log_decay = -rate * torch.sigmoid(recurrence.to(wide) + recurrence_bias)
    scale = (TINY - torch.expm1(2 * log_decay)).sqrt()
    if begins is not None:
        scale = scale.masked_fill(begins[..., None], 1)
    entering = u.to(wide) * torch.sigmoid(input.to(wide) + input_bias) * scale
    return log_decay.exp(), entering.to(u.dtype)
