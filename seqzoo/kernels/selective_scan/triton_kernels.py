"""The selective scan on a GPU: tiles of tokens by channels, all at once, and for each of them one state after another.

What a tile adds to a state, with no state before it, is a sum of its writes, each decayed by the steps that follow it;
these sums are joined along time to the states that enter each tile. Then every tile scans its own tokens in registers.
No state of a token is ever stored. The gradient joins and scans backwards in time in the same way, and computes the
states again; sums over channels or tokens of more than one tile are left to the launcher, so that they are always
added in the same order. Up to 16 tokens, one kernel walks through them with the whole state in registers.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from seqzoo.kernels.selective_scan.triton_op import TOKENS
from seqzoo.kernels.triton_support import last_axis_contiguous

CHANNELS = 32
AHEAD = 8
"""Tiles whose loads are under way at once while tiles are joined."""
WALKED = 16
"""Tokens up to which one program walks through all of them."""


@triton.jit
def _softplus(z, SUM: tl.constexpr):
    """log(1 + e^z): the hardware's logarithm loses all digits where steps are small, a series for atanh none."""
    small = tl.exp(-tl.abs(z))
    ratio = small / (2 + small)
    square = ratio * ratio
    series = tl.zeros(z.shape, SUM)
    TERMS: tl.constexpr = 17 if tl.float64 == SUM else 8
    for term in tl.static_range(TERMS):
        series = series * square + 1 / (2 * (TERMS - 1 - term) + 1)
    return tl.maximum(z, 0) + 2 * ratio * series


@triton.jit
def _tile(time, TOKENS: tl.constexpr, CHANNELS: tl.constexpr):
    """A program's row, number of its tile there and among those of all rows, tokens and channels."""
    tiles = tl.cdiv(time, TOKENS)
    place = tl.program_id(0).to(tl.int64)
    tile = place % tiles
    token = (tile * TOKENS + tl.arange(0, TOKENS))[:, None]
    channel = (tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS))[None, :]
    return place // tiles, tile, place, token, channel


@triton.jit
def _load_numbers(pointer, batch, token, channel, time, channels, stride_batch, stride_time, SUM: tl.constexpr):
    inside = (token >= 0) & (token < time) & (channel < channels)
    return tl.load(pointer + batch * stride_batch + token * stride_time + channel, mask=inside, other=0).to(SUM)


@triton.jit
def _load_steps(
    dt, dt_bias, batch, token, channel, time, channels, dt_batch, dt_time, LAST: tl.constexpr, SUM: tl.constexpr
):
    """Steps before and after softplus, 0 outside of the sequence, and from the row ``LAST`` of the tile on."""
    z = _load_numbers(dt, batch, token, channel, time, channels, dt_batch, dt_time, SUM)
    if dt_bias is not None:
        z += tl.load(dt_bias + channel, mask=channel < channels, other=0).to(SUM)
    row = tl.arange(0, token.shape[0])[:, None]
    return z, tl.where((token >= 0) & (token < time) & (row < LAST), _softplus(z, SUM), 0)


@triton.jit
def _load_starts(starts, batch, token, time):
    return tl.load(starts + batch * time + token, mask=(token >= 0) & (token < time), other=0) != 0


@triton.jit
def _load_column(pointer, batch, token, column, time, stride_batch, stride_time, SUM: tl.constexpr):
    """B or C of one state at ``token``."""
    inside = (token >= 0) & (token < time)
    return tl.load(pointer + batch * stride_batch + token * stride_time + column, mask=inside, other=0).to(SUM)


@triton.jit
def _follow(decay, number, next_decay, next_number):
    """Two steps of a recurrence as one."""
    return decay * next_decay, next_decay * number + next_number


