"""The elementwise recurrence on a GPU: programs walk through segments of time, token by token, in registers.

A walk rounds as the equation does. Where batch and channels alone do not fill the chip, time is cut into segments that
are walked at once: first from zero, for each segment's last number and the product of its a's; then, once these are
joined to the number that enters each segment, again for the output. The gradient walks backwards in the same way.
Complex numbers are pairs of real ones.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from seqzoo.kernels.triton_support import last_axis_contiguous

CHANNELS = 128
"""Of a program."""
AHEAD = 8
"""Tokens whose loads are under way at once. Of complex numbers, half as many channels and tokens fit in registers."""
SHORTEST = 32
"""Tokens worth a segment of their own."""
PROGRAMS = 1024
"""How many programs keep a chip busy."""


@triton.jit
def _load(pointer, at, mask, COMPLEX: tl.constexpr, TYPE: tl.constexpr):
    if COMPLEX:
        number = (
            tl.load(pointer + 2 * at, mask=mask, other=0).to(TYPE),
            tl.load(pointer + 2 * at + 1, mask=mask, other=0).to(TYPE),
        )
    else:
        number = (tl.load(pointer + at, mask=mask, other=0).to(TYPE),)
    return number


@triton.jit
def _store(pointer, at, number, mask, COMPLEX: tl.constexpr):
    if COMPLEX:
        tl.store(pointer + 2 * at, number[0], mask=mask)
        tl.store(pointer + 2 * at + 1, number[1], mask=mask)
    else:
        tl.store(pointer + at, number[0], mask=mask)


@triton.jit
def _times(x, y, COMPLEX: tl.constexpr):
    product = (x[0] * y[0] - x[1] * y[1], x[0] * y[1] + x[1] * y[0]) if COMPLEX else (x[0] * y[0],)
    return product


@triton.jit
def _plus(x, y, COMPLEX: tl.constexpr):
    total = (x[0] + y[0], x[1] + y[1]) if COMPLEX else (x[0] + y[0],)
    return total


@triton.jit
def _where(condition, x, y, COMPLEX: tl.constexpr):
    """``x`` where ``condition`` holds; elsewhere the real number ``y``."""
    if COMPLEX:
        chosen = (tl.where(condition, x[0], y), tl.where(condition, x[1], 0))
    else:
        chosen = (tl.where(condition, x[0], y),)
    return chosen


@triton.jit
def _conjugate(x, COMPLEX: tl.constexpr):
    conjugate = (x[0], -x[1]) if COMPLEX else x
    return conjugate


@triton.jit
def _constant(value, CHANNELS: tl.constexpr, COMPLEX: tl.constexpr, TYPE: tl.constexpr):
    number = (tl.full((CHANNELS,), value, TYPE),)
    if COMPLEX:
        number += (tl.zeros((CHANNELS,), TYPE),)
    return number


@triton.jit
def _load_decay(
    a, constant, starts, batch, token, live, channel, channels, a_batch, a_time, time,
    COMPLEX: tl.constexpr, SUM: tl.constexpr,
):  # fmt: skip
    """a at ``token``, and where nothing passes it: at a start. Outside of the segment, where it is not ``live``, 1."""
    inside = live & (channel < channels)
    decay = constant
    if a is not None:
        decay = _load(a, batch * a_batch + token * a_time + channel, inside, COMPLEX, SUM)
    begins = live & False
    if starts is not None:
        begins = tl.load(starts + batch * time + token, mask=live, other=0) != 0
        decay = _where(~begins, decay, 0.0, COMPLEX)
    return _where(inside, decay, 1.0, COMPLEX), begins


@triton.jit
def _place(time, length, CHANNELS: tl.constexpr):
    """A program's row, first token, token to stop at, channels, and number among the segments of all rows."""
    segments = tl.cdiv(time, length)
    segment = tl.program_id(0).to(tl.int64)
    first = segment % segments * length
    channel = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    return segment // segments, first, tl.minimum(first + length, time), channel, segment


