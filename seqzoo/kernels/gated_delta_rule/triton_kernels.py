"""The gated delta rule on a GPU: triangular matrices chunk by chunk in parallel, one short walk over the chunks.

With G the running sum of g inside a chunk, S the state that enters it, and products without a sign elementwise:

    B_ij = (k_i . k_j) e^{G_i - G_j} for j < i,    A_ij = (q_i . k_j) e^{G_i - G_j} for j <= i,
    H = B (I + beta B)^{-1},    z = v - e^G (K S),    r = z - H (beta z),    n = beta r,
    O = e^G (Q S) + A n,    S' = e^{G_C} S + K^T (e^{G_C - G} n)

r is what a token finds missing at its key, n what it writes. B, A and H (``_score``, ``_invert``) know nothing of S;
the walk (``_walk``) then carries S in registers through four products a chunk. Backward, with dO and dS' given:

    dn = A^T dO + e^{G_C - G} (K dS'),    x = dn - H^T (beta dn),    dv = beta x,    dbeta = x . r
    dS = e^{G_C} dS' + Q^T (e^G dO) - K^T (e^G dv),    dA = dO n^T,    dB = -dv n^T

``_walk_back`` carries dS; ``_differentiate`` takes all that is left from dA, dB, S and dS', chunk by chunk in parallel.
beta stays outside of H so that nothing is divided by it.

Sums of decays never cancel (``triton_tiles``). With one decay a head, the running sum is float64, kept as two numbers
of float32: a difference of two is as exact as a sum of float32, (1 + 2^-22) of the true one, at most 2^-23 of the decay
itself. With a decay a channel, pairs of tokens are sorted by the largest aligned block that parts them: a product of
e^{sum from its middle} and e^{sum up to the middle}. No exponent is above 0.

Long sequences run in segments: what is stored of a chunk takes no more memory than one segment has.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from seqzoo.kernels.gated_delta_rule.triton_op import CHUNK, FEW, segment
from seqzoo.kernels.triton_support import fits_large_tiles, launch_options, segments
from seqzoo.kernels.triton_tiles import (
    CUT,
    Rows,
    channel_decays,
    load,
    load_across,
    load_marks,
    load_square,
    mark,
    power,
    row_at,
    rows,
    store,
    store_across,
    store_square,
    sums,
)


@triton.jit
def _bounded(log_decay, starts, batch, token, head, time, CHUNK: tl.constexpr, SUM: tl.constexpr):
    """Log decays of a chunk's tokens; CUT where they leave nothing of what was before."""
    g = tl.zeros((CHUNK,), SUM)
    if log_decay is not None:
        g += tl.load(row_at(log_decay, batch, token, head), mask=token < time, other=0).to(SUM)
        g = tl.where(g < CUT, CUT, g)
    if starts is not None:
        begins = tl.load(row_at(starts, batch, token, 0), mask=token < time, other=0) != 0
        g = tl.where(begins, CUT, g)
    return g


@triton.jit
def _running(g, SUM: tl.constexpr):
    """The running sum as two numbers."""
    total = tl.cumsum(g.to(tl.float64), 0)
    high = total.to(SUM)
    return high, (total - high).to(SUM)


@triton.jit
def _between(high, low, CHUNK: tl.constexpr):
    """Decays from the column's token to the row's, 0 where that is earlier."""
    i, j = tl.arange(0, CHUNK)[:, None], tl.arange(0, CHUNK)[None, :]
    difference = (high[:, None] - high[None, :]) + (low[:, None] - low[None, :])
    return tl.exp(tl.where(i >= j, difference, float("-inf")))


@triton.jit
def _last(x, CHUNK: tl.constexpr):
    return tl.sum(tl.where(tl.arange(0, CHUNK) == CHUNK - 1, x, 0), 0)


