"""Softmax attention on a GPU: weights only ever in registers, tensor cores for every product.

    forward           a block of queries against the slots that it sees, with a running maximum and sum
    backward, first   the same blocks again: dq, D, and the sums of dl over slots
    backward, second  a block of slots against the queries that see it, of all heads of a group in turn: dk, dv, dc

With p_ij the weights, L_i the logarithm of their sum and D_i = o_i . do_i,

    dv_j = sum_i p_ij do_i,    dl_ij = p_ij (do_i . v_j - D_i),    gradient of a sink = -sum_i exp(sink - L_i) D_i,

and dc, the gradient of the running sum of what is forgotten, is dl's sum over slots less its sum over queries: both are
of the same numbers, computed alike in blocks of the same size. Differences of the running sum are taken in float64; for
bfloat16 they are rounded once they are those to the first query of a block.

``first`` never falls from token to token, since documents follow each other, and what is forgotten only grows with the
distance: so what a block sees is a span of blocks, whose ends are found by bisection, with another in front for sinks,
and one for the prefix.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from seqzoo.kernels.backends import accumulation_dtype
from seqzoo.kernels.triton_support import fits_large_tiles, heads_within_reach, launch_options

NOTHING = tl.constexpr(float("-inf"))


@triton.jit
def _dot(a, b, DOT: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr):
    return tl.dot(a.to(DOT), b.to(DOT), input_precision=PRECISION, out_dtype=ACC)


@triton.jit
def _rows(base, row, stride, size, COLUMNS: tl.constexpr):
    """Whole rows, 0 past their last column; every ``row`` exists."""
    column = tl.arange(0, COLUMNS)[None, :]
    return tl.load(base + row[:, None] * stride + column, mask=column < size, other=0)


@triton.jit
def _rows_inside(base, row, stride, inside, size, COLUMNS: tl.constexpr):
    """The same, 0 where a row is not ``inside``."""
    column = tl.arange(0, COLUMNS)[None, :]
    return tl.load(base + row[:, None] * stride + column, mask=inside[:, None] & (column < size), other=0)


@triton.jit
def _store_rows(base, row, stride, inside, size, tile):
    column = tl.arange(0, tile.shape[1])[None, :]
    mask = inside[:, None] & (column < size)
    tl.store(base + row[:, None] * stride + column, tile.to(base.dtype.element_ty), mask=mask)


@triton.jit
def _cap(logits, SOFT_CAP: tl.constexpr):
    """Logits under the cap, and what it leaves of their gradient."""
    x = logits / SOFT_CAP
    left = tl.exp(-2 * tl.abs(x))
    share = 2 * left / (1 + left)
    bent = tl.where(x < 0, share - 1, 1 - share)
    if logits.dtype == tl.float32:
        # Near 0 the difference from 1 has lost its last digits, and a series has them.
        y = x * x
        series = x * (1 + y * (-1 / 3 + y * (2 / 15 + y * (-17 / 315 + y * (62 / 2835)))))
        bent = tl.where(tl.abs(x) < 0.3, series, bent)
    return SOFT_CAP * bent, share * (2 - share)


@triton.jit
def _queries(decay, first, start, row, before, PREFIX: tl.constexpr, SPAN: tl.constexpr):
    """Of queries from token ``start`` on: their slots, where their documents begin, and their decay after ``base``."""
    own = before + start + row
    since = tl.zeros_like(row)
    if first is not None:
        since += tl.load(first + start + row).to(tl.int32)
    else:
        since += PREFIX
    base = 0
    mine = 0
    if decay is not None:
        base = tl.load(decay + before + start)
        mine = (tl.load(decay + own) - base).to(SPAN)
    return own, since, base, mine


@triton.jit
def _finish(
    logits, own, since, base, mine, slot, decays,
    ALONG: tl.constexpr, WINDOW: tl.constexpr, SINKS: tl.constexpr, PREFIX: tl.constexpr, SOFT_CAP: tl.constexpr,
    SPAN: tl.constexpr,
):  # fmt: skip
    """Products, queries along the axis ``ALONG``, as logits, -inf where nothing is seen; and a cap's slope."""
    slope = logits
    if SOFT_CAP > 0:
        logits, slope = _cap(logits, SOFT_CAP)
    if decays is not None:
        theirs = (base - decays).to(SPAN)
        logits += (tl.expand_dims(mine, 1 - ALONG) + tl.expand_dims(theirs, ALONG)).to(logits.dtype)
    own, since, slot = tl.expand_dims(own, 1 - ALONG), tl.expand_dims(since, 1 - ALONG), tl.expand_dims(slot, ALONG)
    seen = (slot <= own) & (slot >= since)
    if WINDOW:
        near = own - slot < WINDOW
        if SINKS:
            near |= slot - since < SINKS
        seen &= near
    if PREFIX:
        seen |= slot < PREFIX
    return tl.where(seen, logits, NOTHING), slope


