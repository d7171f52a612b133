"""Short convolution on a GPU: each program convolves a tile of tokens by channels, whose taps are shifted tiles.

The backward computes the sums in front of the activation again: stored, they would be more bytes to move.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from seqzoo.kernels.triton_support import last_axis_contiguous

TOKENS, CHANNELS = 32, 32


@triton.jit
def _load_taps(
    x, state, batch, token, channel, time, channels, x_batch, x_time,
    OLDEST: tl.constexpr, NEWEST: tl.constexpr, SIZE: tl.constexpr, SUM: tl.constexpr,
):  # fmt: skip
    """Inputs at ``token - OLDEST`` to ``token + NEWEST``; those before the first token are in the state."""
    taps = ()
    for shift in tl.static_range(-OLDEST, NEWEST + 1):
        source = token + shift
        inside = (source >= 0) & (source < time) & (channel < channels)
        tap = tl.load(x + batch * x_batch + source.to(tl.int64) * x_time + channel, mask=inside, other=0).to(SUM)
        if state is not None:
            row = source + (SIZE - 1)
            before = (row >= 0) & (source < 0) & (channel < channels)
            tap += tl.load(state + (batch * (SIZE - 1) + row) * channels + channel, mask=before, other=0).to(SUM)
        taps += (tap,)
    return taps


@triton.jit
def _load_starts(starts, batch, token, time, OLDEST: tl.constexpr, NEWEST: tl.constexpr):
    """Where a document begins, at ``token - OLDEST`` to ``token + NEWEST``; nowhere outside of the sequence."""
    begins = ()
    for shift in tl.static_range(-OLDEST, NEWEST + 1):
        source = token + shift
        inside = (source >= 0) & (source < time)
        begins += (tl.load(starts + batch * time + source, mask=inside, other=0) != 0,)
    return begins


@triton.jit
def _load_weight(weight, channel, channels, SIZE: tl.constexpr, SUM: tl.constexpr):
    """Filters by how far back they look."""
    columns = ()
    for back in tl.static_range(SIZE):
        column = tl.load(weight + channel * SIZE + (SIZE - 1 - back), mask=channel < channels, other=0)
        columns += (column.to(SUM),)
    return columns


@triton.jit
def _store_last(
    x, state, starts, last, batch, channel, time, channels, x_batch, x_time, SIZE: tl.constexpr, SUM: tl.constexpr
):  # fmt: skip
    """The new state: the last ``SIZE - 1`` inputs, with zeros before the open document's start."""
    end = time - 1 + tl.zeros((1, 1), tl.int32)
    taps = _load_taps(x, state, batch, end, channel, time, channels, x_batch, x_time, SIZE - 1, 0, SIZE, SUM)
    if starts is not None:
        begins = _load_starts(starts, batch, end, time, SIZE - 1, 0)
        visible = end < time
    for back in tl.static_range(SIZE - 1):
        tap = taps[SIZE - 1 - back]
        if starts is not None:
            tap = tl.where(visible, tap, 0)
            visible &= ~begins[SIZE - 1 - back]
        row = batch * (SIZE - 1) + SIZE - 2 - back
        tl.store(last + row * channels + channel, tap, mask=channel < channels)


