"""The equation in plain PyTorch, for any device, with everything inside in float32 or better."""

from __future__ import annotations

import math

import torch

FASTEST = math.exp(-0.5)
EPS = 1e-24


def erasing_keys(r, k, decay, rate, decay_bias, rate_bias, key_scale, key_rate, bonus):
    dtype, wide = k.dtype, decay_bias.dtype
    r, k, decay, rate = (z.to(wide) for z in (r, k, decay, rate))
    log_decay = -FASTEST * torch.sigmoid(decay + decay_bias)
    a = torch.sigmoid(rate + rate_bias)
    written = k * (1 + (a - 1) * key_rate)
    scaled = k * key_scale
    r, log_decay, a, written, scaled = (z.unflatten(-1, bonus.shape) for z in (r, log_decay, a, written, scaled))
    h = scaled / (scaled.square().sum(-1, keepdim=True) + EPS).sqrt()
    own = (r * bonus * written).sum(-1)
    return log_decay, written.to(dtype), -h.to(dtype), (a * h).to(dtype), own