@triton.jit
def _begin_of(first, token, PREFIX: tl.constexpr):
    begin = PREFIX
    if first is not None:
        begin = tl.load(first + token).to(tl.int32)
    return begin


@triton.jit
def _slots_of_queries(
    decay, first, cutoff, start, time, slots,
    WINDOW: tl.constexpr, SINKS: tl.constexpr, PREFIX: tl.constexpr, TOKENS: tl.constexpr, SLOTS: tl.constexpr,
):  # fmt: skip
    """Blocks of slots that the queries from token ``start`` on see, as `_slot_of_step` needs them, and their number.

    They are those of the prefix, so many of ``sinks`` from ``far`` on, and all from ``near`` on.
    """
    own = slots - time + start
    begin = _begin_of(first, start, PREFIX)
    near = begin
    if WINDOW:
        near = tl.maximum(begin, own - WINDOW + 1)
    near = near // SLOTS
    far = begin // SLOTS
    if cutoff is not None:
        # Blocks that end before the first query are kept from one on, the others all.
        least, low, high = tl.load(cutoff), far, (own + 1) // SLOTS
        nearest = tl.load(decay + own)
        while low < high:
            middle = (low + high) // 2
            if nearest - tl.load(decay + (middle + 1) * SLOTS - 1) >= least:
                high = middle
            else:
                low = middle + 1
        near = tl.maximum(near, low)
        far = tl.maximum(far, low)
    lead = (PREFIX + SLOTS - 1) // SLOTS
    if PREFIX:
        near = tl.maximum(near, lead)
        far = tl.maximum(far, lead)
    sinks = 0
    if SINKS:
        # Documents that begin later in the block have theirs near.
        sinks = tl.maximum(tl.minimum(tl.cdiv(begin + SINKS, SLOTS), near) - far, 0)
    end = tl.cdiv(slots - time + tl.minimum(start + TOKENS, time), SLOTS)
    return far, sinks, near, lead + sinks + end - near


@triton.jit
def _slot_of_step(step, far, sinks, near, PREFIX: tl.constexpr, SLOTS: tl.constexpr):
    """The first slot of the block that is looked at."""
    if PREFIX:
        after = step - (PREFIX + SLOTS - 1) // SLOTS
        block = tl.where(after < 0, step, tl.where(after < sinks, far + after, near + after - sinks))
    else:
        block = tl.where(step < sinks, far + step, near + step - sinks)
    return block * SLOTS


@triton.jit
def _queries_of_slots(
    first, begin, last, time, slots,
    WINDOW: tl.constexpr, SINKS: tl.constexpr, PREFIX: tl.constexpr, TOKENS: tl.constexpr,
):  # fmt: skip
    """Blocks of queries that see any of the slots from ``begin`` to ``last``, but for what is forgotten."""
    before = slots - time
    end = time
    if first is not None:
        low, high = tl.maximum(begin - before, 0), time
        while low < high:
            middle = (low + high) // 2
            if tl.load(first + middle) <= last:
                low = middle + 1
            else:
                high = middle
        end = low
    if WINDOW:
        near = tl.minimum(end, last + WINDOW - before)
        if SINKS:
            # Among the documents that begin up to here, only the last can have its sinks in the block and yet go on.
            near = tl.where(_begin_of(first, tl.maximum(end - 1, 0), PREFIX) + SINKS > begin, end, near)
        end = near
    if PREFIX:
        end = tl.where(begin < PREFIX, time, end)
    return tl.maximum(begin - before, 0) // TOKENS, tl.cdiv(end, TOKENS)