@triton.jit
def _forward(
    a, constant, b, entering, starts, h, last, product, time, channels, length, a_batch, a_time, b_batch, b_time,
    COMPLEX: tl.constexpr, SUM: tl.constexpr, PRODUCT: tl.constexpr, CHANNELS: tl.constexpr, AHEAD: tl.constexpr,
):  # fmt: skip
    """One segment, from the number that enters it, or from zero. Of h, last and product, what is None is not stored."""
    batch, first, end, channel, segment = _place(time, length, CHANNELS)
    present = channel < channels
    number = _constant(0.0, CHANNELS, COMPLEX, SUM)
    kept = _constant(1.0, CHANNELS, COMPLEX, PRODUCT)
    if entering is not None:
        number = _load(entering, segment * channels + channel, present, COMPLEX, SUM)
    decay = number
    if constant is not None:
        decay = _load(constant, channel, present, COMPLEX, SUM)
    for begin in range(first, end, AHEAD):
        decays = ()
        inputs = ()
        for step in tl.static_range(AHEAD):
            token = begin + step
            loaded, _ = _load_decay(
                a, decay, starts, batch, token, token < end, channel, channels, a_batch, a_time, time, COMPLEX, SUM
            )
            decays += (loaded,)
            inputs += (_load(b, batch * b_batch + token * b_time + channel, present & (token < end), COMPLEX, SUM),)
        for step in tl.static_range(AHEAD):
            number = _plus(_times(decays[step], number, COMPLEX), inputs[step], COMPLEX)
            if h is not None:
                token = begin + step
                _store(h, (batch * time + token) * channels + channel, number, present & (token < end), COMPLEX)
            if product is not None:
                kept = _times(kept, decays[step], COMPLEX)
    if last is not None:
        _store(last, segment * channels + channel, number, present, COMPLEX)
    if product is not None:
        _store(product, segment * channels + channel, kept, present, COMPLEX)


@triton.jit
def _backward(
    a, constant, h, state, entering, starts, dh, da, dconstant, db, last, product, time, channels, length,
    a_batch, a_time, dh_batch, dh_time,
    COMPLEX: tl.constexpr, SUM: tl.constexpr, PRODUCT: tl.constexpr, CHANNELS: tl.constexpr, AHEAD: tl.constexpr,
):  # fmt: skip
    """One segment from its end, with the gradient that later tokens send to it, or zero. What is None is not stored."""
    batch, first, end, channel, segment = _place(time, length, CHANNELS)
    present = channel < channels
    sent = _constant(0.0, CHANNELS, COMPLEX, SUM)
    kept = _constant(1.0, CHANNELS, COMPLEX, PRODUCT)
    total = _constant(0.0, CHANNELS, COMPLEX, SUM)
    if entering is not None:
        sent = _load(entering, segment * channels + channel, present, COMPLEX, SUM)
    decay = sent
    if constant is not None:
        decay = _load(constant, channel, present, COMPLEX, SUM)
    for done in range(first, end, AHEAD):
        newest = end - 1 - (done - first)
        decays = ()
        gradients = ()
        memories = ()
        for step in tl.static_range(AHEAD):
            token = newest - step
            inside = present & (token >= first)
            loaded, begins = _load_decay(
                a, decay, starts, batch, token, token >= first, channel, channels, a_batch, a_time, time, COMPLEX, SUM
            )
            decays += (loaded,)
            gradients += (_load(dh, batch * dh_batch + token * dh_time + channel, inside, COMPLEX, SUM),)
            if db is not None:
                memory = _load(h, (batch * time + token - 1) * channels + channel, inside & (token > 0), COMPLEX, SUM)
                if state is not None:
                    before = _load(state, batch * channels + channel, inside & (token == 0), COMPLEX, SUM)
                    memory = _plus(memory, before, COMPLEX)
                memories += (_conjugate(_where(~begins, memory, 0.0, COMPLEX), COMPLEX),)
        for step in tl.static_range(AHEAD):
            token = newest - step
            inside = present & (token >= first)
            gradient = _plus(gradients[step], sent, COMPLEX)
            back = _conjugate(decays[step], COMPLEX)
            if db is not None:
                at = (batch * time + token) * channels + channel
                _store(db, at, gradient, inside, COMPLEX)
                share = _times(gradient, memories[step], COMPLEX)
                if da is not None:
                    _store(da, at, share, inside, COMPLEX)
                else:
                    total = _plus(total, share, COMPLEX)
            if product is not None:
                kept = _times(kept, back, COMPLEX)
            sent = _times(back, gradient, COMPLEX)
    if last is not None:
        _store(last, segment * channels + channel, sent, present, COMPLEX)
    if product is not None:
        _store(product, segment * channels + channel, kept, present, COMPLEX)
    if dconstant is not None:
        _store(dconstant, segment * channels + channel, total, present, COMPLEX)