@triton.jit
def _forward(
    x, weight, bias, state, starts, y, last, time, channels, x_batch, x_time,
    SIZE: tl.constexpr, SILU: tl.constexpr, SUM: tl.constexpr, TOKENS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    tiles = tl.cdiv(time, TOKENS)
    batch = (tl.program_id(0) // tiles).to(tl.int64)
    tile = tl.program_id(0) % tiles
    token = (tile * TOKENS + tl.arange(0, TOKENS))[:, None]
    channel = (tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS))[None, :]
    present = channel < channels

    taps = _load_taps(x, state, batch, token, channel, time, channels, x_batch, x_time, SIZE - 1, 0, SIZE, SUM)
    columns = _load_weight(weight, channel, channels, SIZE, SUM)
    if starts is not None:
        begins = _load_starts(starts, batch, token, time, SIZE - 1, 0)
        visible = token < time
    total = tl.zeros((TOKENS, CHANNELS), SUM)
    if bias is not None:
        total += tl.load(bias + channel, mask=present, other=0).to(SUM)
    for back in tl.static_range(SIZE):
        tap = taps[SIZE - 1 - back]
        if starts is not None:
            tap = tl.where(visible, tap, 0)
            visible &= ~begins[SIZE - 1 - back]
        total += tap * columns[back]
    if SILU:
        total *= tl.sigmoid(total)
    tl.store(y + (batch * time + token) * channels + channel, total, mask=(token < time) & present)

    if tile == tiles - 1:
        _store_last(x, state, starts, last, batch, channel, time, channels, x_batch, x_time, SIZE, SUM)


@triton.jit
def _backward(
    dy, dlast, x, weight, bias, state, starts, dx, dstate, partial, time, channels, dy_batch, dy_time, x_batch, x_time,
    SIZE: tl.constexpr, SILU: tl.constexpr, SUM: tl.constexpr, TOKENS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    # The state's inputs are tokens 1 - SIZE to -1: their gradients are sums like all others.
    first = 0
    if state is not None:
        first = 1 - SIZE
    tiles = tl.cdiv(time - first, TOKENS)
    batch = (tl.program_id(0) // tiles).to(tl.int64)
    token = (first + tl.program_id(0) % tiles * TOKENS + tl.arange(0, TOKENS))[:, None]
    channel = (tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS))[None, :]
    present = channel < channels

    taps = _load_taps(x, state, batch, token, channel, time, channels, x_batch, x_time, SIZE - 1, SIZE - 1, SIZE, SUM)
    columns = _load_weight(weight, channel, channels, SIZE, SUM)
    if starts is not None:
        begins = _load_starts(starts, batch, token, time, SIZE - 1, SIZE - 1)
        reaches = token < time
    if bias is not None:
        offset = tl.load(bias + channel, mask=present, other=0).to(SUM)

    gradient = tl.zeros((TOKENS, CHANNELS), SUM)
    for ahead in tl.static_range(SIZE):
        reader = token + ahead
        inside = (reader >= 0) & (reader < time) & present
        above = tl.load(dy + batch * dy_batch + reader.to(tl.int64) * dy_time + channel, mask=inside, other=0).to(SUM)
        if SILU:
            total = tl.zeros((TOKENS, CHANNELS), SUM)
            if bias is not None:
                total += offset
            if starts is not None:
                visible = token < time
            for back in tl.static_range(SIZE):
                tap = taps[SIZE - 1 + ahead - back]
                if starts is not None:
                    tap = tl.where(visible, tap, 0)
                    visible &= ~begins[SIZE - 1 + ahead - back]
                total += tap * columns[back]
            gate = tl.sigmoid(total)
            above *= gate * (1 + total * (1 - gate))
        if ahead == 0:
            here = above
        if starts is not None:
            if ahead > 0:
                reaches &= ~begins[SIZE - 1 + ahead]
            above = tl.where(reaches, above, 0)
        gradient += above * columns[ahead]

    kept = (token > time - SIZE) & (token < time) & present
    if starts is not None:
        kept &= reaches
    at = (batch * (SIZE - 1) + token - time + SIZE - 1) * channels + channel
    gradient += tl.load(dlast + at, mask=kept, other=0).to(SUM)
    tl.store(dx + (batch * time + token) * channels + channel, gradient, mask=(token >= 0) & (token < time) & present)
    if state is not None:
        at = (batch * (SIZE - 1) + SIZE - 1 + token) * channels + channel
        tl.store(dstate + at, gradient, mask=(token < 0) & present)

    # Each program's share of the gradients of weight and bias, summed over programs by the launcher.
    partial += tl.program_id(0).to(tl.int64) * (SIZE + 1) * channels
    if starts is not None:
        visible = token < time
    for back in tl.static_range(SIZE):
        tap = taps[SIZE - 1 - back]
        if starts is not None:
            tap = tl.where(visible, tap, 0)
            visible &= ~begins[SIZE - 1 - back]
        tl.store(partial + (SIZE - 1 - back) * channels + channel, tl.sum(here * tap, 0)[None, :], mask=present)
    tl.store(partial + SIZE * channels + channel, tl.sum(here, 0)[None, :], mask=present)


def forward(x, weight, bias, state, starts, silu):
    batch, time, channels = x.shape
    size = weight.shape[1]
    x, weight, bias, state, starts = last_axis_contiguous(x), *map(_packed, (weight, bias, state, starts))
    y, last = x.new_empty(x.shape), x.new_empty(batch, size - 1, channels)
    config = _config(time, channels, x.dtype)
    _forward[batch * triton.cdiv(time, config["TOKENS"]), triton.cdiv(channels, config["CHANNELS"])](
        x, weight, bias, state, starts, y, last, time, channels, x.stride(0), x.stride(1),
        SIZE=size, SILU=silu, **config,
    )  # fmt: skip
    return y, last


def backward(dy, dlast, x, weight, bias, state, starts, silu):
    """Gradients of x, weight, bias and state; any tensor for a bias that is None."""
    batch, time, channels = x.shape
    size = weight.shape[1]
    dy, x = last_axis_contiguous(dy), last_axis_contiguous(x)
    dlast, weight, bias, state, starts = map(_packed, (dlast, weight, bias, state, starts))
    dx, dstate = x.new_empty(x.shape), None if state is None else state.new_empty(state.shape)
    config = _config(time, channels, x.dtype)
    programs = batch * triton.cdiv(time if state is None else time + size - 1, config["TOKENS"])
    partial = x.new_empty(programs, size + 1, channels, dtype=torch.promote_types(x.dtype, torch.float32))
    _backward[programs, triton.cdiv(channels, config["CHANNELS"])](
        dy, dlast, x, weight, bias, state, starts, dx, dstate, partial, time, channels,
        dy.stride(0), dy.stride(1), x.stride(0), x.stride(1), SIZE=size, SILU=silu, **config,
    )  # fmt: skip
    sums = partial.sum(0)
    return dx, sums[:size].T.contiguous(), sums[size].clone(), dstate


def _config(time, channels, dtype):
    return {
        "SUM": tl.float64 if dtype == torch.float64 else tl.float32,
        "TOKENS": min(triton.next_power_of_2(time), TOKENS),
        "CHANNELS": min(triton.next_power_of_2(channels), CHANNELS),
        "num_warps": 8,
        "enable_fp_fusion": True,
    }


def _packed(x):
    return None if x is None else x.contiguous()