@triton.jit
def _place(lanes, TILES_LAST_FIRST: tl.constexpr):
    """The block, and which of the ``lanes`` it belongs to; the block that has most to do comes first."""
    tile = tl.program_id(0) // lanes
    if TILES_LAST_FIRST:
        tile = tl.num_programs(0) // lanes - 1 - tile
    return tile, tl.program_id(0) % lanes


@triton.jit(do_not_specialize=["time", "slots"])
def _forward(
    q, k, v, decay, sink, first, cutoff, o, sums, batches, time, slots, q_strides, k_strides, v_strides,
    HEADS: tl.constexpr, GROUPS: tl.constexpr, KEY: tl.constexpr, VALUE: tl.constexpr,
    WINDOW: tl.constexpr, SINKS: tl.constexpr, PREFIX: tl.constexpr, SOFT_CAP: tl.constexpr, SCALE: tl.constexpr,
    K_COLUMNS: tl.constexpr, V_COLUMNS: tl.constexpr, TOKENS: tl.constexpr, SLOTS: tl.constexpr,
    ACC: tl.constexpr, SPAN: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    tile, lane = _place(batches * HEADS, True)
    batch, head = (lane // HEADS).to(tl.int64), lane % HEADS
    group = head // (HEADS // GROUPS)
    start = tile * TOKENS
    row = tl.arange(0, TOKENS)
    inside = row < time - start
    # Rows past the last token repeat it.
    row = tl.minimum(row, time - start - 1)
    q += batch * q_strides[0] + start.to(tl.int64) * q_strides[1] + head * q_strides[2]
    k += batch * k_strides[0] + group * k_strides[2]
    v += batch * v_strides[0] + group * v_strides[2]
    if first is not None:
        first += batch * time
    if decay is not None:
        decay += lane.to(tl.int64) * slots
    if cutoff is not None:
        cutoff += lane
    own, since, base, mine = _queries(decay, first, start, row, slots - time, PREFIX, SPAN)

    most = tl.full((TOKENS,), NOTHING, ACC)
    total = tl.zeros((TOKENS,), ACC)
    if sink is not None:
        most = tl.zeros((TOKENS,), ACC) + tl.load(sink + head).to(ACC)
        total += 1
    out = tl.zeros((TOKENS, V_COLUMNS), ACC)
    q_tile = _rows(q, row, q_strides[1], KEY, K_COLUMNS)
    far, sinks, near, steps = _slots_of_queries(
        decay, first, cutoff, start, time, slots, WINDOW, SINKS, PREFIX, TOKENS, SLOTS
    )
    for step in range(0, steps):
        j = _slot_of_step(step, far, sinks, near, PREFIX, SLOTS)
        column = tl.arange(0, SLOTS)
        present = column < slots - j
        at = j.to(tl.int64)
        k_tile = _rows_inside(k + at * k_strides[1], column, k_strides[1], present, KEY, K_COLUMNS)
        logits = tl.dot(q_tile, tl.trans(k_tile), input_precision=PRECISION, out_dtype=ACC) * SCALE
        decays = None
        if decay is not None:
            decays = tl.load(decay + j + column, mask=present, other=0)
        logits, _ = _finish(
            logits, own, since, base, mine, j + column, decays, 0, WINDOW, SINKS, PREFIX, SOFT_CAP, SPAN
        )
        now = tl.maximum(most, tl.max(logits, 1))
        # Rows that have seen nothing so far keep zeros.
        least = tl.where(now == NOTHING, 0, now)
        weights = tl.exp(logits - least[:, None])
        keep = tl.exp(most - least)
        total = total * keep + tl.sum(weights, 1)
        most = now
        v_tile = _rows_inside(v + at * v_strides[1], column, v_strides[1], present, VALUE, V_COLUMNS)
        out = out * keep[:, None] + _dot(weights, v_tile, DOT, ACC, PRECISION)

    o += ((batch * time + start) * HEADS + head) * VALUE
    _store_rows(o, row, HEADS * VALUE, inside, VALUE, out / total[:, None])
    tl.store(sums + lane.to(tl.int64) * time + start + row, most + tl.log(total), mask=inside)


@triton.jit(do_not_specialize=["time", "slots"])
def _backward_of_queries(
    q, k, v, decay, first, cutoff, o, sums, do, dq, along, rows, batches, time, slots,
    q_strides, k_strides, v_strides, do_strides,
    HEADS: tl.constexpr, GROUPS: tl.constexpr, KEY: tl.constexpr, VALUE: tl.constexpr,
    WINDOW: tl.constexpr, SINKS: tl.constexpr, PREFIX: tl.constexpr, SOFT_CAP: tl.constexpr, SCALE: tl.constexpr,
    K_COLUMNS: tl.constexpr, V_COLUMNS: tl.constexpr, TOKENS: tl.constexpr, SLOTS: tl.constexpr,
    ACC: tl.constexpr, SPAN: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dq, D and, with a decay, the sums of dl over slots."""
    tile, lane = _place(batches * HEADS, True)
    batch, head = (lane // HEADS).to(tl.int64), lane % HEADS
    group = head // (HEADS // GROUPS)
    start = tile * TOKENS
    row = tl.arange(0, TOKENS)
    inside = row < time - start
    row = tl.minimum(row, time - start - 1)
    of_token = lane.to(tl.int64) * time + start
    q += batch * q_strides[0] + start.to(tl.int64) * q_strides[1] + head * q_strides[2]
    k += batch * k_strides[0] + group * k_strides[2]
    v += batch * v_strides[0] + group * v_strides[2]
    do += batch * do_strides[0] + start.to(tl.int64) * do_strides[1] + head * do_strides[2]
    o += ((batch * time + start) * HEADS + head) * VALUE
    if first is not None:
        first += batch * time
    if decay is not None:
        decay += lane.to(tl.int64) * slots
        over_slots = tl.zeros((TOKENS,), tl.float64)
    if cutoff is not None:
        cutoff += lane
    own, since, base, mine = _queries(decay, first, start, row, slots - time, PREFIX, SPAN)

    do_tile = _rows(do, row, do_strides[1], VALUE, V_COLUMNS)
    mean = tl.sum(_rows(o, row, HEADS * VALUE, VALUE, V_COLUMNS).to(ACC) * do_tile.to(ACC), 1)
    tl.store(along + of_token + row, mean, mask=inside)
    total = tl.load(sums + of_token + row)
    q_tile = _rows(q, row, q_strides[1], KEY, K_COLUMNS)
    dq_tile = tl.zeros((TOKENS, K_COLUMNS), ACC)
    far, sinks, near, steps = _slots_of_queries(
        decay, first, cutoff, start, time, slots, WINDOW, SINKS, PREFIX, TOKENS, SLOTS
    )
    for step in range(0, steps):
        j = _slot_of_step(step, far, sinks, near, PREFIX, SLOTS)
        column = tl.arange(0, SLOTS)
        present = column < slots - j
        at = j.to(tl.int64)
        k_tile = _rows_inside(k + at * k_strides[1], column, k_strides[1], present, KEY, K_COLUMNS)
        v_tile = _rows_inside(v + at * v_strides[1], column, v_strides[1], present, VALUE, V_COLUMNS)
        logits = tl.dot(q_tile, tl.trans(k_tile), input_precision=PRECISION, out_dtype=ACC) * SCALE
        decays = None
        if decay is not None:
            decays = tl.load(decay + j + column, mask=present, other=0)
        logits, slope = _finish(
            logits, own, since, base, mine, j + column, decays, 0, WINDOW, SINKS, PREFIX, SOFT_CAP, SPAN
        )
        weights = tl.exp(logits - total[:, None])
        dweights = tl.dot(do_tile, tl.trans(v_tile), input_precision=PRECISION, out_dtype=ACC)
        dlogits = weights * (dweights - mean[:, None])
        if decay is not None:
            over_slots += tl.sum(dlogits.to(SPAN), 1).to(tl.float64)
        if SOFT_CAP > 0:
            dlogits *= slope
        dq_tile += _dot(dlogits, k_tile, DOT, ACC, PRECISION)

    dq += ((batch * time + start) * HEADS + head) * KEY
    _store_rows(dq, row, HEADS * KEY, inside, KEY, dq_tile * SCALE)
    if decay is not None:
        tl.store(rows + of_token + row, over_slots, mask=inside)


@triton.jit(do_not_specialize=["time", "slots"])
def _backward_of_slots(
    q, k, v, decay, first, cutoff, sums, do, along, rows, dk, dv, ddecay, batches, time, slots,
    q_strides, k_strides, v_strides, do_strides,
    HEADS: tl.constexpr, GROUPS: tl.constexpr, KEY: tl.constexpr, VALUE: tl.constexpr,
    WINDOW: tl.constexpr, SINKS: tl.constexpr, PREFIX: tl.constexpr, SOFT_CAP: tl.constexpr, SCALE: tl.constexpr,
    K_COLUMNS: tl.constexpr, V_COLUMNS: tl.constexpr, TOKENS: tl.constexpr, SLOTS: tl.constexpr,
    ACC: tl.constexpr, SPAN: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dk, dv and dc, with queries as columns, as matmuls want the weights."""
    tile, lane = _place(batches * GROUPS, False)
    batch, group = (lane // GROUPS).to(tl.int64), lane % GROUPS
    j = tile * SLOTS
    column = tl.arange(0, SLOTS)
    present = column < slots - j
    last = tl.minimum(j + SLOTS, slots) - 1
    k += batch * k_strides[0] + j.to(tl.int64) * k_strides[1] + group * k_strides[2]
    v += batch * v_strides[0] + j.to(tl.int64) * v_strides[1] + group * v_strides[2]
    if first is not None:
        first += batch * time
    k_tile = _rows_inside(k, column, k_strides[1], present, KEY, K_COLUMNS)
    v_tile = _rows_inside(v, column, v_strides[1], present, VALUE, V_COLUMNS)
    dk_tile = tl.zeros((SLOTS, K_COLUMNS), ACC)
    dv_tile = tl.zeros((SLOTS, V_COLUMNS), ACC)
    begin, stop = _queries_of_slots(first, j, last, time, slots, WINDOW, SINKS, PREFIX, TOKENS)
    for member in range(HEADS // GROUPS):
        head = group * (HEADS // GROUPS) + member
        place = batch * HEADS + head
        end = stop
        decay_head = None
        decays = None
        if decay is not None:
            decay_head = decay + place * slots
            decays = tl.load(decay_head + j + column, mask=present, other=0)
            over_queries = tl.zeros((SLOTS,), tl.float64)
        if cutoff is not None:
            # Blocks that begin after the last slot are kept up to one, those before all.
            least, nearest, low = tl.load(cutoff + place), tl.load(decay_head + last), begin
            while low < end:
                middle = (low + end) // 2
                own = tl.maximum(slots - time + middle * TOKENS, last)
                if tl.load(decay_head + own) - nearest >= least:
                    low = middle + 1
                else:
                    end = middle
        q_head = q + batch * q_strides[0] + head * q_strides[2]
        do_head = do + batch * do_strides[0] + head * do_strides[2]
        for block in range(begin, end):
            start = block * TOKENS
            row = tl.arange(0, TOKENS)
            inside = row < time - start
            row = tl.minimum(row, time - start - 1)
            own, since, base, mine = _queries(decay_head, first, start, row, slots - time, PREFIX, SPAN)
            at = tl.cast(start, tl.int64)
            q_tile = _rows(q_head + at * q_strides[1], row, q_strides[1], KEY, K_COLUMNS)
            do_tile = _rows_inside(do_head + at * do_strides[1], row, do_strides[1], inside, VALUE, V_COLUMNS)
            total = tl.load(sums + place * time + start + row)
            mean = tl.load(along + place * time + start + row, mask=inside, other=0)
            logits = tl.dot(k_tile, tl.trans(q_tile), input_precision=PRECISION, out_dtype=ACC) * SCALE
            logits, slope = _finish(
                logits, own, since, base, mine, j + column, decays, 1, WINDOW, SINKS, PREFIX, SOFT_CAP, SPAN
            )
            weights = tl.exp(logits - total[None, :])
            dv_tile += _dot(weights, do_tile, DOT, ACC, PRECISION)
            dweights = tl.dot(v_tile, tl.trans(do_tile), input_precision=PRECISION, out_dtype=ACC)
            dlogits = weights * (dweights - mean[None, :])
            if decay is not None:
                over_queries += tl.sum(dlogits.to(SPAN), 1).to(tl.float64)
            if SOFT_CAP > 0:
                dlogits *= slope
            dk_tile += _dot(dlogits, q_tile, DOT, ACC, PRECISION)
        if decay is not None:
            token = j + column - (slots - time)
            over_slots = tl.load(rows + place * time + token, mask=present & (token >= 0), other=0)
            tl.store(ddecay + place * slots + j + column, over_slots - over_queries, mask=present)

    place = (batch * slots + j) * GROUPS + group
    _store_rows(dk + place * KEY, column, GROUPS * KEY, present, KEY, dk_tile * SCALE)
    _store_rows(dv + place * VALUE, column, GROUPS * VALUE, present, VALUE, dv_tile)


def forward(q, k, v, decay, sink, first, cutoff, window, sinks, prefix, soft_cap, scale):
    """o ``[batch time head value]``, and the logarithms of sums of weights ``[batch head time]``."""
    q, k, v = (heads_within_reach(x) for x in (q, k, v))
    decay, sink, first, cutoff = _packed(decay, sink, first, cutoff)
    batch, time, heads, _ = q.shape
    o = q.new_empty(batch, time, heads, v.shape[3])
    sums = q.new_empty(batch, heads, time, dtype=accumulation_dtype(v))
    settings = _settings(q, k, v, window, sinks, prefix, soft_cap, scale)
    config = _config("forward", q, v)
    _forward[batch * heads * triton.cdiv(time, config["TOKENS"]),](
        q, k, v, decay, sink, first, cutoff, o, sums, batch, time, k.shape[1], q.stride(), k.stride(), v.stride(),
        **settings, **config,
    )  # fmt: skip
    return o, sums


def backward(do, q, k, v, decay, sink, first, cutoff, o, sums, window, sinks, prefix, soft_cap, scale):
    """Gradients of q, k, v, decay and sink; None for what is None."""
    do, q, k, v = (heads_within_reach(x) for x in (do, q, k, v))
    decay, sink, first, cutoff = _packed(decay, sink, first, cutoff)
    (batch, time, heads, _), (slots, groups) = q.shape, k.shape[1:3]
    dq, dk, dv = (x.new_empty(x.shape) for x in (q, k, v))
    along = torch.empty_like(sums)
    rows, ddecay = (None if decay is None else decay.new_empty(batch, heads, size) for size in (time, slots))
    settings = _settings(q, k, v, window, sinks, prefix, soft_cap, scale)
    config = _config("queries", q, v)
    strides = q.stride(), k.stride(), v.stride(), do.stride()
    _backward_of_queries[batch * heads * triton.cdiv(time, config["TOKENS"]),](
        q, k, v, decay, first, cutoff, o, sums, do, dq, along, rows, batch, time, slots, *strides,
        **settings, **config,
    )  # fmt: skip
    config = _config("slots", q, v)
    _backward_of_slots[batch * groups * triton.cdiv(slots, config["SLOTS"]),](
        q, k, v, decay, first, cutoff, sums, do, along, rows, dk, dv, ddecay, batch, time, slots, *strides,
        **settings, **config,
    )  # fmt: skip
    dsink = None if sink is None else -((sink[:, None] - sums).exp() * along).sum((0, 2))
    return dq, dk, dv, ddecay, dsink


def _packed(*tensors):
    return [None if x is None else x.contiguous() for x in tensors]


# Queries and slots of a block, warps and stages, by the larger of keys and values, for operands of two bytes. Both
# kernels of the backward have the same blocks.
CONFIGS = {
    ("forward", 64): (128, 64, 4, 2),
    ("forward", 128): (128, 64, 8, 2),
    ("forward", 256): (64, 32, 8, 2),
    ("queries", 64): (32, 64, 4, 2),
    ("queries", 128): (64, 64, 8, 1),
    ("queries", 256): (32, 32, 8, 1),
    ("slots", 64): (32, 64, 4, 1),
    ("slots", 128): (64, 64, 8, 1),
    ("slots", 256): (32, 32, 8, 1),
}
LARGE = {
    ("forward", 256): (128, 32, 8, 2),
    ("queries", 64): (64, 64, 8, 2),
    ("queries", 128): (32, 128, 8, 2),
    ("slots", 64): (64, 64, 8, 1),
    ("slots", 128): (32, 128, 8, 1),
}
AMD = {
    ("queries", 128): (32, 64, 8, 1),
    ("queries", 256): (16, 32, 8, 1),
    ("slots", 128): (32, 64, 8, 1),
    ("slots", 256): (16, 32, 8, 1),
}
TYPES = {torch.bfloat16: tl.bfloat16, torch.float32: tl.float32, torch.float64: tl.float64}


def _settings(q, k, v, window, sinks, prefix, soft_cap, scale):
    """What all kernels are compiled for."""
    # As weights and their gradients, float16 has float32's range on tensor cores as tfloat32, which holds its digits.
    operand = torch.float32 if v.dtype == torch.float16 else v.dtype
    exact = "ieee" if torch.version.hip or operand != torch.float32 else "tf32x3"
    return {
        "HEADS": q.shape[2], "GROUPS": k.shape[2], "KEY": q.shape[3], "VALUE": v.shape[3],
        "WINDOW": window, "SINKS": sinks, "PREFIX": prefix, "SOFT_CAP": soft_cap, "SCALE": scale,
        "ACC": TYPES[accumulation_dtype(v)], "DOT": TYPES[operand],
        "SPAN": tl.float32 if operand == torch.bfloat16 else tl.float64,
        "PRECISION": "tf32" if v.dtype == torch.float16 and exact == "tf32x3" else exact,
    }  # fmt: skip


def _config(kernel, q, v):
    """Blocks and warps for the sizes of heads; smaller blocks where tensor cores get wider numbers than bfloat16."""
    columns = [max(triton.next_power_of_2(x.shape[3]), 16) for x in (q, v)]
    configs = CONFIGS | (LARGE if fits_large_tiles() else {}) | (AMD if torch.version.hip else {})
    tokens, slots, num_warps, num_stages = configs[kernel, max(*columns, 64)]
    if q.dtype != torch.bfloat16:
        tokens, slots, num_stages = max(tokens // 2, 16), max(slots // 2, 16), 1
    if kernel == "forward":
        tokens = max(min(tokens, triton.next_power_of_2(q.shape[1])), 16)
    return {
        "K_COLUMNS": columns[0], "V_COLUMNS": columns[1], "TOKENS": tokens, "SLOTS": slots,
    } | launch_options(num_warps, num_stages)  # fmt: skip
