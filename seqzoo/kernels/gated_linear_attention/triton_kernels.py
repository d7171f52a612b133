"""Gated linear attention on a GPU: matmuls inside chunks, chunks in parallel, tensor cores for every product.

Forward and backward are the same two steps, and a third for the other gradients:

    walk      over the chunks in turn: the S that enters each; backward, from the end: the dS that leaves each
    read      all chunks at once: o = (q e^P) S + A v; backward: dv = (k e^R) dS + A^T do
    gradient  all chunks at once: dq, dk, dg, du

P is the decay from the chunk's start to a read, R the decay from a write to the chunk's end, A the decayed scores of
the chunk. The S that are kept, one a chunk, live for one call: the backward walks again.

One decay of -1e4 in a running sum blurs all later differences of it. So none is taken: the sum over a span is a sum
over its tokens, all of one sign. For a decay per head, these sums are the columns of one masked ``cumsum``. For a decay
per channel, the span between two tokens is cut in the middle of the smallest aligned block of 2, 4, 8 ... tokens that
holds both; each block size is one matmul, of q decayed from the middle and k decayed up to it. No exponent is above 0,
whatever the decays, and no pair of tokens is treated by itself. These sums are products with matrices of zeros and
ones, and so are the gradients, sums over the same spans the other way round.

A document's start is a decay of e^CUT = 0. With a bonus, a token reads before its own decay: spans are ``EXCLUSIVE``.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from seqzoo.kernels.triton_support import fits_large_tiles, heads_within_reach, launch_options

# e^CUT is 0 in float64 too, and CUT squared is far from the largest number of any type.
CUT = tl.constexpr(-1e4)
# Up to here a token at a time is less work than a chunk.
STEPS = 16
# Programs of a launch that fill a large GPU, and the shortest walk that is worth cutting out of a long one.
PROGRAMS = 256
CHUNKS_A_PIECE = 16
JOIN_BLOCK = 512


@triton.jit
def _dot(a, b, DOT: tl.constexpr, PRECISION: tl.constexpr):
    return tl.dot(a.to(DOT), b.to(DOT), input_precision=PRECISION)


@triton.jit
def _span_sums(selected, x, DOT: tl.constexpr, EXACT: tl.constexpr):
    """Sums of the rows of ``x`` that each row of ``selected`` selects, to 2^-17 or better."""
    ones = selected.to(DOT)
    if ones.dtype == tl.bfloat16:
        high = x.to(DOT)
        return tl.dot(ones, high) + tl.dot(ones, (x - high.to(x.dtype)).to(DOT))
    return tl.dot(ones, x.to(DOT), input_precision=EXACT)


@triton.jit
def _tile(base, token, token_stride, column, inside, WIDTH: tl.constexpr):
    mask = inside[:, None] & (column < WIDTH)[None, :]
    return tl.load(base + token[:, None] * token_stride + column[None, :], mask=mask, other=0)


@triton.jit
def _begins(starts, token, inside):
    return tl.load(starts + token, mask=inside, other=0) != 0


@triton.jit
def _log_decay(
    g, starts, token, inside, column, HEADS: tl.constexpr, KEY: tl.constexpr, DECAY: tl.constexpr, ACC: tl.constexpr
):
    """``[token]``, or ``[token, column]`` for a decay per channel: CUT where a document starts, 0 outside."""
    if DECAY == "channel":
        decay = _tile(g, token, HEADS * KEY, column, inside, KEY).to(ACC)
        if starts is not None:
            decay = tl.where(_begins(starts, token, inside)[:, None], CUT, decay)
    else:
        decay = tl.zeros(token.shape, ACC)
        if DECAY == "scalar":
            decay = tl.load(g + token * HEADS, mask=inside, other=0).to(ACC)
        if starts is not None:
            decay = tl.where(_begins(starts, token, inside), CUT, decay)
    return tl.maximum(decay, CUT)


@triton.jit
def _decay_up_to_read(
    g, starts, token, left, column,
    HEADS: tl.constexpr, KEY: tl.constexpr, DECAY: tl.constexpr, EXCLUSIVE: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """e^P: from the state that enters the chunk to what each of its ``left`` tokens reads."""
    inside = (token >= EXCLUSIVE) & (token < left)
    decay = tl.cumsum(_log_decay(g, starts, token - EXCLUSIVE, inside, column, HEADS, KEY, DECAY, ACC), 0)
    if EXCLUSIVE and starts is not None:
        cut = tl.where(_begins(starts, token, token < left), CUT, 0.0)
        decay += cut[:, None] if DECAY == "channel" else cut
    return tl.exp(decay)


@triton.jit
def _decay_to_end(
    g, starts, token, left, column,
    HEADS: tl.constexpr, KEY: tl.constexpr, DECAY: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """e^R: from each write to the state that leaves the chunk."""
    inside = (token + 1 < token.shape[0]) & (token + 1 < left)
    decay = _log_decay(g, starts, token + 1, inside, column, HEADS, KEY, DECAY, ACC)
    return tl.exp(tl.cumsum(decay, 0, reverse=True))


@triton.jit
def _decay_between(
    g, starts, token, left,
    HEADS: tl.constexpr, DECAY: tl.constexpr, EXCLUSIVE: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """``[token, token]``: from the column's write to the row's read; 0 for what a row does not see."""
    row, column = token[:, None], token[None, :]
    if DECAY == "none" and starts is None:
        return tl.where(row >= column + EXCLUSIVE, 1.0, 0.0).to(ACC)
    inside = (token >= EXCLUSIVE) & (token < left)
    decay = _log_decay(g, starts, token - EXCLUSIVE, inside, token, HEADS, 1, DECAY, ACC)
    span = tl.cumsum(tl.where(row > column + EXCLUSIVE, decay[:, None], 0), 0)
    if EXCLUSIVE and starts is not None:
        span += tl.where(_begins(starts, token, token < left), CUT, 0.0)[:, None]
    return tl.where(row >= column + EXCLUSIVE, tl.exp(span), 0)


@triton.jit
def _block_decays(g, cut, token, level, EXCLUSIVE: tl.constexpr, DOT: tl.constexpr, EXACT: tl.constexpr):
    """Decays to and from the middle of blocks of two halves of ``2 ** level`` tokens.

    Returns:
        ``[token, token]`` which rows read which columns across a middle; ``[token, token]`` which columns decay what a
        row reads or writes on the way from or to the middle; and e^ the sum of these, ``[token, column of g]``.
    """
    row, column = token[:, None], token[None, :]
    reads = (row >> level) % 2 == 1
    pairs = reads & (row >> level == (column >> level) + 1)
    span = (row >> level == column >> level) & ((reads & (column + EXCLUSIVE <= row)) | (~reads & (column > row)))
    decay = _span_sums(span, g, DOT, EXACT)
    if EXCLUSIVE:
        decay += tl.where(reads, cut[:, None], 0)
    return pairs, span, tl.exp(decay)


@triton.jit
def _channel_scores(
    q, k, g, cut, token, LEVELS: tl.constexpr, EXCLUSIVE: tl.constexpr,
    ACC: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    """``[token, token]``: what the columns of q and k add to the scores below the diagonal, for a decay per channel."""
    scores = tl.zeros((token.shape[0], token.shape[0]), ACC)
    for level in range(LEVELS):
        pairs, _, decay = _block_decays(g, cut, token, level, EXCLUSIVE, DOT, EXACT)
        scores = tl.where(pairs, _dot(q * decay, tl.trans(k * decay), DOT, PRECISION), scores)
    return scores


@triton.jit(do_not_specialize=["time", "pieces"])
def _walk(
    x, y, g, starts, initial, entering, final, kept, time, pieces, x_strides, y_strides,
    HEADS: tl.constexpr, GROUPS: tl.constexpr, KEY: tl.constexpr, VALUE: tl.constexpr,
    DECAY: tl.constexpr, EXCLUSIVE: tl.constexpr, REVERSE: tl.constexpr,
    CHUNK: tl.constexpr, K_BLOCK: tl.constexpr, V_BLOCK: tl.constexpr,
    ACC: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """S over a piece of the chunks, from x = k and y = v; or in reverse dS, from x = q and y = do.

    Stores what enters each chunk, or for a first look at each piece the decay over it.
    """
    place = tl.program_id(0).to(tl.int64)
    piece = tl.program_id(0) % pieces
    lane = tl.program_id(0) // pieces
    batch, head = (lane // HEADS).to(tl.int64), lane % HEADS
    k_column = tl.program_id(1) * K_BLOCK + tl.arange(0, K_BLOCK)
    v_column = tl.program_id(2) * V_BLOCK + tl.arange(0, V_BLOCK)
    token = tl.arange(0, CHUNK)
    cell = k_column[:, None] * VALUE + v_column[None, :]
    present = (k_column < KEY)[:, None] & (v_column < VALUE)[None, :]
    chunks = tl.cdiv(time, CHUNK)
    length = tl.cdiv(chunks, pieces)
    begin = piece * length
    end = tl.minimum(begin + length, chunks)

    x += batch * x_strides[0] + head // (HEADS // GROUPS) * x_strides[2]
    y += batch * y_strides[0] + head * y_strides[2]
    memory = tl.zeros((K_BLOCK, V_BLOCK), ACC)
    if initial is not None:
        memory += tl.load(initial + place * KEY * VALUE + cell, mask=present, other=0).to(ACC)
    over = tl.zeros((K_BLOCK,), ACC)
    for step in range(begin, end):
        chunk = begin + end - 1 - step if REVERSE else step
        first = tl.cast(chunk, tl.int64) * CHUNK
        left = time - first
        inside = token < left
        if entering is not None:
            at = (tl.cast(lane, tl.int64) * chunks + chunk) * KEY * VALUE
            tl.store(entering + at + cell, memory, mask=present)
        x_tile = _tile(x + first * x_strides[1], token, x_strides[1], k_column, inside, KEY)
        y_tile = _tile(y + first * y_strides[1], token, y_strides[1], v_column, inside, VALUE)
        if DECAY != "none" or starts is not None:
            g_chunk, starts_chunk = g, starts
            if DECAY != "none":
                g_chunk += ((batch * time + first) * HEADS + head) * (KEY if DECAY == "channel" else 1)
            if starts is not None:
                starts_chunk += batch * time + first
            total = tl.sum(_log_decay(g_chunk, starts_chunk, token, inside, k_column, HEADS, KEY, DECAY, ACC), 0)
            if REVERSE:
                decay = _decay_up_to_read(
                    g_chunk, starts_chunk, token, left, k_column, HEADS, KEY, DECAY, EXCLUSIVE, ACC
                )
            else:
                decay = _decay_to_end(g_chunk, starts_chunk, token, left, k_column, HEADS, KEY, DECAY, ACC)
            over += total
            if DECAY == "channel":
                memory *= tl.exp(total)[:, None]
                x_tile = x_tile.to(ACC) * decay
            else:
                memory *= tl.exp(total)
                x_tile = x_tile.to(ACC) * decay[:, None]
        memory += _dot(tl.trans(x_tile), y_tile, DOT, PRECISION)
    if kept is not None:
        tl.store(final + place * KEY * VALUE + cell, memory, mask=present)
        tl.store(kept + place * KEY + k_column, tl.exp(over), mask=k_column < KEY)
    elif piece == (0 if REVERSE else pieces - 1):
        tl.store(final + tl.cast(lane, tl.int64) * KEY * VALUE + cell, memory, mask=present)


@triton.jit(do_not_specialize=["pieces"])
def _join(
    states, kept, initial, pieces,
    KEY: tl.constexpr, VALUE: tl.constexpr, REVERSE: tl.constexpr, BLOCK: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """From the S that each piece leaves when none enters, the S that enters each, in its place."""
    lane = tl.program_id(0).to(tl.int64)
    cell = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    present = cell < KEY * VALUE
    memory = tl.zeros((BLOCK,), ACC)
    if initial is not None:
        memory += tl.load(initial + lane * KEY * VALUE + cell, mask=present, other=0).to(ACC)
    for step in range(pieces):
        place = lane * pieces + (pieces - 1 - step if REVERSE else step)
        own = tl.load(states + place * KEY * VALUE + cell, mask=present, other=0)
        decay = tl.load(kept + place * KEY + cell // VALUE, mask=present, other=0)
        tl.store(states + place * KEY * VALUE + cell, memory, mask=present)
        memory = decay * memory + own


@triton.jit(do_not_specialize=["time"])
def _read(
    q, k, y, g, bonus, starts, memories, out, time, q_strides, k_strides, y_strides,
    HEADS: tl.constexpr, GROUPS: tl.constexpr, KEY: tl.constexpr, VALUE: tl.constexpr,
    DECAY: tl.constexpr, EXCLUSIVE: tl.constexpr, BACKWARD: tl.constexpr,
    CHUNK: tl.constexpr, LEVELS: tl.constexpr, K_BLOCK: tl.constexpr, V_BLOCK: tl.constexpr,
    ACC: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    """A chunk's o from y = v and the S that enters it; or backward its dv, from y = do and the dS that leaves it."""
    chunks = tl.cdiv(time, CHUNK)
    lane = tl.program_id(0) // chunks
    first = (tl.program_id(0) % chunks).to(tl.int64) * CHUNK
    batch, head = (lane // HEADS).to(tl.int64), lane % HEADS
    group = head // (HEADS // GROUPS)
    v_column = tl.program_id(1) * V_BLOCK + tl.arange(0, V_BLOCK)
    token = tl.arange(0, CHUNK)
    left = time - first
    inside = token < left

    q += batch * q_strides[0] + first * q_strides[1] + group * q_strides[2]
    k += batch * k_strides[0] + first * k_strides[1] + group * k_strides[2]
    y += batch * y_strides[0] + first * y_strides[1] + head * y_strides[2]
    if DECAY != "none":
        g += ((batch * time + first) * HEADS + head) * (KEY if DECAY == "channel" else 1)
    cut = tl.zeros((CHUNK,), ACC)
    if starts is not None:
        starts += batch * time + first
        cut = tl.where(_begins(starts, token, inside), CUT, cut)
    memories += tl.program_id(0).to(tl.int64) * KEY * VALUE

    scores = tl.zeros((CHUNK, CHUNK), ACC)
    own = tl.zeros((CHUNK,), ACC)
    result = tl.zeros((CHUNK, V_BLOCK), ACC)
    for start in range(0, KEY, K_BLOCK):
        k_column = start + tl.arange(0, K_BLOCK)
        q_tile = _tile(q, token, q_strides[1], k_column, inside, KEY)
        k_tile = _tile(k, token, k_strides[1], k_column, inside, KEY)
        present = (k_column < KEY)[:, None] & (v_column < VALUE)[None, :]
        memory = tl.load(memories + k_column[:, None] * VALUE + v_column[None, :], mask=present, other=0)
        x_tile = k_tile if BACKWARD else q_tile
        if DECAY == "channel":
            if BACKWARD:
                decay = _decay_to_end(g, starts, token, left, k_column, HEADS, KEY, DECAY, ACC)
            else:
                decay = _decay_up_to_read(g, starts, token, left, k_column, HEADS, KEY, DECAY, EXCLUSIVE, ACC)
            result += _dot(x_tile.to(ACC) * decay, memory, DOT, PRECISION)
            decay = _log_decay(g, starts, token, inside, k_column, HEADS, KEY, DECAY, ACC)
            scores += _channel_scores(
                q_tile.to(ACC), k_tile.to(ACC), decay, cut, token, LEVELS, EXCLUSIVE, ACC, DOT, PRECISION, EXACT
            )
        else:
            result += _dot(x_tile, memory, DOT, PRECISION)
            scores += _dot(q_tile, tl.trans(k_tile), DOT, PRECISION)
        if DECAY == "channel" or EXCLUSIVE:
            product = q_tile.to(ACC) * k_tile.to(ACC)
            if bonus is not None:
                product *= tl.load(bonus + head * KEY + k_column, mask=k_column < KEY, other=0).to(ACC)[None, :]
            own += tl.sum(product, 1)
    if DECAY != "channel":
        scores *= _decay_between(g, starts, token, left, HEADS, DECAY, EXCLUSIVE, ACC)
        if DECAY == "scalar" or starts is not None:
            if BACKWARD:
                decay = _decay_to_end(g, starts, token, left, token, HEADS, KEY, DECAY, ACC)
            else:
                decay = _decay_up_to_read(g, starts, token, left, token, HEADS, KEY, DECAY, EXCLUSIVE, ACC)
            result *= decay[:, None]
    if DECAY == "channel" or EXCLUSIVE:
        scores = tl.where(token[:, None] == token[None, :], own[:, None], scores)
    if BACKWARD:
        scores = tl.trans(scores)
    y_tile = _tile(y, token, y_strides[1], v_column, inside, VALUE)
    result += _dot(scores, y_tile, DOT, PRECISION)
    out += ((batch * time + first) * HEADS + head) * VALUE
    mask = inside[:, None] & (v_column < VALUE)[None, :]
    tl.store(out + token[:, None] * (HEADS * VALUE) + v_column[None, :], result, mask=mask)


@triton.jit
def _score_gradients(
    v, do, token, inside, v_stride, do_stride, VALUE: tl.constexpr, V_BLOCK: tl.constexpr,
    ACC: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """do v^T."""
    dscores = tl.zeros((token.shape[0], token.shape[0]), ACC)
    for start in range(0, VALUE, V_BLOCK):
        v_column = start + tl.arange(0, V_BLOCK)
        v_tile = _tile(v, token, v_stride, v_column, inside, VALUE)
        do_tile = _tile(do, token, do_stride, v_column, inside, VALUE)
        dscores += _dot(do_tile, tl.trans(v_tile), DOT, PRECISION)
    return dscores


@triton.jit
def _state_gradients(
    v, do, memories, dmemories, token, inside, v_stride, do_stride, k_column,
    KEY: tl.constexpr, VALUE: tl.constexpr, V_BLOCK: tl.constexpr,
    ACC: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """do S^T, v dS^T, and the products of S and dS summed over values."""
    dq_state = tl.zeros((token.shape[0], k_column.shape[0]), ACC)
    dk_state = tl.zeros((token.shape[0], k_column.shape[0]), ACC)
    kept = tl.zeros(k_column.shape, ACC)
    for start in range(0, VALUE, V_BLOCK):
        v_column = start + tl.arange(0, V_BLOCK)
        v_tile = _tile(v, token, v_stride, v_column, inside, VALUE)
        do_tile = _tile(do, token, do_stride, v_column, inside, VALUE)
        present = (k_column < KEY)[:, None] & (v_column < VALUE)[None, :]
        place = k_column[:, None] * VALUE + v_column[None, :]
        memory = tl.load(memories + place, mask=present, other=0)
        dmemory = tl.load(dmemories + place, mask=present, other=0)
        dq_state += _dot(do_tile, tl.trans(memory), DOT, PRECISION)
        dk_state += _dot(v_tile, tl.trans(dmemory), DOT, PRECISION)
        kept += tl.sum(memory.to(ACC) * dmemory.to(ACC), 1)
    return dq_state, dk_state, kept


@triton.jit(do_not_specialize=["time"])
def _gradient(
    q, k, v, do, g, bonus, starts, memories, dmemories, dq, dk, dg, dbonus,
    time, q_strides, k_strides, v_strides, do_strides,
    HEADS: tl.constexpr, GROUPS: tl.constexpr, SHARE: tl.constexpr, KEY: tl.constexpr, VALUE: tl.constexpr,
    DECAY: tl.constexpr, EXCLUSIVE: tl.constexpr,
    CHUNK: tl.constexpr, LEVELS: tl.constexpr, K_BLOCK: tl.constexpr, V_BLOCK: tl.constexpr,
    ACC: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    """A chunk's dq and dk, summed over ``SHARE`` heads of a group, and their dg and du."""
    chunks = tl.cdiv(time, CHUNK)
    chunk = (tl.program_id(0) % chunks).to(tl.int64)
    first = chunk * CHUNK
    lane = tl.program_id(0) // chunks
    batch, bundle = (lane // (HEADS // SHARE)).to(tl.int64), lane % (HEADS // SHARE)
    group = bundle * SHARE // (HEADS // GROUPS)
    k_column = tl.program_id(1) * K_BLOCK + tl.arange(0, K_BLOCK)
    k_present = k_column < KEY
    token = tl.arange(0, CHUNK)
    row, column = token[:, None], token[None, :]
    left = time - first
    inside = token < left

    q += batch * q_strides[0] + first * q_strides[1] + group * q_strides[2]
    k += batch * k_strides[0] + first * k_strides[1] + group * k_strides[2]
    cut = tl.zeros((CHUNK,), ACC)
    if starts is not None:
        starts += batch * time + first
        cut = tl.where(_begins(starts, token, inside), CUT, cut)
    q_tile = _tile(q, token, q_strides[1], k_column, inside, KEY)
    k_tile = _tile(k, token, k_strides[1], k_column, inside, KEY)
    dq_tile = tl.zeros((CHUNK, K_BLOCK), ACC)
    dk_tile = tl.zeros((CHUNK, K_BLOCK), ACC)
    for member in range(SHARE):
        head = bundle * SHARE + member
        of_head = (batch * time + first) * HEADS + head
        v_head = v + batch * v_strides[0] + first * v_strides[1] + head * v_strides[2]
        do_head = do + batch * do_strides[0] + first * do_strides[1] + head * do_strides[2]
        at_chunk = ((batch * HEADS + head) * chunks + chunk) * KEY * VALUE

        # v and do are read twice, so that less has to be in registers at once.
        dscores = _score_gradients(
            v_head, do_head, token, inside, v_strides[1], do_strides[1], VALUE, V_BLOCK, ACC, DOT, PRECISION
        )
        q_wide, k_wide = q_tile.to(ACC), k_tile.to(ACC)
        if DECAY == "channel":
            dq_state, dk_state, kept = _state_gradients(
                v_head, do_head, memories + at_chunk, dmemories + at_chunk, token, inside, v_strides[1], do_strides[1],
                k_column, KEY, VALUE, V_BLOCK, ACC, DOT, PRECISION,
            )  # fmt: skip
            g_head = g + of_head * KEY
            decay = _decay_up_to_read(g_head, starts, token, left, k_column, HEADS, KEY, DECAY, EXCLUSIVE, ACC)
            dq_state *= decay
            dq_tile += dq_state
            decay = _decay_to_end(g_head, starts, token, left, k_column, HEADS, KEY, DECAY, ACC)
            dk_state *= decay
            dk_tile += dk_state
            decays = _log_decay(g_head, starts, token, inside, k_column, HEADS, KEY, DECAY, ACC)
            dg_tile = _dot(row + EXCLUSIVE <= column, q_wide * dq_state, DOT, PRECISION)
            dg_tile += _dot(row > column, k_wide * dk_state, DOT, PRECISION)
            dg_tile += (tl.exp(tl.sum(decays, 0)) * kept)[None, :]
            for level in range(LEVELS):
                pairs, span, decay = _block_decays(decays, cut, token, level, EXCLUSIVE, DOT, EXACT)
                dpairs = tl.where(pairs, dscores, 0)
                dreads = decay * _dot(dpairs, k_wide * decay, DOT, PRECISION)
                dwrites = decay * _dot(tl.trans(dpairs), q_wide * decay, DOT, PRECISION)
                dq_tile += dreads
                dk_tile += dwrites
                dg_tile += _dot(tl.trans(span), q_wide * dreads + k_wide * dwrites, DOT, PRECISION)
            mask = inside[:, None] & k_present[None, :]
            tl.store(dg + of_head * KEY + row * (HEADS * KEY) + k_column[None, :], dg_tile, mask=mask)
        else:
            g_head = g
            if DECAY == "scalar":
                g_head += of_head
            dpairs = dscores * _decay_between(g_head, starts, token, left, HEADS, DECAY, EXCLUSIVE, ACC)
            dq_tile += _dot(dpairs, k_tile, DOT, PRECISION)
            dk_tile += _dot(tl.trans(dpairs), q_tile, DOT, PRECISION)
            if DECAY == "scalar":
                dspans = dpairs * _dot(q_tile, tl.trans(k_tile), DOT, PRECISION)
                dspans = _dot(row + EXCLUSIVE <= column, dspans, DOT, PRECISION)
                dg_token = tl.sum(tl.where(column < row, dspans, 0), 1)
            dq_state, dk_state, kept = _state_gradients(
                v_head, do_head, memories + at_chunk, dmemories + at_chunk, token, inside, v_strides[1], do_strides[1],
                k_column, KEY, VALUE, V_BLOCK, ACC, DOT, PRECISION,
            )  # fmt: skip
            if DECAY == "scalar" or starts is not None:
                decay = _decay_up_to_read(g_head, starts, token, left, token, HEADS, KEY, DECAY, EXCLUSIVE, ACC)
                dq_state *= decay[:, None]
                decay = _decay_to_end(g_head, starts, token, left, token, HEADS, KEY, DECAY, ACC)
                dk_state *= decay[:, None]
            dq_tile += dq_state
            dk_tile += dk_state
            if DECAY == "scalar":
                dspans = tl.where(column < row, tl.sum(k_wide * dk_state, 1)[None, :], 0)
                dspans += tl.where(row + EXCLUSIVE <= column, tl.sum(q_wide * dq_state, 1)[None, :], 0)
                total = tl.sum(_log_decay(g_head, starts, token, inside, token, HEADS, KEY, DECAY, ACC), 0)
                dg_token += tl.sum(dspans, 1) + tl.exp(total) * tl.sum(kept, 0)
                # Every block of columns has its own share: [block, batch, time, head].
                lanes = (tl.num_programs(0) // chunks // (HEADS // SHARE)).to(tl.int64)
                share = dg + tl.program_id(1) * lanes * time * HEADS + of_head
                tl.store(share + token * HEADS, dg_token, mask=inside)
        if DECAY == "channel" or EXCLUSIVE:
            down = tl.sum(tl.where(row == column, dscores, 0), 1)[:, None]
            if bonus is not None:
                at = head * KEY + k_column
                scale = tl.load(bonus + at, mask=k_present, other=0).to(ACC)[None, :] * down
                share = tl.sum(down * q_wide * k_wide, 0)
                tl.store(dbonus + (batch * chunks + chunk) * HEADS * KEY + at, share, mask=k_present)
            else:
                scale = tl.broadcast_to(down, (CHUNK, K_BLOCK))
            dq_tile += scale * k_wide
            dk_tile += scale * q_wide

    # Bundles of one group lie one after the other: [batch, time, bundle, key].
    place = ((batch * time + first) * (HEADS // SHARE) + bundle) * KEY
    place += row * (HEADS // SHARE * KEY) + k_column[None, :]
    mask = inside[:, None] & k_present[None, :]
    tl.store(dq + place, dq_tile, mask=mask)
    tl.store(dk + place, dk_tile, mask=mask)


@triton.jit(do_not_specialize=["time"])
def _step(
    q, k, v, g, bonus, starts, initial, out, final, time, q_strides, k_strides, v_strides,
    HEADS: tl.constexpr, GROUPS: tl.constexpr, KEY: tl.constexpr, VALUE: tl.constexpr, DECAY: tl.constexpr,
    K_BLOCK: tl.constexpr, V_BLOCK: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """The equation token by token, with S in registers."""
    lane = tl.program_id(0).to(tl.int64)
    batch, head = lane // HEADS, lane % HEADS
    group = head // (HEADS // GROUPS)
    k_column = tl.arange(0, K_BLOCK)
    v_column = tl.program_id(1) * V_BLOCK + tl.arange(0, V_BLOCK)
    k_present, v_present = k_column < KEY, v_column < VALUE
    present = k_present[:, None] & v_present[None, :]
    place = lane * KEY * VALUE + k_column[:, None] * VALUE + v_column[None, :]
    q += batch * q_strides[0] + group * q_strides[2]
    k += batch * k_strides[0] + group * k_strides[2]
    v += batch * v_strides[0] + head * v_strides[2]

    memory = tl.zeros((K_BLOCK, V_BLOCK), ACC)
    if initial is not None:
        memory += tl.load(initial + place, mask=present, other=0).to(ACC)
    for step in range(time):
        token = batch * time + step
        q_token = tl.load(q + step * q_strides[1] + k_column, mask=k_present, other=0).to(ACC)
        k_token = tl.load(k + step * k_strides[1] + k_column, mask=k_present, other=0).to(ACC)
        v_token = tl.load(v + step * v_strides[1] + v_column, mask=v_present, other=0).to(ACC)
        begins = False
        if starts is not None:
            begins = tl.load(starts + token) != 0
            memory = tl.where(begins, 0, memory)
        if bonus is not None:
            weight = tl.load(bonus + head * KEY + k_column, mask=k_present, other=0).to(ACC)
            result = tl.sum(memory * q_token[:, None], 0) + tl.sum(q_token * weight * k_token, 0) * v_token
        # What the decay of a first token acts on is gone; any number is allowed there.
        if DECAY == "channel":
            decay = tl.load(g + (token * HEADS + head) * KEY + k_column, mask=k_present & ~begins, other=0).to(ACC)
            memory *= tl.exp(decay)[:, None]
        elif DECAY == "scalar":
            memory *= tl.exp(tl.load(g + token * HEADS + head, mask=~begins, other=0).to(ACC))
        memory += k_token[:, None] * v_token[None, :]
        if bonus is None:
            result = tl.sum(memory * q_token[:, None], 0)
        tl.store(out + (token * HEADS + head) * VALUE + v_column, result, mask=v_present)
    tl.store(final + place, memory, mask=present)


def forward(q, k, v, log_decay, bonus, state, starts):
    """o, and S after the last token."""
    q, k, v = (heads_within_reach(x) for x in (q, k, v))
    log_decay, bonus, state, starts = (None if x is None else x.contiguous() for x in (log_decay, bonus, state, starts))
    out = torch.empty(v.shape, dtype=v.dtype, device=v.device)
    if v.shape[1] <= STEPS:
        return out, _run_steps(q, k, v, log_decay, bonus, state, starts, out)
    settings = _settings(q, v, log_decay, bonus)
    entering, last = _run_walk(k, v, log_decay, starts, state, settings, reverse=False)
    _run_read(q, k, v, log_decay, bonus, starts, entering, out, settings, backward=False)
    return out, last


def backward(dout, dlast, q, k, v, log_decay, bonus, state, starts):
    """Gradients of q, k, v, log_decay, bonus and state; any tensor for what is None."""
    dout, q, k, v = (heads_within_reach(x) for x in (dout, q, k, v))
    dlast, log_decay, bonus, state, starts = (
        None if x is None else x.contiguous() for x in (dlast, log_decay, bonus, state, starts)
    )
    settings = _settings(q, v, log_decay, bonus)
    entering, _ = _run_walk(k, v, log_decay, starts, state, settings, reverse=False)
    dleaving, dstate = _run_walk(q, dout, log_decay, starts, dlast, settings, reverse=True)
    dv = torch.empty(v.shape, dtype=v.dtype, device=v.device)
    _run_read(q, k, dout, log_decay, bonus, starts, dleaving, dv, settings, backward=True)
    dq, dk, dg, dbonus = _run_gradient(q, k, v, dout, log_decay, bonus, starts, entering, dleaving, settings)
    return dq, dk, dv, dg, dbonus, dstate


def _run_steps(q, k, v, log_decay, bonus, state, starts, out):
    (batch, time, heads, value), key = v.shape, q.shape[3]
    wide = torch.promote_types(v.dtype, torch.float32)
    last = torch.empty(batch, heads, key, value, dtype=wide, device=v.device)
    k_block = triton.next_power_of_2(key)
    v_block = min(triton.next_power_of_2(value), max(2048 // k_block, 16))
    _step[batch * heads, triton.cdiv(value, v_block)](
        q, k, v, log_decay, bonus, starts, state, out, last, time, q.stride(), k.stride(), v.stride(),
        HEADS=heads, GROUPS=q.shape[2], KEY=key, VALUE=value, DECAY=_decay(log_decay),
        K_BLOCK=k_block, V_BLOCK=v_block, ACC=TYPES[wide], num_warps=4,
    )  # fmt: skip
    return last


def _run_walk(x, y, log_decay, starts, initial, settings, reverse):
    """The S (or dS) that enters (or leaves) each chunk ``[batch * head, chunk, key, value]``, and the last."""
    (batch, time, heads, value), key = y.shape, x.shape[3]
    wide = torch.promote_types(y.dtype, torch.float32)
    # What tensor cores read in bfloat16 is not kept in more.
    narrow = torch.bfloat16 if settings["DOT"] == tl.bfloat16 else wide
    config = _config("walk", settings)
    lanes, chunks = batch * heads, triton.cdiv(time, settings["CHUNK"])
    blocks = triton.cdiv(key, config["K_BLOCK"]), triton.cdiv(value, config["V_BLOCK"])
    pieces = _pieces(lanes * blocks[0] * blocks[1], chunks)

    def empty(*shape, dtype=wide):
        return torch.empty(shape, dtype=dtype, device=y.device)

    def walk(initial, entering, final, kept):
        _walk[lanes * pieces, *blocks](
            x, y, log_decay, starts, initial, entering, final, kept, time, pieces, x.stride(), y.stride(),
            REVERSE=reverse, **settings, **config,
        )  # fmt: skip

    if pieces > 1:
        states, kept = empty(lanes, pieces, key, value), empty(lanes, pieces, key)
        walk(None, None, states, kept)
        _join[lanes, triton.cdiv(key * value, JOIN_BLOCK)](
            states, kept, initial, pieces,
            KEY=key, VALUE=value, REVERSE=reverse, BLOCK=JOIN_BLOCK, ACC=settings["ACC"], num_warps=4,
        )  # fmt: skip
        initial = states
    entering, last = empty(lanes, chunks, key, value, dtype=narrow), empty(batch, heads, key, value)
    walk(initial, entering, last, None)
    return entering, last


def _run_read(q, k, y, log_decay, bonus, starts, memories, out, settings, backward):
    batch, time, heads, value = y.shape
    config = _config("read", settings)
    chunks = triton.cdiv(time, settings["CHUNK"])
    _read[batch * heads * chunks, triton.cdiv(value, config["V_BLOCK"])](
        q, k, y, log_decay, bonus, starts, memories, out, time, q.stride(), k.stride(), y.stride(),
        BACKWARD=backward, **settings, **_levels(settings), **config,
    )  # fmt: skip


def _run_gradient(q, k, v, dout, log_decay, bonus, starts, memories, dmemories, settings):
    (batch, time, heads, _), (groups, key) = v.shape, q.shape[2:]
    wide = torch.promote_types(v.dtype, torch.float32)
    config = _config("gradient", settings)
    chunks, k_blocks = triton.cdiv(time, settings["CHUNK"]), triton.cdiv(key, config["K_BLOCK"])
    share = _heads_at_once(heads // groups, batch * groups * chunks * k_blocks)
    bundles = heads // share

    def empty(*shape, dtype=wide):
        return torch.empty(shape, dtype=dtype, device=v.device)

    dtypes = (q.dtype, k.dtype) if bundles == groups else (wide, wide)
    dq, dk = (empty(batch, time, bundles, key, dtype=dtype) for dtype in dtypes)
    dg = empty(0)
    if log_decay is not None:
        dg = empty(*log_decay.shape) if log_decay.ndim == 4 else empty(k_blocks, *log_decay.shape)
    dbonus = empty(0) if bonus is None else empty(batch, chunks, heads, key)
    _gradient[batch * bundles * chunks, k_blocks](
        q, k, v, dout, log_decay, bonus, starts, memories, dmemories, dq, dk, dg, dbonus,
        time, q.stride(), k.stride(), v.stride(), dout.stride(),
        SHARE=share, **settings, **_levels(settings), **config,
    )  # fmt: skip
    if bundles > groups:
        dq, dk = (dz.unflatten(2, (groups, -1)).sum(3) for dz in (dq, dk))
    if log_decay is not None and log_decay.ndim == 3:
        dg = dg.sum(0)
    return dq, dk, dg, dbonus if bonus is None else dbonus.sum((0, 1))


# Of each kernel, for a decay per channel or not: the largest blocks of keys and values, warps and stages.
CONFIGS = {
    ("walk", False): (64, 32, 4, 2),
    ("walk", True): (64, 32, 4, 3),
    ("read", False): (32, 64, 4, 2),
    ("read", True): (32, 64, 4, 2),
    ("gradient", False): (32, 32, 8, 2),
    ("gradient", True): (64, 64, 8, 1),
}
# Where large tiles fit: for the gradient, every block of keys computes all scores again.
LARGE = {("walk", False): (64, 32, 4, 3), ("read", False): (64, 64, 4, 2), ("gradient", False): (64, 32, 8, 1)}
TYPES = {torch.bfloat16: tl.bfloat16, torch.float32: tl.float32, torch.float64: tl.float64}


def _settings(q, v, log_decay, bonus):
    """What all kernels of chunks are compiled for."""
    dtype = torch.promote_types(q.dtype, v.dtype)
    # float16 has float32's range on tensor cores as tfloat32, which holds all of its digits.
    operand = torch.float32 if dtype == torch.float16 else dtype
    exact = "ieee" if torch.version.hip or operand != torch.float32 else "tf32x3"
    return {
        "HEADS": v.shape[2], "GROUPS": q.shape[2], "KEY": q.shape[3], "VALUE": v.shape[3],
        "DECAY": _decay(log_decay), "EXCLUSIVE": int(bonus is not None),
        "CHUNK": _chunk(_decay(log_decay), operand),
        "ACC": TYPES[torch.promote_types(dtype, torch.float32)], "DOT": TYPES[operand],
        "PRECISION": "tf32" if dtype == torch.float16 and exact == "tf32x3" else exact,
    }  # fmt: skip


def _chunk(decay, operand):
    """Tokens in a chunk: fewer where their tiles would not fit in registers."""
    return 64 if operand == torch.bfloat16 and decay != "channel" else 32


def _levels(settings):
    exact = "tf32x3" if settings["PRECISION"] == "tf32" else settings["PRECISION"]
    return {"LEVELS": settings["CHUNK"].bit_length() - 1, "EXACT": exact}


def _decay(log_decay):
    return "none" if log_decay is None else "scalar" if log_decay.ndim == 3 else "channel"


def _config(kernel, settings):
    """Blocks of keys and values, at most as in ``CONFIGS`` and no smaller than tensor cores take."""
    which = kernel, settings["DECAY"] == "channel"
    configs = CONFIGS | LARGE if fits_large_tiles() else CONFIGS
    k_block, v_block, num_warps, num_stages = configs[which]
    if which == ("gradient", True) and torch.version.hip and settings["HEADS"] > settings["GROUPS"]:
        # Its loop over heads keeps what they share in registers, which AMD's compiler spills from wider tiles.
        k_block = 32
    return {
        "K_BLOCK": max(min(triton.next_power_of_2(settings["KEY"]), k_block), 16),
        "V_BLOCK": max(min(triton.next_power_of_2(settings["VALUE"]), v_block), 16),
    } | launch_options(num_warps, num_stages)


def _pieces(programs, chunks):
    """Pieces of the chunks that are walked at once, at the price of a first look; one where ``programs`` fill a GPU."""
    return max(min(PROGRAMS // max(programs, 1), chunks // CHUNKS_A_PIECE), 1)


def _heads_at_once(heads, programs):
    """Heads of a group, of ``heads``, that a program sums over; fewer where ``programs`` leave most of a GPU idle."""
    bundles = next((n for n in (1, 2, 4) if heads % n == 0 and n * programs >= PROGRAMS), 1)
    return heads // bundles