@triton.jit
def _score(
    q, k, log_decay, beta, starts, scores, reads, gates, time, heads, chunks, shared,
    KEY: tl.constexpr, CHUNK: tl.constexpr, KEY_BLOCK: tl.constexpr, SUM: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """B, A, and for each token e^G, e^{G_C - G} and beta, of one chunk and head."""
    program = tl.program_id(0).to(tl.int64)
    batch, head, first = program // chunks // heads, program // chunks % heads, program % chunks * CHUNK
    token = first + tl.arange(0, CHUNK)
    high, low = _running(_bounded(log_decay, starts, batch, token, head, time, CHUNK, SUM), SUM)

    gates += program * 3 * CHUNK + tl.arange(0, CHUNK)
    to_end = (_last(high, CHUNK) - high) + (_last(low, CHUNK) - low)
    tl.store(gates, tl.exp(high))
    tl.store(gates + CHUNK, tl.exp(to_end))
    tl.store(gates + 2 * CHUNK, tl.load(row_at(beta, batch, token, head), mask=token < time, other=0).to(SUM))

    q_row, k_row = row_at(q, batch, first, head // shared), row_at(k, batch, first, head // shared)
    keys, queries = tl.zeros((CHUNK, CHUNK), SUM), tl.zeros((CHUNK, CHUNK), SUM)
    for column in range(0, KEY, KEY_BLOCK):
        key = load(k_row, k.time, time - first, KEY, column, CHUNK, KEY_BLOCK)
        query = load(q_row, q.time, time - first, KEY, column, CHUNK, KEY_BLOCK)
        keys = tl.dot(key, tl.trans(key), keys, input_precision=PRECISION)
        queries = tl.dot(query, tl.trans(key), queries, input_precision=PRECISION)
    between = _between(high, low, CHUNK)
    later = tl.arange(0, CHUNK)[:, None] > tl.arange(0, CHUNK)[None, :]
    store_square(scores + program * CHUNK * CHUNK, tl.where(later, keys * between, 0))
    store_square(reads + program * CHUNK * CHUNK, queries * between)


@triton.jit
def _decay_channels(
    q, k, log_decay, starts, keeps, q_start, k_start, k_end, time, heads, chunks, shared,
    KEY: tl.constexpr, CHUNK: tl.constexpr, KEY_BLOCK: tl.constexpr,
    NARROW: tl.constexpr, SUM: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """With a decay a channel: e^{G_C}, and queries and keys decayed since the start and to the end of a chunk."""
    program = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * KEY_BLOCK
    batch, head, first = program // chunks // heads, program // chunks % heads, program % chunks * CHUNK
    left = time - first
    at, at_key = tl.arange(0, CHUNK), column + tl.arange(0, KEY_BLOCK)
    i, j = at[:, None], at[None, :]
    key = load(row_at(k, batch, first, head // shared), k.time, left, KEY, column, CHUNK, KEY_BLOCK).to(SUM)
    query = load(row_at(q, batch, first, head // shared), q.time, left, KEY, column, CHUNK, KEY_BLOCK).to(SUM)
    g = channel_decays(log_decay, starts, batch, first, left, head, column, KEY, CHUNK, KEY_BLOCK, SUM)
    since_start = tl.exp(sums(i >= j, g, NARROW, SUM, PRECISION))
    store(row_at(q_start, batch, first, head), q_start.time, CHUNK, KEY, column, query * since_start)
    store(row_at(k_start, batch, first, head), k_start.time, CHUNK, KEY, column, key * since_start)
    until_end = tl.exp(sums(i < j, g, NARROW, SUM, PRECISION))
    store(row_at(k_end, batch, first, head), k_end.time, CHUNK, KEY, column, key * until_end)
    tl.store(keeps + program * KEY + at_key, tl.exp(tl.sum(g, 0)), mask=at_key < KEY)


@triton.jit
def _score_channels(
    q, k, log_decay, beta, starts, marks, scores, reads, gates, time, heads, chunks, shared,
    KEY: tl.constexpr, CHUNK: tl.constexpr, KEY_BLOCK: tl.constexpr, LEVELS: tl.constexpr, NARROW: tl.constexpr,
    SUM: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """``_score`` for a decay a channel."""
    program = tl.program_id(0).to(tl.int64)
    batch, head, first = program // chunks // heads, program // chunks % heads, program % chunks * CHUNK
    left = time - first
    at = tl.arange(0, CHUNK)
    gate = tl.load(row_at(beta, batch, first + at, head), mask=at < left, other=0).to(SUM)
    tl.store(gates + program * 3 * CHUNK + 2 * CHUNK + at, gate)
    q_row, k_row = row_at(q, batch, first, head // shared), row_at(k, batch, first, head // shared)
    i, j = at[:, None], at[None, :]
    all_scores, all_reads = tl.zeros((CHUNK, CHUNK), SUM), tl.zeros((CHUNK, CHUNK), SUM)
    own = tl.zeros((CHUNK,), SUM)
    for column in range(0, KEY, KEY_BLOCK):
        key = load(k_row, k.time, left, KEY, column, CHUNK, KEY_BLOCK)
        query = load(q_row, q.time, left, KEY, column, CHUNK, KEY_BLOCK)
        g = channel_decays(log_decay, starts, batch, first, left, head, column, KEY, CHUNK, KEY_BLOCK, SUM)
        own += tl.sum(query.to(SUM) * key.to(SUM), 1)
        for level in range(LEVELS):
            to_middle, across = load_marks(marks, level, CHUNK)
            decay = tl.exp(sums(to_middle, g, NARROW, SUM, PRECISION))
            near_key = (key.to(SUM) * decay).to(key.dtype)
            near_query = (query.to(SUM) * decay).to(key.dtype)
            keys = tl.dot(near_key, tl.trans(near_key), input_precision=PRECISION, out_dtype=SUM)
            all_scores += tl.where(across != 0, keys, 0)
            queries = tl.dot(near_query, tl.trans(near_key), input_precision=PRECISION, out_dtype=SUM)
            all_reads += tl.where(across != 0, queries, 0)
    store_square(scores + program * CHUNK * CHUNK, tl.where(i > j, all_scores, 0))
    all_reads = tl.where(i == j, own[:, None], all_reads)
    store_square(reads + program * CHUNK * CHUNK, tl.where(i >= j, all_reads, 0))


@triton.jit
def _corners(h, scores, beta, COUNT: tl.constexpr, SIZE: tl.constexpr, CHUNK: tl.constexpr, PRECISION: tl.constexpr):
    """From H of 2 COUNT diagonal blocks, H of COUNT blocks twice as large: upper left, lower left, lower right."""
    upper, lower = tl.split(tl.permute(tl.reshape(h, (COUNT, 2, SIZE, SIZE)), (0, 2, 3, 1)))
    block = tl.arange(0, COUNT)[:, None, None] * 2 * SIZE
    i, j = tl.arange(0, SIZE)[None, :, None], tl.arange(0, SIZE)[None, None, :]
    corner = tl.load(scores + (block + SIZE + i) * CHUNK + block + j)
    lower_beta, upper_beta = tl.load(beta + block + SIZE + j), tl.load(beta + block + i)
    corner -= _product(lower * lower_beta, corner, COUNT, SIZE, PRECISION)
    corner -= _product(corner, upper_beta * upper, COUNT, SIZE, PRECISION)
    return upper, corner, lower


@triton.jit
def _product(a, b, COUNT: tl.constexpr, SIZE: tl.constexpr, PRECISION: tl.constexpr):
    if COUNT == 1:
        a, b = tl.reshape(a, (SIZE, SIZE)), tl.reshape(b, (SIZE, SIZE))
        return tl.dot(a, b, input_precision=PRECISION, out_dtype=a.dtype)[None, :, :]
    else:
        return tl.dot(a, b, input_precision=PRECISION, out_dtype=a.dtype)


@triton.jit
def _side_by_side(left, right, COUNT: tl.constexpr, SIZE: tl.constexpr):
    return tl.reshape(tl.permute(tl.join(left, right), (0, 1, 3, 2)), (COUNT, SIZE, 2 * SIZE))


@triton.jit
def _invert(scores, gates, inverse, CHUNK: tl.constexpr, PRECISION: tl.constexpr):
    """H of one chunk and head, by doubling diagonal blocks: H_21 = (I - H_22 beta) B_21 (I - beta H_11)."""
    program = tl.program_id(0).to(tl.int64)
    scores += program * CHUNK * CHUNK
    inverse += program * CHUNK * CHUNK
    beta = gates + program * 3 * CHUNK + 2 * CHUNK

    count: tl.constexpr = CHUNK // 16
    block = tl.arange(0, count)[:, None, None] * 16
    i, j = tl.arange(0, 16)[None, :, None], tl.arange(0, 16)[None, None, :]
    b = tl.load(scores + (block + i) * CHUNK + block + j)
    row_beta, column_beta = tl.load(beta + block + i), tl.load(beta + block + j)
    h = tl.where(i // 2 == j // 2, b, 0)
    for level in tl.static_range(1, 4):
        corner = tl.where((i >> level + 1 == j >> level + 1) & (i >> level != j >> level), b, 0)
        corner -= _product(h * column_beta, corner, count, 16, PRECISION)
        h += corner - _product(corner, row_beta * h, count, 16, PRECISION)

    if CHUNK == 16:
        tl.store(inverse + i * CHUNK + j, h.to(inverse.dtype.element_ty))
    else:
        if CHUNK == 64:
            upper, corner, lower = _corners(h, scores, beta, 2, 16, CHUNK, PRECISION)
            top = _side_by_side(upper, tl.zeros_like(upper), 2, 16)
            bottom = _side_by_side(corner, lower, 2, 16)
            h = tl.reshape(tl.permute(tl.join(top, bottom), (0, 3, 1, 2)), (2, 32, 32))
        size: tl.constexpr = CHUNK // 2
        upper, corner, lower = _corners(h, scores, beta, 1, size, CHUNK, PRECISION)
        i, j = tl.arange(0, size)[None, :, None], tl.arange(0, size)[None, None, :]
        inverse += i * CHUNK + j
        tl.store(inverse, upper.to(inverse.dtype.element_ty))
        tl.store(inverse + size, tl.zeros_like(upper).to(inverse.dtype.element_ty))
        tl.store(inverse + size * CHUNK, corner.to(inverse.dtype.element_ty))
        tl.store(inverse + size * CHUNK + size, lower.to(inverse.dtype.element_ty))


@triton.jit
def _walk(
    q, k, k_end, v, inverse, reads, gates, keeps, state, o, residual, entering, last, time, heads, chunks, shared,
    KEY: tl.constexpr, VALUE: tl.constexpr, CHUNK: tl.constexpr, KEY_BLOCK: tl.constexpr, VALUE_BLOCK: tl.constexpr,
    SUM: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The state from chunk to chunk, for one head and block of values; outputs, or what the backward needs.

    Everything is transposed, values by tokens or by keys: so what one product gives is, in registers, the left side of
    the next. With a decay a channel, decays are in ``q``, ``k`` and ``k_end`` (K e^{G_C - G}); ``keeps`` is e^{G_C}.
    """
    blocks: tl.constexpr = (VALUE + VALUE_BLOCK - 1) // VALUE_BLOCK
    program = tl.program_id(0).to(tl.int64)
    row, column = program // blocks, program % blocks * VALUE_BLOCK
    batch, head = row // heads, row % heads
    at_key, token = tl.arange(0, KEY_BLOCK), tl.arange(0, CHUNK)

    memory = tl.zeros((VALUE_BLOCK, KEY_BLOCK), SUM)
    if state is not None:
        memory += load_across(state + row * KEY * VALUE, VALUE, KEY, VALUE, column, KEY_BLOCK, VALUE_BLOCK)
    for chunk in range(chunks):
        first = chunk * CHUNK
        cell = row * chunks + chunk
        left = time - first
        key = load(row_at(k, batch, first, head // shared), k.time, left, KEY, 0, CHUNK, KEY_BLOCK)
        value = load_across(row_at(v, batch, first, head), v.time, left, VALUE, column, CHUNK, VALUE_BLOCK)
        beta = tl.load(gates + (cell * 3 + 2) * CHUNK + token)[None, :]
        solve = load_square(inverse + cell * CHUNK * CHUNK, CHUNK)
        narrow = memory.to(key.dtype)
        missing = tl.dot(narrow, tl.trans(key), input_precision=PRECISION, out_dtype=SUM)
        if keeps is None:
            from_start = tl.load(gates + cell * 3 * CHUNK + token)[None, :]
            missing *= from_start
        missing = value.to(SUM) - missing
        missing = tl.dot((-beta * missing).to(key.dtype), tl.trans(solve), missing, input_precision=PRECISION)
        new = beta * missing
        if residual is not None:
            store_across(residual + cell * CHUNK * VALUE, VALUE, CHUNK, VALUE, column, missing)
            store(entering + cell * KEY * VALUE + column * KEY, KEY, VALUE - column, KEY, 0, narrow)
        if o is not None:
            query = load(row_at(q, batch, first, head // shared), q.time, left, KEY, 0, CHUNK, KEY_BLOCK)
            read = load_square(reads + cell * CHUNK * CHUNK, CHUNK)
            output = tl.dot(narrow, tl.trans(query), input_precision=PRECISION, out_dtype=SUM)
            if keeps is None:
                output *= from_start
            output = tl.dot(new.to(key.dtype), tl.trans(read), output, input_precision=PRECISION)
            store_across(row_at(o, batch, first, head), o.time, left, VALUE, column, output)
        if keeps is None:
            memory *= tl.load(gates + cell * 3 * CHUNK + CHUNK - 1)
            new *= tl.load(gates + (cell * 3 + 1) * CHUNK + token)[None, :]
            writer = key
        else:
            memory *= tl.load(keeps + cell * KEY + at_key, mask=at_key < KEY, other=0)[None, :]
            writer = load(row_at(k_end, batch, first, head), k_end.time, left, KEY, 0, CHUNK, KEY_BLOCK)
        memory = tl.dot(new.to(key.dtype), writer, memory, input_precision=PRECISION)
    if last is not None:
        store_across(last + row * KEY * VALUE, VALUE, KEY, VALUE, column, memory)


@triton.jit
def _walk_back(
    q, k, k_end, do, residual, inverse, reads, gates, keeps, dlast, dv, dbeta, leaving, dstate,
    time, heads, chunks, shared,
    KEY: tl.constexpr, VALUE: tl.constexpr, CHUNK: tl.constexpr, KEY_BLOCK: tl.constexpr, VALUE_BLOCK: tl.constexpr,
    SUM: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The gradient of the state from the last chunk to the first; dv, and this block of values' part of dbeta."""
    blocks: tl.constexpr = (VALUE + VALUE_BLOCK - 1) // VALUE_BLOCK
    program = tl.program_id(0).to(tl.int64)
    row, column = program // blocks, program % blocks * VALUE_BLOCK
    batch, head = row // heads, row % heads
    at_key, token = tl.arange(0, KEY_BLOCK), tl.arange(0, CHUNK)
    dbeta += program * chunks * CHUNK + token

    dmemory = tl.zeros((VALUE_BLOCK, KEY_BLOCK), SUM)
    if dlast is not None:
        dmemory += load_across(dlast + row * KEY * VALUE, VALUE, KEY, VALUE, column, KEY_BLOCK, VALUE_BLOCK)
    for back in range(chunks):
        chunk = chunks - 1 - back
        first = chunk * CHUNK
        cell = row * chunks + chunk
        left = time - first
        key = load(row_at(k, batch, first, head // shared), k.time, left, KEY, 0, CHUNK, KEY_BLOCK)
        query = load(row_at(q, batch, first, head // shared), q.time, left, KEY, 0, CHUNK, KEY_BLOCK)
        doutput = load_across(row_at(do, batch, first, head), do.time, left, VALUE, column, CHUNK, VALUE_BLOCK)
        missing = load_across(residual + cell * CHUNK * VALUE, VALUE, CHUNK, VALUE, column, CHUNK, VALUE_BLOCK)
        read = load_square(reads + cell * CHUNK * CHUNK, CHUNK)
        solve = load_square(inverse + cell * CHUNK * CHUNK, CHUNK)
        beta = tl.load(gates + (cell * 3 + 2) * CHUNK + token)[None, :]
        narrow = dmemory.to(key.dtype)
        store(leaving + cell * KEY * VALUE + column * KEY, KEY, VALUE - column, KEY, 0, narrow)
        if keeps is None:
            dnew = tl.dot(narrow, tl.trans(key), input_precision=PRECISION, out_dtype=SUM)
            dnew *= tl.load(gates + (cell * 3 + 1) * CHUNK + token)[None, :]
            dmemory *= tl.load(gates + cell * 3 * CHUNK + CHUNK - 1)
        else:
            writer = load(row_at(k_end, batch, first, head), k_end.time, left, KEY, 0, CHUNK, KEY_BLOCK)
            dnew = tl.dot(narrow, tl.trans(writer), input_precision=PRECISION, out_dtype=SUM)
            dmemory *= tl.load(keeps + cell * KEY + at_key, mask=at_key < KEY, other=0)[None, :]
        dnew = tl.dot(doutput, read, dnew, input_precision=PRECISION)
        dnew = tl.dot((-beta * dnew).to(key.dtype), solve, dnew, input_precision=PRECISION)
        tl.store(dbeta + first, tl.sum(dnew * missing.to(SUM), 0))
        dvalue = beta * dnew
        store_across(row_at(dv, batch, first, head), dv.time, left, VALUE, column, dvalue)
        if keeps is None:
            from_start = tl.load(gates + cell * 3 * CHUNK + token)[None, :]
            dvalue *= from_start
            doutput = (doutput.to(SUM) * from_start).to(key.dtype)
        dmemory = tl.dot(doutput, query, dmemory, input_precision=PRECISION)
        dmemory = tl.dot((-dvalue).to(key.dtype), key, dmemory, input_precision=PRECISION)
    store_across(dstate + row * KEY * VALUE, VALUE, KEY, VALUE, column, dmemory)


@triton.jit
def _between_tokens(
    do, dv, residual, beta, batch, head, first, left,
    VALUE: tl.constexpr, CHUNK: tl.constexpr, VALUE_BLOCK: tl.constexpr, SUM: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dA and dB."""
    dreads, dscores = tl.zeros((CHUNK, CHUNK), SUM), tl.zeros((CHUNK, CHUNK), SUM)
    for column in range(0, VALUE, VALUE_BLOCK):
        doutput = load(row_at(do, batch, first, head), do.time, left, VALUE, column, CHUNK, VALUE_BLOCK)
        dvalue = load(row_at(dv, batch, first, head), dv.time, left, VALUE, column, CHUNK, VALUE_BLOCK)
        missing = load(residual, VALUE, CHUNK, VALUE, column, CHUNK, VALUE_BLOCK)
        dreads = tl.dot(doutput, tl.trans(missing), dreads, input_precision=PRECISION)
        dscores = tl.dot(dvalue, tl.trans(missing), dscores, input_precision=PRECISION)
    return dreads * beta[None, :], -dscores * beta[None, :]


@triton.jit
def _through_states(
    do, dv, residual, entering, leaving, batch, head, first, left, key_column,
    KEY: tl.constexpr, VALUE: tl.constexpr, CHUNK: tl.constexpr, KEY_BLOCK: tl.constexpr, VALUE_BLOCK: tl.constexpr,
    SUM: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dO S^T, dv S^T, r dS'^T, and the products of S and dS' summed over values, for a block of the keys' channels."""
    dqueries, dkeys = tl.zeros((CHUNK, KEY_BLOCK), SUM), tl.zeros((CHUNK, KEY_BLOCK), SUM)
    dwriters, kept = tl.zeros((CHUNK, KEY_BLOCK), SUM), tl.zeros((KEY_BLOCK,), SUM)
    for column in range(0, VALUE, VALUE_BLOCK):
        at = column * KEY
        memory = load(entering + at, KEY, VALUE - column, KEY, key_column, VALUE_BLOCK, KEY_BLOCK)
        doutput = load(row_at(do, batch, first, head), do.time, left, VALUE, column, CHUNK, VALUE_BLOCK)
        dvalue = load(row_at(dv, batch, first, head), dv.time, left, VALUE, column, CHUNK, VALUE_BLOCK)
        dqueries = tl.dot(doutput, memory, dqueries, input_precision=PRECISION)
        dkeys = tl.dot(dvalue, memory, dkeys, input_precision=PRECISION)
        dmemory = load(leaving + at, KEY, VALUE - column, KEY, key_column, VALUE_BLOCK, KEY_BLOCK)
        missing = load(residual, VALUE, CHUNK, VALUE, column, CHUNK, VALUE_BLOCK)
        dwriters = tl.dot(missing, dmemory, dwriters, input_precision=PRECISION)
        kept += tl.sum(memory.to(SUM) * dmemory.to(SUM), 0)
    return dqueries, dkeys, dwriters, kept


@triton.jit
def _differentiate(
    q, k, log_decay, starts, do, dv, residual, scores, reads, gates, entering, leaving, dq, dk, dlog_decay,
    time, heads, chunks, shared,
    KEY: tl.constexpr, VALUE: tl.constexpr, CHUNK: tl.constexpr, KEY_BLOCK: tl.constexpr, VALUE_BLOCK: tl.constexpr,
    SUM: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Gradients of queries, keys and decays from one chunk of one head."""
    program = tl.program_id(0).to(tl.int64)
    batch, head, first = program // chunks // heads, program // chunks % heads, program % chunks * CHUNK
    left = time - first
    at = tl.arange(0, CHUNK)
    token = first + at
    gates += program * 3 * CHUNK
    from_start, to_end, beta = tl.load(gates + at), tl.load(gates + CHUNK + at), tl.load(gates + 2 * CHUNK + at)
    residual += program * CHUNK * VALUE
    entering += program * KEY * VALUE
    leaving += program * KEY * VALUE

    dreads, dscores = _between_tokens(
        do, dv, residual, beta, batch, head, first, left, VALUE, CHUNK, VALUE_BLOCK, SUM, PRECISION
    )
    i, j = at[:, None], at[None, :]
    if dlog_decay is not None:
        # A pair's decays are those after the earlier token, up to the later one.
        pairs = dreads * load_square(reads + program * CHUNK * CHUNK, CHUNK).to(SUM)
        pairs += dscores * load_square(scores + program * CHUNK * CHUNK, CHUNK)
        pairs = tl.where(i > j, pairs, 0).to(q.data.dtype.element_ty)
        over_pairs = tl.dot(pairs, (i < j).to(pairs.dtype), input_precision=PRECISION, out_dtype=SUM)
    high, low = _running(_bounded(log_decay, starts, batch, token, head, time, CHUNK, SUM), SUM)
    between = _between(high, low, CHUNK)
    dqueries_keys = (dreads * between).to(q.data.dtype.element_ty)
    dkeys_keys = tl.where(i > j, dscores * between, 0)
    dkeys_keys = (dkeys_keys + tl.trans(dkeys_keys)).to(q.data.dtype.element_ty)

    since_start, until_end, over_chunk = tl.zeros((CHUNK,), SUM), tl.zeros((CHUNK,), SUM), tl.zeros((1,), SUM)
    for column in range(0, KEY, KEY_BLOCK):
        key = load(row_at(k, batch, first, head // shared), k.time, left, KEY, column, CHUNK, KEY_BLOCK)
        query = load(row_at(q, batch, first, head // shared), q.time, left, KEY, column, CHUNK, KEY_BLOCK)
        dquery, dkey, dwriter, kept = _through_states(
            do, dv, residual, entering, leaving, batch, head, first, left, column,
            KEY, VALUE, CHUNK, KEY_BLOCK, VALUE_BLOCK, SUM, PRECISION,
        )  # fmt: skip
        dquery *= from_start[:, None]
        dkey *= -from_start[:, None]
        dwriter *= (to_end * beta)[:, None]
        since_start += tl.sum(query.to(SUM) * dquery + key.to(SUM) * dkey, 1)
        until_end += tl.sum(key.to(SUM) * dwriter, 1)
        over_chunk += tl.sum(kept, 0)
        dquery = tl.dot(dqueries_keys, key, dquery, input_precision=PRECISION)
        dkey = tl.dot(tl.trans(dqueries_keys), query, dkey + dwriter, input_precision=PRECISION)
        dkey = tl.dot(dkeys_keys, key, dkey, input_precision=PRECISION)
        store(row_at(dq, batch, first, head), dq.time, left, KEY, column, dquery)
        store(row_at(dk, batch, first, head), dk.time, left, KEY, column, dkey)
    if dlog_decay is not None:
        total = tl.sum(tl.where(i >= j, over_pairs + since_start[:, None], until_end[:, None]), 0)
        total += over_chunk * tl.load(gates + CHUNK - 1)
        tl.store(row_at(dlog_decay, batch, token, head), total, mask=token < time)


@triton.jit
def _differentiate_pairs(
    do, dv, residual, gates, dreads, dscores, time, heads, chunks,
    VALUE: tl.constexpr, CHUNK: tl.constexpr, VALUE_BLOCK: tl.constexpr, SUM: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dA, and dB with its transpose, of one chunk and head."""
    program = tl.program_id(0).to(tl.int64)
    batch, head, first = program // chunks // heads, program // chunks % heads, program % chunks * CHUNK
    at = tl.arange(0, CHUNK)
    beta = tl.load(gates + program * 3 * CHUNK + 2 * CHUNK + at)
    of_reads, of_scores = _between_tokens(
        do, dv, residual + program * CHUNK * VALUE, beta, batch, head, first, time - first,
        VALUE, CHUNK, VALUE_BLOCK, SUM, PRECISION,
    )  # fmt: skip
    of_reads = tl.where(at[:, None] >= at[None, :], of_reads, 0)
    of_scores = tl.where(at[:, None] > at[None, :], of_scores, 0)
    store_square(dreads + program * CHUNK * CHUNK, of_reads)
    store_square(dscores + program * CHUNK * CHUNK, of_scores + tl.trans(of_scores))


@triton.jit
def _differentiate_channels(
    q, k, log_decay, starts, do, dv, residual, dreads, dscores, marks, gates, keeps, entering, leaving,
    dq, dk, dlog_decay, time, heads, chunks, shared,
    KEY: tl.constexpr, VALUE: tl.constexpr, CHUNK: tl.constexpr, KEY_BLOCK: tl.constexpr, VALUE_BLOCK: tl.constexpr,
    LEVELS: tl.constexpr, NARROW: tl.constexpr, SUM: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """``_differentiate`` for a decay a channel, for a block of channels."""
    blocks: tl.constexpr = (KEY + KEY_BLOCK - 1) // KEY_BLOCK
    program = tl.program_id(0).to(tl.int64) // blocks
    column = tl.program_id(0) % blocks * KEY_BLOCK
    batch, head, first = program // chunks // heads, program // chunks % heads, program % chunks * CHUNK
    left = time - first
    at, at_key = tl.arange(0, CHUNK), column + tl.arange(0, KEY_BLOCK)
    i, j = at[:, None], at[None, :]
    dreads += program * CHUNK * CHUNK
    dscores += program * CHUNK * CHUNK

    dquery, dkey, dwriter, kept = _through_states(
        do, dv, residual + program * CHUNK * VALUE, entering + program * KEY * VALUE, leaving + program * KEY * VALUE,
        batch, head, first, left, column, KEY, VALUE, CHUNK, KEY_BLOCK, VALUE_BLOCK, SUM, PRECISION,
    )  # fmt: skip
    key = load(row_at(k, batch, first, head // shared), k.time, left, KEY, column, CHUNK, KEY_BLOCK)
    query = load(row_at(q, batch, first, head // shared), q.time, left, KEY, column, CHUNK, KEY_BLOCK)
    g = channel_decays(log_decay, starts, batch, first, left, head, column, KEY, CHUNK, KEY_BLOCK, SUM)
    since_start = tl.exp(sums(i >= j, g, NARROW, SUM, PRECISION))
    dquery *= since_start
    dkey *= -since_start
    # A decay acts on all that passes its token.
    dg = sums(i <= j, query.to(SUM) * dquery + key.to(SUM) * dkey, NARROW, SUM, PRECISION)
    beta = tl.load(gates + program * 3 * CHUNK + 2 * CHUNK + at)
    dwriter *= tl.exp(sums(i < j, g, NARROW, SUM, PRECISION)) * beta[:, None]
    dg += sums(i > j, key.to(SUM) * dwriter, NARROW, SUM, PRECISION)
    dg += (kept * tl.load(keeps + program * KEY + at_key, mask=at_key < KEY, other=0))[None, :]
    own = tl.load(dreads + at * CHUNK + at).to(SUM)[:, None]
    dquery += own * key.to(SUM)
    dkey += dwriter + own * query.to(SUM)
    of_reads, of_scores = load_square(dreads, CHUNK), load_square(dscores, CHUNK)
    for level in range(LEVELS):
        to_middle, across = load_marks(marks, level, CHUNK)
        decay = tl.exp(sums(to_middle, g, NARROW, SUM, PRECISION))
        near_key = (key.to(SUM) * decay).to(key.dtype)
        near_query = (query.to(SUM) * decay).to(key.dtype)
        near_reads, near_scores = across * of_reads, across * of_scores
        dnear_query = tl.dot(near_reads, near_key, input_precision=PRECISION, out_dtype=SUM) * decay
        dnear_key = tl.dot(near_scores, near_key, input_precision=PRECISION, out_dtype=SUM)
        dnear_key = tl.dot(tl.trans(near_reads), near_query, dnear_key, input_precision=PRECISION) * decay
        dquery += dnear_query
        dkey += dnear_key
        through = query.to(SUM) * dnear_query + key.to(SUM) * dnear_key
        dg += sums(tl.trans(to_middle), through, NARROW, SUM, PRECISION)
    store(row_at(dq, batch, first, head), dq.time, left, KEY, column, dquery)
    store(row_at(dk, batch, first, head), dk.time, left, KEY, column, dkey)
    store(row_at(dlog_decay, batch, first, head), dlog_decay.time, left, KEY, column, dg)


@triton.jit
def _step(
    q, k, v, log_decay, beta, starts, state, o, last, time, heads, shared,
    KEY: tl.constexpr, VALUE: tl.constexpr, KEY_BLOCK: tl.constexpr, VALUE_BLOCK: tl.constexpr,
    CHANNELS: tl.constexpr, SUM: tl.constexpr,
):  # fmt: skip
    """A few tokens one by one, for one head and block of values."""
    blocks: tl.constexpr = (VALUE + VALUE_BLOCK - 1) // VALUE_BLOCK
    program = tl.program_id(0).to(tl.int64)
    row, column = program // blocks, program % blocks * VALUE_BLOCK
    batch, head = row // heads, row % heads
    at_key, at_value = tl.arange(0, KEY_BLOCK), column + tl.arange(0, VALUE_BLOCK)
    memory = tl.zeros((KEY_BLOCK, VALUE_BLOCK), SUM)
    if state is not None:
        memory += load(state + row * KEY * VALUE, VALUE, KEY, VALUE, column, KEY_BLOCK, VALUE_BLOCK)
    for token in range(time):
        if starts is not None:
            memory = tl.where(tl.load(row_at(starts, batch, token, 0)) != 0, 0, memory)
        if CHANNELS:
            g = tl.load(row_at(log_decay, batch, token, head) + at_key, mask=at_key < KEY, other=0)
            memory *= tl.exp(g.to(SUM))[:, None]
        elif log_decay is not None:
            memory *= tl.exp(tl.load(row_at(log_decay, batch, token, head)).to(SUM))
        key = tl.load(row_at(k, batch, token, head // shared) + at_key, mask=at_key < KEY, other=0).to(SUM)
        query = tl.load(row_at(q, batch, token, head // shared) + at_key, mask=at_key < KEY, other=0).to(SUM)
        value = tl.load(row_at(v, batch, token, head) + at_value, mask=at_value < VALUE, other=0).to(SUM)
        gate = tl.load(row_at(beta, batch, token, head)).to(SUM)
        new = gate * (value - tl.sum(memory * key[:, None], 0))
        memory += key[:, None] * new[None, :]
        output = tl.sum(memory * query[:, None], 0)
        tl.store(row_at(o, batch, token, head) + at_value, output.to(o.data.dtype.element_ty), mask=at_value < VALUE)
    store(last + row * KEY * VALUE, VALUE, KEY, VALUE, column, memory)


class _Call(NamedTuple):
    """What is the same for all kernels of a call."""

    batch: int
    time: int
    heads: int
    shared: int
    key: int
    value: int
    chunk: int
    dtype: torch.dtype
    wide: torch.dtype
    channels: bool

    def constants(self, *names):
        """Compile-time arguments by name."""
        known = {
            "KEY": self.key,
            "VALUE": self.value,
            "CHUNK": self.chunk,
            "SUM": tl.float64 if self.wide == torch.float64 else tl.float32,
            "PRECISION": "ieee" if torch.version.hip else "tf32x3",
            "LEVELS": self.chunk.bit_length() - 1,
            "NARROW": self.dtype in (torch.bfloat16, torch.float16),
        }
        return {name: known[name] for name in names}


def _describe(q, v, log_decay):
    batch, time, heads, value = v.shape
    wide = torch.promote_types(v.dtype, torch.float32)
    # In float32 the errors of a long chunk would show.
    chunk = FEW if time <= FEW else CHUNK // 2 if v.dtype == torch.float32 else CHUNK
    channels = log_decay is not None and log_decay.ndim == 4
    return _Call(batch, time, heads, heads // q.shape[2], q.shape[3], value, chunk, v.dtype, wide, channels)


def _segments(call):
    return segments(call.time, segment(call.batch * call.heads), call.chunk)


class _Matrices(NamedTuple):
    """What the walks need of a segment."""

    q: Rows
    k: Rows
    k_end: Rows | None
    scores: Tensor
    reads: Tensor
    inverse: Tensor
    gates: Tensor
    keeps: Tensor | None
    marks: Tensor | None
    shared: int


def _prepare(call, chunks, q, k, log_decay, beta, starts):
    cells = call.batch * call.heads * chunks
    square = (cells, call.chunk, call.chunk)
    scores, reads, inverse = q.new_empty(square, dtype=call.wide), q.new_empty(square), q.new_empty(square)
    gates = q.new_empty(cells, 3, call.chunk, dtype=call.wide)
    inputs = [rows(x) for x in (q, k, log_decay, beta, starts)]
    sizes = (q.shape[1], call.heads, chunks, call.shared)
    if call.channels:
        keeps = q.new_empty(cells, call.key, dtype=call.wide)
        tile = (call.batch, chunks * call.chunk, call.heads, call.key)
        q_start, k_start, k_end = (rows(q.new_empty(tile)) for _ in range(3))
        config = _config("decay", call)
        _decay_channels[cells, triton.cdiv(call.key, config["KEY_BLOCK"])](
            *inputs[:3], inputs[4], keeps, q_start, k_start, k_end, *sizes,
            **call.constants("KEY", "CHUNK", "NARROW", "SUM", "PRECISION"), **config,
        )  # fmt: skip
        levels = call.chunk.bit_length() - 1
        marks = q.new_empty(levels, 2, call.chunk, call.chunk)
        mark[(levels,)](marks, CHUNK=call.chunk, **launch_options(4, 1))
        _score_channels[(cells,)](
            *inputs, marks, scores, reads, gates, *sizes,
            **call.constants("KEY", "CHUNK", "LEVELS", "NARROW", "SUM", "PRECISION"), **_config("score", call),
        )  # fmt: skip
        ready = _Matrices(q_start, k_start, k_end, scores, reads, inverse, gates, keeps, marks, 1)
    else:
        _score[(cells,)](
            *inputs, scores, reads, gates, *sizes,
            **call.constants("KEY", "CHUNK", "SUM", "PRECISION"), **_config("score", call),
        )  # fmt: skip
        ready = _Matrices(inputs[0], inputs[1], None, scores, reads, inverse, gates, None, None, call.shared)
    _invert[(cells,)](scores, gates, inverse, **call.constants("CHUNK", "PRECISION"), **_config("invert", call))
    return ready


def _run_walk(call, chunks, ready, v, state, o=None, residual=None, entering=None, last=None):
    config = _config("walk", call)
    programs = call.batch * call.heads * triton.cdiv(call.value, config["VALUE_BLOCK"])
    _walk[(programs,)](
        ready.q, ready.k, ready.k_end, rows(v), ready.inverse, ready.reads, ready.gates, ready.keeps, state, rows(o),
        residual, entering, last, v.shape[1], call.heads, chunks, ready.shared,
        **call.constants("KEY", "VALUE", "CHUNK", "SUM", "PRECISION"), **config,
    )  # fmt: skip


def forward(q, k, v, log_decay, beta, state, starts):
    """Outputs, the last state, and for the backward the states that enter every segment but the first."""
    call = _describe(q, v, log_decay)
    o = v.new_empty(v.shape)
    state = None if state is None else state.contiguous()
    shape = (call.batch, call.heads, call.key, call.value)
    last = v.new_empty(shape, dtype=call.wide)
    if call.time <= FEW:
        config = _config("step", call)
        programs = call.batch * call.heads * triton.cdiv(call.value, config["VALUE_BLOCK"])
        _step[(programs,)](
            *(rows(x) for x in (q, k, v, log_decay, beta, starts)), state, rows(o), last,
            call.time, call.heads, call.shared, CHANNELS=call.channels,
            **call.constants("KEY", "VALUE", "SUM"), **config,
        )  # fmt: skip
        return o, last, v.new_empty((0, *shape), dtype=call.wide)
    segments = _segments(call)
    states = v.new_empty((len(segments) - 1, *shape), dtype=call.wide)
    for index, (begin, end, chunks) in enumerate(segments):
        cut = [None if x is None else x[:, begin:end] for x in (q, k, log_decay, beta, starts)]
        ready = _prepare(call, chunks, *cut)
        leaves = last if index == len(segments) - 1 else states[index]
        _run_walk(call, chunks, ready, v[:, begin:end], state, o=o[:, begin:end], last=leaves)
        state = leaves
    return o, last, states


def backward(do, dlast, q, k, v, log_decay, beta, state, starts, states):
    """Gradients of all inputs but ``starts``; None for a decay that is None."""
    call = _describe(q, v, log_decay)
    gradients = [None if x is None else x.new_empty(x.shape) for x in (q, k, v, log_decay, beta)]
    entries = [None if state is None else state.contiguous(), *states.unbind()]
    dstate = dlast.contiguous()
    for (begin, end, chunks), enters in reversed(list(zip(_segments(call), entries, strict=True))):
        inputs = [None if x is None else x[:, begin:end] for x in (q, k, v, log_decay, beta, starts, do)]
        outputs = [None if x is None else x[:, begin:end] for x in gradients]
        dstate = _segment_backward(call, chunks, inputs, outputs, enters, dstate)
    return *gradients, dstate


def _segment_backward(call, chunks, inputs, outputs, state, dlast):
    """Write the gradients of a segment to ``outputs``; return that of the state that enters it."""
    q, k, v, log_decay, beta, starts, do = inputs
    dq, dk, dv, dlog_decay, dbeta = outputs
    batch, time, heads = v.shape[:3]
    cells = batch * heads * chunks
    ready = _prepare(call, chunks, q, k, log_decay, beta, starts)
    residual = v.new_empty(cells, call.chunk, call.value)
    entering, leaving = (v.new_empty(cells, call.value, call.key) for _ in range(2))
    _run_walk(call, chunks, ready, v, state, residual=residual, entering=entering)

    config = _config("walk back", call)
    parts = triton.cdiv(call.value, config["VALUE_BLOCK"])
    dstate = v.new_empty((batch, heads, call.key, call.value), dtype=call.wide)
    partial = v.new_empty((batch, heads, parts, chunks * call.chunk), dtype=call.wide)
    do = rows(do)
    _walk_back[(batch * heads * parts,)](
        ready.q, ready.k, ready.k_end, do, residual, ready.inverse, ready.reads, ready.gates, ready.keeps,
        dlast, rows(dv), partial, leaving, dstate, time, heads, chunks, ready.shared,
        **call.constants("KEY", "VALUE", "CHUNK", "SUM", "PRECISION"), **config,
    )  # fmt: skip
    dbeta.copy_(partial.sum(2)[..., :time].mT)

    # Heads that share a query and key add up their gradients.
    shape = (batch, time, heads, call.key)
    targets = [dq, dk] if call.shared == 1 else [q.new_empty(shape, dtype=call.wide) for _ in range(2)]
    tensors = [rows(x) for x in (q, k, log_decay, starts)]
    gradients = [rows(x) for x in (*targets, dlog_decay)]
    sizes = (time, heads, chunks, call.shared)
    config = _config("differentiate", call)
    if call.channels:
        dreads, dscores = torch.empty_like(ready.reads), torch.empty_like(ready.reads)
        _differentiate_pairs[(cells,)](
            do, rows(dv), residual, ready.gates, dreads, dscores, time, heads, chunks,
            **call.constants("VALUE", "CHUNK", "SUM", "PRECISION"), **_config("pairs", call),
        )  # fmt: skip
        _differentiate_channels[(cells * triton.cdiv(call.key, config["KEY_BLOCK"]),)](
            *tensors, do, rows(dv), residual, dreads, dscores, ready.marks, ready.gates, ready.keeps,
            entering, leaving, *gradients, *sizes,
            **call.constants("KEY", "VALUE", "CHUNK", "LEVELS", "NARROW", "SUM", "PRECISION"), **config,
        )  # fmt: skip
    else:
        _differentiate[(cells,)](
            *tensors, do, rows(dv), residual, ready.scores, ready.reads, ready.gates, entering, leaving,
            *gradients, *sizes, **call.constants("KEY", "VALUE", "CHUNK", "SUM", "PRECISION"), **config,
        )  # fmt: skip
    if call.shared > 1:
        dq.copy_(targets[0].unflatten(2, (-1, call.shared)).sum(3))
        dk.copy_(targets[1].unflatten(2, (-1, call.shared)).sum(3))
    return dstate


class _Config(NamedTuple):
    """The largest blocks of keys and of values, None where a kernel has none or takes all, and how it is compiled."""

    key_block: int | None
    value_block: int | None
    num_warps: int
    num_stages: int


# Found by compiling for real chips: no spills, and shared memory within the smallest limit.
_CONFIGS = {
    "step": _Config(None, 32, 4, 1),
    "decay": _Config(32, None, 4, 1),
    "score": _Config(64, None, 4, 2),
    "score channels": _Config(32, None, 4, 1),
    "invert": _Config(None, None, 4, 1),
    "walk": _Config(None, 32, 8, 2),
    "walk back": _Config(None, 32, 8, 2),
    "pairs": _Config(None, 64, 4, 2),
    "differentiate": _Config(32, 32, 8, 2),
    "differentiate channels": _Config(16, 32, 4, 1),
}
_LARGE = {"differentiate channels": _Config(32, 64, 4, 1)}
_TAKES_ALL_KEYS = ("step", "walk", "walk back")


def _config(kernel, call):
    """Blocks, warps and stages of a kernel."""
    name = f"{kernel} channels" if call.channels and f"{kernel} channels" in _CONFIGS else kernel
    config = (_CONFIGS | _LARGE if fits_large_tiles() else _CONFIGS)[name]
    settings = launch_options(config.num_warps, config.num_stages)
    key, value = power(call.key), power(call.value)
    value_block = config.value_block
    if name in _TAKES_ALL_KEYS:
        settings["KEY_BLOCK"] = key
        if key > 128:
            value_block, settings["num_stages"] = value_block // 2, 1
    elif config.key_block is not None:
        settings["KEY_BLOCK"] = min(key, config.key_block)
    if value_block is not None:
        settings["VALUE_BLOCK"] = min(value, value_block)
    return settings
