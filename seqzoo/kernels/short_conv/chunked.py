"""Shifted additions: on a CPU four times faster than ``F.conv1d`` with one group a channel, and any start is a mask."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from seqzoo.mixer import positions_from_starts


def short_conv(x, weight, bias, state, starts, activation):
    batch, time, channels = x.shape
    history = weight.shape[1] - 1
    past = x.new_zeros(batch, history, channels) if state is None else state.to(x.dtype)
    padded = torch.cat([past, x], 1)
    weight = weight.to(x.dtype)
    age = None
    if starts is not None:
        # How many tokens of its document stand before each token; where none has begun yet, the state's zeros do it.
        offset = torch.full((batch,), history, device=x.device)
        age = positions_from_starts(starts, offset, time, x.device)[..., None]
    y = x * weight[:, -1]
    for back in range(1, history + 1):
        tap = padded[:, history - back : history - back + time] * weight[:, -1 - back]
        y = y + (tap if age is None else tap.masked_fill(age < back, 0))
    if bias is not None:
        y = y + bias.to(x.dtype)
    if age is None:
        last = padded[:, time:].clone()  # a view would keep all of x in memory
    else:
        distance = torch.arange(history, 0, -1, device=x.device)[:, None]
        last = padded[:, time:].masked_fill(age[:, -1:] < distance - 1, 0)
    return F.silu(y) if activation == "silu" else y, last