@triton.jit
def _sum_tiles(
    x, dt, A, B, dt_bias, starts, ends, steps, time, channels, x_batch, x_time, dt_batch, dt_time, B_batch, B_time,
    SIZE: tl.constexpr, SUM: tl.constexpr, TOKENS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """What each tile adds to each state, and how long it is, in steps: -1 where a start lets nothing pass."""
    batch, _, place, token, channel = _tile(time, TOKENS, CHANNELS)
    present = channel < channels
    _, delta = _load_steps(dt, dt_bias, batch, token, channel, time, channels, dt_batch, dt_time, TOKENS, SUM)
    _, later = _load_steps(dt, dt_bias, batch, token + 1, channel, time, channels, dt_batch, dt_time, TOKENS - 1, SUM)
    later = tl.cumsum(later, 0, reverse=True)
    written = delta * _load_numbers(x, batch, token, channel, time, channels, x_batch, x_time, SUM)
    length = tl.sum(delta, 0)[None, :]
    if starts is not None:
        begins = _load_starts(starts, batch, token, time).to(tl.int32)
        # Starts behind a token are those from it on without its own.
        written = tl.where(tl.cumsum(begins, 0, reverse=True) == begins, written, 0)
        length = tl.where(tl.sum(begins) > 0, -1, length)
    tl.store(steps + place * channels + channel, length, mask=present)
    for index in range(SIZE):
        rate = tl.load(A + channel * SIZE + index, mask=present, other=0).to(SUM)
        column = _load_column(B, batch, token, index, time, B_batch, B_time, SUM)
        end = tl.sum(tl.exp(later * rate) * written * column, 0)[None, :]
        tl.store(ends + (place * SIZE + index) * channels + channel, end, mask=present)


@triton.jit
def _sum_gradients(
    dy, dt, A, C, gate, dt_bias, starts, ends, steps, time, channels,
    dy_batch, dy_time, dt_batch, dt_time, C_batch, C_time, gate_batch, gate_time,
    SIZE: tl.constexpr, SUM: tl.constexpr, TOKENS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """What each tile adds to the gradient of the states that enter it, and how long it is."""
    batch, _, place, token, channel = _tile(time, TOKENS, CHANNELS)
    present = channel < channels
    _, delta = _load_steps(dt, dt_bias, batch, token, channel, time, channels, dt_batch, dt_time, TOKENS, SUM)
    gradient = _load_numbers(dy, batch, token, channel, time, channels, dy_batch, dy_time, SUM)
    if gate is not None:
        z = _load_numbers(gate, batch, token, channel, time, channels, gate_batch, gate_time, SUM)
        gradient *= z * tl.sigmoid(z)
    length = tl.sum(delta, 0)[None, :]
    if starts is not None:
        begins = _load_starts(starts, batch, token, time).to(tl.int32)
        gradient = tl.where(tl.cumsum(begins, 0) == 0, gradient, 0)
        length = tl.where(tl.sum(begins) > 0, -1, length)
    tl.store(steps + place * channels + channel, length, mask=present)
    before = tl.cumsum(delta, 0)
    for index in range(SIZE):
        rate = tl.load(A + channel * SIZE + index, mask=present, other=0).to(SUM)
        column = _load_column(C, batch, token, index, time, C_batch, C_time, SUM)
        end = tl.sum(tl.exp(before * rate) * gradient * column, 0)[None, :]
        tl.store(ends + (place * SIZE + index) * channels + channel, end, mask=present)


@triton.jit
def _join(
    first, A, ends, steps, entering, final, tiles, channels,
    SIZE: tl.constexpr, REVERSE: tl.constexpr, SUM: tl.constexpr, CHANNELS: tl.constexpr, AHEAD: tl.constexpr,
):  # fmt: skip
    """What enters each tile, ``first`` the first of them, and what leaves the last; one state of a row a program."""
    batch = tl.program_id(0).to(tl.int64)
    index = tl.program_id(2)
    channel = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    present = channel < channels
    rate = tl.load(A + channel * SIZE + index, mask=present, other=0).to(SUM)
    number = tl.zeros((CHANNELS,), SUM)
    if first is not None:
        number = tl.load(first + (batch * channels + channel) * SIZE + index, mask=present, other=0).to(SUM)
    for done in range(0, tiles, AHEAD):
        decays = ()
        sums = ()
        for ahead in tl.static_range(AHEAD):
            place = batch * tiles + (tiles - 1 - done - ahead if REVERSE else done + ahead)
            live = present & (done + ahead < tiles)
            length = tl.load(steps + place * channels + channel, mask=live, other=0)
            decays += (tl.where(length < 0, 0, tl.exp(length * rate)),)
            sums += (tl.load(ends + (place * SIZE + index) * channels + channel, mask=live, other=0),)
        for ahead in tl.static_range(AHEAD):
            place = batch * tiles + (tiles - 1 - done - ahead if REVERSE else done + ahead)
            live = present & (done + ahead < tiles)
            tl.store(entering + (place * SIZE + index) * channels + channel, number, mask=live)
            number = decays[ahead] * number + sums[ahead]
    tl.store(final + (batch * channels + channel) * SIZE + index, number, mask=present)


@triton.jit
def _forward(
    x, dt, A, B, C, D, gate, dt_bias, entering, starts, y, last, time, channels,
    x_batch, x_time, dt_batch, dt_time, B_batch, B_time, C_batch, C_time, gate_batch, gate_time,
    entering_index, entering_channel,
    SIZE: tl.constexpr, SUM: tl.constexpr, TOKENS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    batch, tile, place, token, channel = _tile(time, TOKENS, CHANNELS)
    present = channel < channels
    row = tl.arange(0, TOKENS)[:, None]
    _, delta = _load_steps(dt, dt_bias, batch, token, channel, time, channels, dt_batch, dt_time, TOKENS, SUM)
    inputs = _load_numbers(x, batch, token, channel, time, channels, x_batch, x_time, SUM)
    if starts is not None:
        begins = _load_starts(starts, batch, token, time)
    total = tl.zeros((TOKENS, CHANNELS), SUM)
    if D is not None:
        total += inputs * tl.load(D + channel, mask=present, other=0).to(SUM)
    written = delta * inputs
    for index in range(SIZE):
        rate = tl.load(A + channel * SIZE + index, mask=present, other=0).to(SUM)
        decay = tl.exp(delta * rate)
        if starts is not None:
            decay = tl.where(begins, 0, decay)
        state = written * _load_column(B, batch, token, index, time, B_batch, B_time, SUM)
        if entering is not None:
            at = place * SIZE * channels + index * entering_index + channel * entering_channel
            enters = tl.load(entering + at, mask=present, other=0)
            state = tl.where(row == 0, decay * enters + state, state)
        _, state = tl.associative_scan((decay, state), 0, _follow)
        total += state * _load_column(C, batch, token, index, time, C_batch, C_time, SUM)
        if tile == tl.cdiv(time, TOKENS) - 1:
            end = tl.sum(tl.where(row == TOKENS - 1, state, 0), 0)[None, :]
            tl.store(last + (batch * channels + channel) * SIZE + index, end, mask=present)
    if gate is not None:
        z = _load_numbers(gate, batch, token, channel, time, channels, gate_batch, gate_time, SUM)
        total *= z * tl.sigmoid(z)
    tl.store(y + (batch * time + token) * channels + channel, total, mask=(token < time) & present)


@triton.jit
def _backward(
    dy, x, dt, A, B, C, D, gate, dt_bias, entering, sent, starts, dx, ddt, dgate, dA, dB, dC, dD,
    time, channels, dy_batch, dy_time, x_batch, x_time, dt_batch, dt_time, B_batch, B_time, C_batch, C_time,
    gate_batch, gate_time, entering_index, entering_channel,
    SIZE: tl.constexpr, SUM: tl.constexpr, TOKENS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """All gradients of a tile, with the states that enter it and the gradients that later tiles send to its last."""
    batch, _, place, token, channel = _tile(time, TOKENS, CHANNELS)
    present = channel < channels
    row = tl.arange(0, TOKENS)[:, None]
    z, delta = _load_steps(dt, dt_bias, batch, token, channel, time, channels, dt_batch, dt_time, TOKENS, SUM)
    _, before = _load_steps(dt, dt_bias, batch, token - 1, channel, time, channels, dt_batch, dt_time, TOKENS, SUM)
    _, after = _load_steps(dt, dt_bias, batch, token + 1, channel, time, channels, dt_batch, dt_time, TOKENS, SUM)
    inputs = _load_numbers(x, batch, token, channel, time, channels, x_batch, x_time, SUM)
    written = delta * inputs
    before *= _load_numbers(x, batch, token - 1, channel, time, channels, x_batch, x_time, SUM)
    if starts is not None:
        begins = _load_starts(starts, batch, token, time)
        ends = _load_starts(starts, batch, token + 1, time)
    above = _load_numbers(dy, batch, token, channel, time, channels, dy_batch, dy_time, SUM)
    gradient = above
    if gate is not None:
        opening = _load_numbers(gate, batch, token, channel, time, channels, gate_batch, gate_time, SUM)
        slope = tl.sigmoid(opening)
        gradient = above * opening * slope

    total = tl.zeros((TOKENS, CHANNELS), SUM)
    to_inputs = tl.zeros((TOKENS, CHANNELS), SUM)
    if D is not None:
        skip = tl.load(D + channel, mask=present, other=0).to(SUM)
        total += skip * inputs
        to_inputs += skip * gradient
        tl.store(dD + place * channels + channel, tl.sum(gradient * inputs, 0)[None, :], mask=present)
    to_steps = tl.zeros((TOKENS, CHANNELS), SUM)
    # Sums over the channels of a program, one block of channels after another.
    partial = tl.program_id(1).to(tl.int64) * (tl.num_programs(0) // tl.cdiv(time, TOKENS)) + batch
    for index in range(SIZE):
        rate = tl.load(A + channel * SIZE + index, mask=present, other=0).to(SUM)
        column = _load_column(B, batch, token, index, time, B_batch, B_time, SUM)
        reading = _load_column(C, batch, token, index, time, C_batch, C_time, SUM)
        decay = tl.exp(delta * rate)
        back = tl.exp(after * rate)
        if starts is not None:
            decay = tl.where(begins, 0, decay)
            back = tl.where(ends, 0, back)
        # The decayed state in front of each token; taken from the state behind it, it would lose digits.
        kept = decay * before * _load_column(B, batch, token - 1, index, time, B_batch, B_time, SUM)
        enters = tl.zeros((1, CHANNELS), SUM)
        if entering is not None:
            at = place * SIZE * channels + index * entering_index + channel * entering_channel
            enters = tl.load(entering + at, mask=present, other=0)
        kept = tl.where(row == 0, decay * enters, kept)
        _, kept = tl.associative_scan((decay, kept), 0, _follow)
        state = kept + written * column
        total += state * reading

        at = (place * SIZE + index) * channels + channel
        later = tl.load(sent + at, mask=present, other=0)
        to_state = gradient * reading
        to_state = tl.where(row == TOKENS - 1, to_state + later, to_state)
        _, to_state = tl.associative_scan((back, to_state), 0, _follow, reverse=True)

        share = to_state * kept
        tl.store(dA + at, tl.sum(share * delta, 0)[None, :], mask=present)
        to_write = to_state * column
        to_inputs += to_write * delta
        to_steps += to_write * inputs + share * rate
        at = (partial * time + token) * SIZE + index
        tl.store(dB + at, tl.sum(to_state * written, 1)[:, None], mask=token < time)
        tl.store(dC + at, tl.sum(gradient * state, 1)[:, None], mask=token < time)
    inside = (token < time) & present
    at = (batch * time + token) * channels + channel
    tl.store(dx + at, to_inputs, mask=inside)
    tl.store(ddt + at, to_steps * tl.sigmoid(z), mask=inside)
    if gate is not None:
        tl.store(dgate + at, above * total * slope * (1 + opening * (1 - slope)), mask=inside)


@triton.jit
def _walk(
    x, dt, A, B, C, D, gate, dt_bias, state, starts, y, last, time, channels,
    x_batch, x_time, dt_batch, dt_time, B_batch, B_time, C_batch, C_time, gate_batch, gate_time,
    SIZE: tl.constexpr, SUM: tl.constexpr, STATES: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """Few tokens, one by one, with the states ``[channel, state]`` of some channels in registers."""
    batch = tl.program_id(0).to(tl.int64)
    channel = (tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS))[:, None]
    index = tl.arange(0, STATES)[None, :]
    present = channel < channels
    stored = present & (index < SIZE)
    at = (batch * channels + channel) * SIZE + index
    memory = tl.zeros((CHANNELS, STATES), SUM)
    if state is not None:
        memory = tl.load(state + at, mask=stored, other=0).to(SUM)
    rate = tl.load(A + channel * SIZE + index, mask=stored, other=0).to(SUM)
    for token in range(time):
        z = tl.load(dt + batch * dt_batch + token * dt_time + channel, mask=present, other=0).to(SUM)
        if dt_bias is not None:
            z += tl.load(dt_bias + channel, mask=present, other=0).to(SUM)
        delta = _softplus(z, SUM)
        number = tl.load(x + batch * x_batch + token * x_time + channel, mask=present, other=0).to(SUM)
        decay = tl.exp(delta * rate)
        if starts is not None:
            decay = tl.where(tl.load(starts + batch * time + token) != 0, 0, decay)
        column = tl.load(B + batch * B_batch + token * B_time + index, mask=index < SIZE, other=0).to(SUM)
        reading = tl.load(C + batch * C_batch + token * C_time + index, mask=index < SIZE, other=0).to(SUM)
        memory = decay * memory + delta * number * column
        total = tl.sum(memory * reading, 1)[:, None]
        if D is not None:
            total += number * tl.load(D + channel, mask=present, other=0).to(SUM)
        if gate is not None:
            opening = tl.load(gate + batch * gate_batch + token * gate_time + channel, mask=present, other=0).to(SUM)
            total *= opening * tl.sigmoid(opening)
        tl.store(y + (batch * time + token) * channels + channel, total, mask=present)
    tl.store(last + at, memory, mask=stored)


def forward(x, dt, A, B, C, D, gate, dt_bias, state, starts):
    """y, the last state, and for the backward the states that enter each tile, if there are several."""
    batch, time, channels = x.shape
    size, wide = A.shape[1], torch.promote_types(x.dtype, torch.float32)
    x, dt, B, C, gate = map(_rows, (x, dt, B, C, gate))
    A, D, dt_bias, state, starts = map(_packed, (A, D, dt_bias, state, starts))
    y, last = x.new_empty(x.shape), x.new_empty(batch, channels, size, dtype=wide)
    pointers, strides = (x, dt, A, B, C, D, gate, dt_bias), _strides(x, dt, B, C, gate)
    common = {"SIZE": size, "SUM": tl.float64 if wide == torch.float64 else tl.float32, "enable_fp_fusion": True}
    if time <= WALKED:
        block = max(1024 // triton.next_power_of_2(size), 4)
        _walk[batch, triton.cdiv(channels, block)](
            *pointers, state, starts, y, last, time, channels, *strides,
            STATES=triton.next_power_of_2(size), CHANNELS=block, num_warps=4, **common,
        )  # fmt: skip
        return y, last, last.new_empty(0)
    common |= {"TOKENS": TOKENS, "CHANNELS": CHANNELS}
    tiles, blocks = triton.cdiv(time, TOKENS), triton.cdiv(channels, CHANNELS)
    entering, layout, saved = state, (1, size), last.new_empty(0)
    if tiles > 1:
        ends, steps = last.new_empty(batch, tiles, size, channels), last.new_empty(batch, tiles, channels)
        _sum_tiles[batch * tiles, blocks](
            x, dt, A, B, dt_bias, starts, ends, steps, time, channels, *_strides(x, dt, B), num_warps=4, **common
        )
        entering, layout = torch.empty_like(ends), (channels, 1)
        _join_tiles(state, A, ends, steps, entering, last, common["SUM"], reverse=False)
        saved = entering
    _forward[batch * tiles, blocks](
        *pointers, entering, starts, y, last, time, channels, *strides, *layout, num_warps=4, **common
    )
    return y, last, saved


def backward(dy, dlast, x, dt, A, B, C, D, gate, dt_bias, state, starts, saved):
    """Gradients of all inputs but starts."""
    batch, time, channels = x.shape
    size, wide = A.shape[1], torch.promote_types(x.dtype, torch.float32)
    dy, x, dt, B, C, gate = map(_rows, (dy, x, dt, B, C, gate))
    dlast, A, D, dt_bias, state, starts = map(_packed, (dlast, A, D, dt_bias, state, starts))
    common = {"SIZE": size, "SUM": tl.float64 if wide == torch.float64 else tl.float32, "enable_fp_fusion": True}
    common |= {"TOKENS": TOKENS, "CHANNELS": CHANNELS}
    tiles, blocks = triton.cdiv(time, TOKENS), triton.cdiv(channels, CHANNELS)

    ends, steps = dlast.new_empty(batch, tiles, size, channels), dlast.new_empty(batch, tiles, channels)
    sent, dstate = torch.empty_like(ends), dlast.new_empty(batch, channels, size)
    _sum_gradients[batch * tiles, blocks](
        dy, dt, A, C, gate, dt_bias, starts, ends, steps, time, channels, *_strides(dy, dt, C, gate),
        num_warps=4, **common,
    )  # fmt: skip
    _join_tiles(dlast, A, ends, steps, sent, dstate, common["SUM"], reverse=True)

    dx, ddt = x.new_empty(x.shape), dt.new_empty(dt.shape)
    dgate = None if gate is None else gate.new_empty(gate.shape)
    dA, dB = torch.empty_like(ends), ends.new_empty(blocks, batch, time, size)
    dC, dD = torch.empty_like(dB), None if D is None else torch.empty_like(steps)
    entering, layout = (saved, (channels, 1)) if tiles > 1 else (state, (1, size))
    _backward[batch * tiles, blocks](
        dy, x, dt, A, B, C, D, gate, dt_bias, entering, sent, starts, dx, ddt, dgate, dA, dB, dC, dD,
        time, channels, *_strides(dy, x, dt, B, C, gate), *layout, num_warps=8, **common,
    )  # fmt: skip
    dD = None if D is None else dD.sum((0, 1))
    dbias = None if dt_bias is None else ddt.sum((0, 1), dtype=wide)
    return dx, ddt, dA.sum((0, 1)).T.contiguous(), dB.sum(0), dC.sum(0), dD, dgate, dbias, dstate


def _join_tiles(first, A, ends, steps, entering, final, dtype, reverse):
    batch, tiles, size, channels = ends.shape
    width = 128
    _join[batch, triton.cdiv(channels, width), size](
        first, A, ends, steps, entering, final, tiles, channels,
        SIZE=size, REVERSE=reverse, SUM=dtype, CHANNELS=width, AHEAD=AHEAD, num_warps=1, enable_fp_fusion=True,
    )  # fmt: skip


def _rows(x):
    return None if x is None else last_axis_contiguous(x)


def _packed(x):
    return None if x is None else x.contiguous()


def _strides(*tensors):
    """Of rows and tokens."""
    return [stride for x in tensors for stride in ((0, 0) if x is None else x.stride()[:2])]
