"""Rotary positions (Su et al. 2021, https://arxiv.org/abs/2104.09864): pairs of channels turn with the position."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor


def rotate(
    x: Float[Tensor, "batch time head key"], positions: Int[Tensor, "rows time"], base: float
) -> Float[Tensor, "batch time head key"]:
    """Turn channel pair (i, i + key/2) at position p by the angle ``p * base^(-2i/key)``, as in Llama.

    Args:
        x: queries or keys; ``key`` must be even.
        positions: one row for each of the batch, or a single row for all.
        base: larger bases turn the last pairs more slowly.
    """
    half = x.shape[-1] // 2
    dtype = torch.promote_types(x.dtype, torch.float32)
    frequency = base ** -(torch.arange(half, dtype=dtype, device=x.device) / half)
    first, second = x.to(dtype).split(half, -1)
    return torch.cat(_turn(first, second, positions, frequency), -1).to(x.dtype)


def rotate_neighbours(
    x: Float[Tensor, "batch time head key"],
    positions: Int[Tensor, "rows time"],
    base: float,
    *,
    reaches_base: bool = True,
) -> Float[Tensor, "batch time head key"]:
    """Turn channel pair (2i, 2i + 1) at position p by ``p * base^(-i/(key/2 - 1))``, as in RetNet.

    Args:
        x: queries or keys; ``key`` must be even.
        positions: one row for each of the batch, or a single row for all.
        base: how many times slower than the first pair the last one turns.
        reaches_base: False for ``p * base^(-2i/key)``, as in ``rotate``: there the last pair turns a little faster.
    """
    half, dtype = x.shape[-1] // 2, torch.promote_types(x.dtype, torch.float32)
    if reaches_base:
        frequency = base ** -torch.linspace(0, 1, half, dtype=dtype, device=x.device)
    else:
        frequency = base ** -(torch.arange(half, dtype=dtype, device=x.device) / half)
    first, second = x.to(dtype).unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack(_turn(first, second, positions, frequency), -1).flatten(-2).to(x.dtype)


def turn_neighbours(
    x: Float[Tensor, "batch time head key"], angle: Float[Tensor, "batch time head pair"]
) -> Float[Tensor, "batch time head key"]:
    """Turn each of the first channel pairs (2i, 2i + 1) by its ``angle``; channels beyond the last pair stay."""
    pairs = 2 * angle.shape[-1]
    first, second = x[..., :pairs].unflatten(-1, (-1, 2)).unbind(-1)
    cos, sin = angle.cos(), angle.sin()
    turned = torch.stack([first * cos - second * sin, second * cos + first * sin], -1).flatten(-2)
    return torch.cat([turned, x[..., pairs:]], -1)


def _turn(first: Tensor, second: Tensor, positions: Tensor, frequency: Tensor) -> tuple[Tensor, Tensor]:
    """Both channels of all pairs; angles are float32 or better."""
    angle = (positions[..., None] * frequency)[:, :, None]
    cos, sin = angle.cos(), angle.sin()
    return first * cos - second * sin, second * cos + first * sin
