"""Rotary positions (Su et al. 2021, https://arxiv.org/abs/2104.09864), half-split layout as in Llama."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor


def rotate(
    x: Float[Tensor, "batch time head key"], positions: Int[Tensor, "rows time"], base: float
) -> Float[Tensor, "batch time head key"]:
    """Turn channel pair (i, i + key/2) at position p by the angle ``p * base^(-2i/key)``; angles are float32 or better.

    Args:
        x: queries or keys; ``key`` must be even.
        positions: one row for each of the batch, or a single row for all.
        base: larger bases turn the last pairs more slowly.
    """
    half = x.shape[-1] // 2
    dtype = torch.promote_types(x.dtype, torch.float32)
    frequency = base ** -(torch.arange(half, dtype=dtype, device=x.device) / half)
    angle = (positions[..., None] * frequency)[:, :, None]
    cos, sin = angle.cos(), angle.sin()
    first, second = x.to(dtype).split(half, -1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], -1).to(x.dtype)
