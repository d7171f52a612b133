"""The equation in plain PyTorch, for any device, inside in float32 or better; only sums of angles are an operator's."""

from __future__ import annotations

import math

import torch

from seqzoo.kernels.backends import accumulation_dtype
from seqzoo.kernels.linear_scan import linear_scan


def turned_keys(write, read, write_bias, read_bias, turn, step, gain, values, angle, key, value, starts):
    dtype, wide = values.dtype, accumulation_dtype(values)
    shared = values.shape[2] // write.shape[2]
    write, read = (
        z.to(wide).repeat_interleave(shared, 2) + bias for z, bias in ((write, write_bias), (read, read_bias))
    )
    angles = _accumulate(turn[:, :, None] * step[..., None], angle, starts)
    turned, q = _turn(write, angles), _turn(read, angles)
    k, v = gain[..., None] * _delay(turned, key), _delay(values, value)
    if starts is not None:
        k, v = (z.masked_fill(starts[..., None, None], 0) for z in (k, v))
    own = (write * read).sum(-1)  # both turn by the same angle
    return q.to(dtype), k.to(dtype), v, own, angles[:, -1].clone(), turned[:, -1].clone()


def _accumulate(turns, angle, starts):
    """Sums of ``turns`` since the document's start, in [0, 2 pi), summed in float64 where there is such a thing."""
    long = turns.to(turns.dtype if turns.device.type == "mps" else torch.float64).flatten(2)
    before = None if angle is None else angle.flatten(1).to(long.dtype)
    sums, _ = linear_scan(long.new_ones(long.shape[2]), long, before, starts)
    return (sums % (2 * math.pi)).to(turns.dtype).unflatten(2, turns.shape[2:])


def _turn(x, angle):
    pairs = 2 * angle.shape[-1]
    first, second = x[..., :pairs].unflatten(-1, (-1, 2)).unbind(-1)
    cos, sin = angle.cos(), angle.sin()
    turned = torch.stack([first * cos - second * sin, second * cos + first * sin], -1).flatten(-2)
    return torch.cat([turned, x[..., pairs:]], -1)


def _delay(x, first):
    front = torch.zeros_like(x[:, :1]) if first is None else first[:, None].to(x.dtype)
    return torch.cat([front, x[:, :-1]], 1)