@triton.jit
def _join(
    first, last, product, entering, final, segments, channels,
    REVERSE: tl.constexpr, COMPLEX: tl.constexpr, SUM: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """What enters each segment, ``first`` the first of them, and what leaves the last."""
    batch = tl.program_id(0).to(tl.int64)
    channel = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    present = channel < channels
    number = _constant(0.0, CHANNELS, COMPLEX, SUM)
    if first is not None:
        number = _load(first, batch * channels + channel, present, COMPLEX, SUM)
    for index in range(segments):
        segment = index
        if REVERSE:
            segment = segments - 1 - index
        at = (batch * segments + segment) * channels + channel
        _store(entering, at, number, present, COMPLEX)
        kept = _load(product, at, present, COMPLEX, SUM)
        number = _plus(_times(kept, number, COMPLEX), _load(last, at, present, COMPLEX, SUM), COMPLEX)
    _store(final, batch * channels + channel, number, present, COMPLEX)


def forward(a, b, state, starts):
    """All h, and the last one in float32 or better."""
    a, b = last_axis_contiguous(a), last_axis_contiguous(b)
    plan = _Plan(a, b, starts)
    h, last = b.new_empty(b.shape), b.new_empty(b.shape[0], b.shape[2], dtype=plan.wide)
    inputs = (*plan.decay, _real(b))

    def walk(entering, h, last, product):
        strides = (*plan.decay_strides, b.stride(0), b.stride(1))
        _forward[plan.grid](*inputs, entering, plan.starts, h, last, product, *plan.sizes, *strides, **plan.walking)

    if plan.segments == 1:
        walk(_real(plan.widen(state)), _real(h), _real(last), None)
    else:
        entering = plan.enter(lambda ends, product: walk(None, None, ends, product), state, last, reverse=False)
        walk(entering, _real(h), None, None)
    return h, last


def backward(dh, dlast, a, h, state, starts):
    """Gradients of a, b and state."""
    a, dh = last_axis_contiguous(a), last_axis_contiguous(dh)
    plan = _Plan(a, h, starts)
    state = plan.widen(state)
    db, dstate = torch.empty_like(h), h.new_empty(h.shape[0], h.shape[2], dtype=plan.wide)
    da = partial = None
    if a.ndim == 3:
        da = a.new_empty(a.shape)
    else:
        partial = h.new_empty(h.shape[0] * plan.segments, h.shape[2], dtype=plan.wide)

    def walk(entering, da, partial, db, last, product):
        inputs = (*plan.decay, _real(h), _real(state), entering, plan.starts, _real(dh))
        outputs = (_real(da), _real(partial), _real(db), last, product)
        strides = (*plan.decay_strides, dh.stride(0), dh.stride(1))
        _backward[plan.grid](*inputs, *outputs, *plan.sizes, *strides, **plan.walking)

    if plan.segments == 1:
        walk(_real(plan.widen(dlast)), da, partial, db, _real(dstate), None)
    else:
        entering = plan.enter(
            lambda ends, product: walk(None, None, None, None, ends, product), dlast, dstate, reverse=True
        )
        walk(entering, da, partial, db, None, None)
    return partial.sum(0) if da is None else da, db, dstate


class _Plan:
    """How the programs share the work."""

    def __init__(self, a, b, starts):
        batch, time, self.channels = b.shape
        self.wide = torch.promote_types(b.dtype, torch.float32)
        width, ahead = (CHANNELS // 2, AHEAD // 2) if b.is_complex() else (CHANNELS, AHEAD)
        blocks = triton.cdiv(self.channels, width)
        wanted = min(triton.cdiv(PROGRAMS, max(batch * blocks, 1)), triton.cdiv(time, SHORTEST))
        length = triton.cdiv(triton.cdiv(time, wanted), ahead) * ahead
        self.batch, self.segments = batch, triton.cdiv(time, length)
        self.grid = (batch * self.segments, blocks)
        self.sizes = (time, self.channels, length)
        self.starts = None if starts is None else starts.contiguous()
        self.decay = (_real(a), None) if a.ndim == 3 else (None, _real(a))
        self.decay_strides = (a.stride(0), a.stride(1)) if a.ndim == 3 else (0, 0)
        exact = self.wide in (torch.float64, torch.complex128)
        self.common = {"COMPLEX": b.is_complex(), "SUM": tl.float64 if exact else tl.float32, "CHANNELS": width}
        self.common |= {"num_warps": 1, "enable_fp_fusion": True}
        # A constant's powers are rounded the same way in every segment: in float64, so that this does not add up.
        precise = exact or a.ndim == 1
        self.product = (torch.complex128 if b.is_complex() else torch.float64) if precise else self.wide
        self.walking = self.common | {"PRODUCT": tl.float64 if precise else tl.float32, "AHEAD": ahead}

    def widen(self, x):
        return None if x is None else x.to(self.wide).contiguous()

    def enter(self, walk, first, final, reverse):
        """What enters each segment; ``final`` is filled with what leaves the last."""
        shape = (self.batch, self.segments, self.channels)
        ends, product = final.new_empty(shape), final.new_empty(shape, dtype=self.product)
        entering = torch.empty_like(ends)
        walk(_real(ends), _real(product))
        _join[self.batch, self.grid[1]](
            _real(self.widen(first)), _real(ends), _real(product), _real(entering), _real(final), self.segments,
            self.channels, REVERSE=reverse, **self.common,
        )  # fmt: skip
        return _real(entering)


def _real(x):
    return torch.view_as_real(x.resolve_conj()) if x is not None and x.is_complex() else x
