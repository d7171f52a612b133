"""The general delta rule on a GPU: each chunk becomes an affine map of the state, then one short walk over the maps.

With G the running sum of g inside a chunk, G- the same without a token's own g, S the state that enters, z_i what a_i
reads, and r = q e^g, so that r reads ahead of its token's decay as a does, all exponents are of sums over whole tokens:

    A_xy = (x_i . y_j) e^{G-_i - G_j} for j < i, x of a, r, y of k, b; A_rk and A_rb also have q_i . k_i and q_i . b_i
    H = -A_ab (I - A_ab)^{-1},    W = (I - H)(a e^{G-}),    U = (I - H) A_ak V,    Z = W S + U
    O = (r e^{G-} + A_rb W) S + (A_rk V + A_rb U),    S' = e^{G_C} S + (k e^{G_C - G})^T V + (b e^{G_C - G})^T Z

All but S is known of every chunk at once (``_prepare``); the walk (``_walk``) then carries S in registers through four
products a chunk. Backward, with dO and dS' given, Q = r e^{G-} + A_rb W, k' = k e^{G_C - G} and b' likewise:

    dS = e^{G_C} dS' + Q^T dO + W^T (b' dS'),    dZ = A_rb^T dO + b' dS',    X = dZ - H^T dZ
    dV = A_rk^T dO + k' dS' + A_ak^T X,    dA_rk = dO V^T,    dA_rb = dO Z^T,    dA_ak = X V^T,    dA_ab = X Z^T

``_walk_back`` carries dS; ``_solve_back`` finds X, dV and dA of all chunks at once, and ``_differentiate`` all that is
left from them, S and dS'.

Pairs of tokens are sorted by the largest aligned block that parts them: a product of e^{sum from its middle} and
e^{sum up to the middle}. So no exponent is above 0 and no sums are subtracted, however strong the decays are. At a
start, the decay is none and a is 0. The work for these blocks grows with the length of a chunk: chunks are short, and
a program holds one whole.

Long sequences run in segments: what is stored of a chunk takes no more memory than one segment has.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from seqzoo.kernels.dplr_delta_rule.triton_op import CHUNK, FEW, SHORT_CHUNK, segment
from seqzoo.kernels.triton_support import launch_options, segments
from seqzoo.kernels.triton_tiles import (
    channel_decays,
    load,
    load_across,
    load_square,
    power,
    row_at,
    rows,
    store,
    store_across,
    store_square,
    sums,
    to_middle,
)


@triton.jit
def _place(program, heads, chunks, CHUNK: tl.constexpr):
    """Of a program for each chunk: its row, head and first token."""
    return program // chunks // heads, program // chunks % heads, program % chunks * CHUNK


@triton.jit
def _load_keys(
    q, k, a, b, log_decay, starts, batch, head, first, left, column,
    KEY: tl.constexpr, CHUNK: tl.constexpr, KEY_BLOCK: tl.constexpr, SUM: tl.constexpr,
):  # fmt: skip
    """Blocks of channels of q, k, a, b and g; a is 0 where there is nothing left to read."""
    query = load(row_at(q, batch, first, head), q.time, left, KEY, column, CHUNK, KEY_BLOCK).to(SUM)
    key = load(row_at(k, batch, first, head), k.time, left, KEY, column, CHUNK, KEY_BLOCK).to(SUM)
    read = load(row_at(a, batch, first, head), a.time, left, KEY, column, CHUNK, KEY_BLOCK).to(SUM)
    write = load(row_at(b, batch, first, head), b.time, left, KEY, column, CHUNK, KEY_BLOCK).to(SUM)
    if starts is not None:
        token = tl.arange(0, CHUNK)
        begins = tl.load(row_at(starts, batch, first + token, 0), mask=token < left, other=0) != 0
        read = tl.where(begins[:, None], 0, read)
    g = channel_decays(log_decay, starts, batch, first, left, head, column, KEY, CHUNK, KEY_BLOCK, SUM)
    return query, key, read, write, g


@triton.jit
def _near(i, j, level, g, NARROW: tl.constexpr, SUM: tl.constexpr, EXACT: tl.constexpr):
    """Decays between each token and the middle of its block of 2^(level + 1), without the token's own."""
    return tl.exp(sums(to_middle(i, j, level) & (i != j), g, NARROW, SUM, EXACT))


@triton.jit
def _invert(scores, i, j, LEVELS: tl.constexpr, EXACT: tl.constexpr):
    """H = B (I + B)^{-1} of a strictly lower B, by doubling diagonal blocks: H_21 = (I - H_22) B_21 (I - H_11)."""
    h = tl.where(i // 2 == j // 2, scores, 0)
    for level in range(1, LEVELS):
        corner = tl.where((i >> level + 1 == j >> level + 1) & (i >> level != j >> level), scores, 0)
        corner -= tl.dot(h, corner, input_precision=EXACT, out_dtype=scores.dtype)
        h += corner - tl.dot(corner, h, input_precision=EXACT, out_dtype=scores.dtype)
    return h


@triton.jit(do_not_specialize=["time", "chunks"])
def _prepare(
    q, k, v, a, b, log_decay, starts, z_reads, z_own, o_reads, o_own, k_end, b_end, keeps, solve, scores,
    time, heads, chunks,
    KEY: tl.constexpr, VALUE: tl.constexpr, CHUNK: tl.constexpr, LEVELS: tl.constexpr,
    KEY_BLOCK: tl.constexpr, VALUE_BLOCK: tl.constexpr,
    DOT: tl.constexpr, SUM: tl.constexpr, PRECISION: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    """What a chunk of a head does to any state: W and U, what O has of S and without it, k', b' and e^{G_C}.

    The backward also needs H and, of ``scores``, A_rk, A_rb and A_ak.
    """
    NARROW: tl.constexpr = tl.bfloat16 == DOT
    program = tl.program_id(0).to(tl.int64)
    batch, head, first = _place(program, heads, chunks, CHUNK)
    left = time - first
    token = tl.arange(0, CHUNK)
    i, j = token[:, None], token[None, :]
    rk, rb = tl.zeros((CHUNK, CHUNK), SUM), tl.zeros((CHUNK, CHUNK), SUM)
    ak, ab = tl.zeros((CHUNK, CHUNK), SUM), tl.zeros((CHUNK, CHUNK), SUM)
    for column in range(0, KEY, KEY_BLOCK):
        query, key, read, write, g = _load_keys(
            q, k, a, b, log_decay, starts, batch, head, first, left, column, KEY, CHUNK, KEY_BLOCK, SUM
        )
        rk += tl.where(i == j, tl.sum(query * key, 1)[:, None], 0)
        rb += tl.where(i == j, tl.sum(query * write, 1)[:, None], 0)
        query *= tl.exp(g)
        for level in range(LEVELS):
            decay = _near(i, j, level, g, NARROW, SUM, EXACT)
            near_query, near_read = (query * decay).to(DOT), (read * decay).to(DOT)
            near_key, near_write = tl.trans((key * decay).to(DOT)), tl.trans((write * decay).to(DOT))
            pair = (i >> level + 1 == j >> level + 1) & (i >> level > j >> level)
            rk += tl.where(pair, tl.dot(near_query, near_key, input_precision=PRECISION, out_dtype=SUM), 0)
            rb += tl.where(pair, tl.dot(near_query, near_write, input_precision=PRECISION, out_dtype=SUM), 0)
            ak += tl.where(pair, tl.dot(near_read, near_key, input_precision=PRECISION, out_dtype=SUM), 0)
            ab += tl.where(pair, tl.dot(near_read, near_write, input_precision=PRECISION, out_dtype=SUM), 0)
    h = _invert(-ab, i, j, LEVELS, EXACT).to(DOT)
    narrow_rk, narrow_rb, narrow_ak = rk.to(DOT), rb.to(DOT), ak.to(DOT)
    if solve is not None:
        store_square(solve + program * CHUNK * CHUNK, h)
        store_square(scores + program * 3 * CHUNK * CHUNK, narrow_rk)
        store_square(scores + (program * 3 + 1) * CHUNK * CHUNK, narrow_rb)
        store_square(scores + (program * 3 + 2) * CHUNK * CHUNK, narrow_ak)

    of_keys = program * CHUNK * KEY
    for column in range(0, KEY, KEY_BLOCK):
        query, key, read, write, g = _load_keys(
            q, k, a, b, log_decay, starts, batch, head, first, left, column, KEY, CHUNK, KEY_BLOCK, SUM
        )
        at_key = column + tl.arange(0, KEY_BLOCK)
        tl.store(keeps + program * KEY + at_key, tl.exp(tl.sum(g, 0)), mask=at_key < KEY)
        until_end = tl.exp(sums(i < j, g, NARROW, SUM, EXACT))
        store(k_end + of_keys, KEY, CHUNK, KEY, column, key * until_end)
        store(b_end + of_keys, KEY, CHUNK, KEY, column, write * until_end)
        since_start = tl.exp(sums(i > j, g, NARROW, SUM, EXACT))
        reading = read * since_start
        reading -= tl.dot(h, reading.to(DOT), input_precision=PRECISION, out_dtype=SUM)
        store(z_reads + of_keys, KEY, CHUNK, KEY, column, reading)
        output = query * tl.exp(g) * since_start
        output = tl.dot(narrow_rb, reading.to(DOT), output, input_precision=PRECISION)
        store(o_reads + of_keys, KEY, CHUNK, KEY, column, output)

    of_values = program * CHUNK * VALUE
    for column in range(0, VALUE, VALUE_BLOCK):
        value = load(row_at(v, batch, first, head), v.time, left, VALUE, column, CHUNK, VALUE_BLOCK).to(DOT)
        reading = tl.dot(narrow_ak, value, input_precision=PRECISION, out_dtype=SUM)
        reading -= tl.dot(h, reading.to(DOT), input_precision=PRECISION, out_dtype=SUM)
        store(z_own + of_values, VALUE, CHUNK, VALUE, column, reading)
        if o_own is not None:
            output = tl.dot(narrow_rk, value, input_precision=PRECISION, out_dtype=SUM)
            output = tl.dot(narrow_rb, reading.to(DOT), output, input_precision=PRECISION)
            store(o_own + of_values, VALUE, CHUNK, VALUE, column, output)


@triton.jit(do_not_specialize=["time", "chunks"])
def _walk(
    v, z_reads, z_own, o_reads, o_own, k_end, b_end, keeps, state, o, z, entering, last, time, heads, chunks,
    KEY: tl.constexpr, VALUE: tl.constexpr, CHUNK: tl.constexpr, KEY_BLOCK: tl.constexpr, VALUE_BLOCK: tl.constexpr,
    DOT: tl.constexpr, SUM: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The state from chunk to chunk, for one head and block of values; outputs, or what the backward needs.

    Everything is transposed, values by tokens or by keys: so what one product gives is, in registers, the left side of
    the next.
    """
    blocks: tl.constexpr = (VALUE + VALUE_BLOCK - 1) // VALUE_BLOCK
    program = tl.program_id(0).to(tl.int64)
    row, column = program // blocks, program % blocks * VALUE_BLOCK
    batch, head = row // heads, row % heads
    at_key = tl.arange(0, KEY_BLOCK)

    memory = tl.zeros((VALUE_BLOCK, KEY_BLOCK), SUM)
    if state is not None:
        memory += load_across(state + row * KEY * VALUE, VALUE, KEY, VALUE, column, KEY_BLOCK, VALUE_BLOCK)
    for chunk in range(chunks):
        cell = row * chunks + chunk
        first = tl.cast(chunk, tl.int64) * CHUNK
        left = time - first
        of_keys, of_values = cell * CHUNK * KEY, cell * CHUNK * VALUE
        narrow = memory.to(DOT)
        reads = load(z_reads + of_keys, KEY, CHUNK, KEY, 0, CHUNK, KEY_BLOCK)
        reading = load_across(z_own + of_values, VALUE, CHUNK, VALUE, column, CHUNK, VALUE_BLOCK).to(SUM)
        reading = tl.dot(narrow, tl.trans(reads), reading, input_precision=PRECISION).to(DOT)
        if entering is not None:
            store(entering + cell * KEY * VALUE + column * KEY, KEY, VALUE - column, KEY, 0, narrow)
            store_across(z + of_values, VALUE, CHUNK, VALUE, column, reading)
        if o is not None:
            reads = load(o_reads + of_keys, KEY, CHUNK, KEY, 0, CHUNK, KEY_BLOCK)
            output = load_across(o_own + of_values, VALUE, CHUNK, VALUE, column, CHUNK, VALUE_BLOCK).to(SUM)
            output = tl.dot(narrow, tl.trans(reads), output, input_precision=PRECISION)
            store_across(row_at(o, batch, first, head), o.time, left, VALUE, column, output)
        memory *= tl.load(keeps + cell * KEY + at_key, mask=at_key < KEY, other=0)[None, :]
        value = load_across(row_at(v, batch, first, head), v.time, left, VALUE, column, CHUNK, VALUE_BLOCK).to(DOT)
        writes = load(k_end + of_keys, KEY, CHUNK, KEY, 0, CHUNK, KEY_BLOCK)
        memory = tl.dot(value, writes, memory, input_precision=PRECISION)
        writes = load(b_end + of_keys, KEY, CHUNK, KEY, 0, CHUNK, KEY_BLOCK)
        memory = tl.dot(reading, writes, memory, input_precision=PRECISION)
    if last is not None:
        store_across(last + row * KEY * VALUE, VALUE, KEY, VALUE, column, memory)


@triton.jit(do_not_specialize=["time", "chunks"])
def _walk_back(
    do, z_reads, o_reads, b_end, keeps, dlast, leaving, dstate, time, heads, chunks,
    KEY: tl.constexpr, VALUE: tl.constexpr, CHUNK: tl.constexpr, KEY_BLOCK: tl.constexpr, VALUE_BLOCK: tl.constexpr,
    DOT: tl.constexpr, SUM: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The gradient of the state from the last chunk to the first, transposed as in ``_walk``."""
    blocks: tl.constexpr = (VALUE + VALUE_BLOCK - 1) // VALUE_BLOCK
    program = tl.program_id(0).to(tl.int64)
    row, column = program // blocks, program % blocks * VALUE_BLOCK
    batch, head = row // heads, row % heads
    at_key = tl.arange(0, KEY_BLOCK)

    dmemory = load_across(dlast + row * KEY * VALUE, VALUE, KEY, VALUE, column, KEY_BLOCK, VALUE_BLOCK).to(SUM)
    for back in range(chunks):
        chunk = chunks - 1 - back
        cell = row * chunks + chunk
        first = tl.cast(chunk, tl.int64) * CHUNK
        of_keys = cell * CHUNK * KEY
        narrow = dmemory.to(DOT)
        store(leaving + cell * KEY * VALUE + column * KEY, KEY, VALUE - column, KEY, 0, narrow)
        writes = load(b_end + of_keys, KEY, CHUNK, KEY, 0, CHUNK, KEY_BLOCK)
        dreading = tl.dot(narrow, tl.trans(writes), input_precision=PRECISION, out_dtype=SUM).to(DOT)
        dmemory *= tl.load(keeps + cell * KEY + at_key, mask=at_key < KEY, other=0)[None, :]
        doutput = load_across(row_at(do, batch, first, head), do.time, time - first, VALUE, column, CHUNK, VALUE_BLOCK)
        reads = load(o_reads + of_keys, KEY, CHUNK, KEY, 0, CHUNK, KEY_BLOCK)
        dmemory = tl.dot(doutput.to(DOT), reads, dmemory, input_precision=PRECISION)
        reads = load(z_reads + of_keys, KEY, CHUNK, KEY, 0, CHUNK, KEY_BLOCK)
        dmemory = tl.dot(dreading, reads, dmemory, input_precision=PRECISION)
    store_across(dstate + row * KEY * VALUE, VALUE, KEY, VALUE, column, dmemory)


@triton.jit(do_not_specialize=["time", "chunks"])
def _solve_back(
    v, do, z, k_end, b_end, solve, scores, leaving, x, dv, dscores, time, heads, chunks,
    KEY: tl.constexpr, VALUE: tl.constexpr, CHUNK: tl.constexpr, KEY_BLOCK: tl.constexpr, VALUE_BLOCK: tl.constexpr,
    DOT: tl.constexpr, SUM: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """X, dV, and dA_rk, dA_rb, dA_ak and dA_ab, each with its transpose, of one chunk and head."""
    program = tl.program_id(0).to(tl.int64)
    batch, head, first = _place(program, heads, chunks, CHUNK)
    left = time - first
    token = tl.arange(0, CHUNK)
    i, j = token[:, None], token[None, :]
    square = CHUNK * CHUNK
    h = load_square(solve + program * square, CHUNK)
    rk = load_square(scores + program * 3 * square, CHUNK)
    rb = load_square(scores + (program * 3 + 1) * square, CHUNK)
    ak = load_square(scores + (program * 3 + 2) * square, CHUNK)
    drk, drb = tl.zeros((CHUNK, CHUNK), SUM), tl.zeros((CHUNK, CHUNK), SUM)
    dak, dab = tl.zeros((CHUNK, CHUNK), SUM), tl.zeros((CHUNK, CHUNK), SUM)
    of_values = program * CHUNK * VALUE
    for column in range(0, VALUE, VALUE_BLOCK):
        doutput = load(row_at(do, batch, first, head), do.time, left, VALUE, column, CHUNK, VALUE_BLOCK).to(DOT)
        value = load(row_at(v, batch, first, head), v.time, left, VALUE, column, CHUNK, VALUE_BLOCK).to(DOT)
        reading = load(z + of_values, VALUE, CHUNK, VALUE, column, CHUNK, VALUE_BLOCK)
        dreading = tl.dot(tl.trans(rb), doutput, input_precision=PRECISION, out_dtype=SUM)
        dvalue = tl.dot(tl.trans(rk), doutput, input_precision=PRECISION, out_dtype=SUM)
        drk = tl.dot(doutput, tl.trans(value), drk, input_precision=PRECISION)
        drb = tl.dot(doutput, tl.trans(reading), drb, input_precision=PRECISION)
        for key_column in range(0, KEY, KEY_BLOCK):
            dmemory = leaving + program * KEY * VALUE + column * KEY
            dmemory = tl.trans(load(dmemory, KEY, VALUE - column, KEY, key_column, VALUE_BLOCK, KEY_BLOCK))
            writes = load(b_end + program * CHUNK * KEY, KEY, CHUNK, KEY, key_column, CHUNK, KEY_BLOCK)
            dreading = tl.dot(writes, dmemory, dreading, input_precision=PRECISION)
            writes = load(k_end + program * CHUNK * KEY, KEY, CHUNK, KEY, key_column, CHUNK, KEY_BLOCK)
            dvalue = tl.dot(writes, dmemory, dvalue, input_precision=PRECISION)
        dreading -= tl.dot(tl.trans(h), dreading.to(DOT), input_precision=PRECISION, out_dtype=SUM)
        narrow = dreading.to(DOT)
        store(x + of_values, VALUE, CHUNK, VALUE, column, narrow)
        dvalue = tl.dot(tl.trans(ak), narrow, dvalue, input_precision=PRECISION)
        store(row_at(dv, batch, first, head), dv.time, left, VALUE, column, dvalue)
        dak = tl.dot(narrow, tl.trans(value), dak, input_precision=PRECISION)
        dab = tl.dot(narrow, tl.trans(reading), dab, input_precision=PRECISION)
    dscores += program * 4 * square
    store_square(dscores, _both_ways(drk, i, j) + tl.where(i == j, drk, 0))
    store_square(dscores + square, _both_ways(drb, i, j) + tl.where(i == j, drb, 0))
    store_square(dscores + 2 * square, _both_ways(dak, i, j))
    store_square(dscores + 3 * square, _both_ways(dab, i, j))


@triton.jit
def _both_ways(tile, i, j):
    tile = tl.where(i > j, tile, 0)
    return tile + tl.trans(tile)


@triton.jit(do_not_specialize=["time", "chunks"])
def _differentiate(
    q, k, v, a, b, log_decay, starts, do, z, x, entering, leaving, keeps, dscores, dq, dk, da, db, dlog_decay,
    time, heads, chunks,
    KEY: tl.constexpr, VALUE: tl.constexpr, CHUNK: tl.constexpr, LEVELS: tl.constexpr,
    KEY_BLOCK: tl.constexpr, VALUE_BLOCK: tl.constexpr,
    DOT: tl.constexpr, SUM: tl.constexpr, PRECISION: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    """Gradients of q, k, a, b and g from one chunk of one head, for a block of channels."""
    NARROW: tl.constexpr = tl.bfloat16 == DOT
    blocks: tl.constexpr = (KEY + KEY_BLOCK - 1) // KEY_BLOCK
    program = tl.program_id(0).to(tl.int64) // blocks
    column = tl.program_id(0) % blocks * KEY_BLOCK
    batch, head, first = _place(program, heads, chunks, CHUNK)
    left = time - first
    token, at_key = tl.arange(0, CHUNK), column + tl.arange(0, KEY_BLOCK)
    i, j = token[:, None], token[None, :]

    dquery, dread = tl.zeros((CHUNK, KEY_BLOCK), SUM), tl.zeros((CHUNK, KEY_BLOCK), SUM)
    dkey, dwrite = tl.zeros((CHUNK, KEY_BLOCK), SUM), tl.zeros((CHUNK, KEY_BLOCK), SUM)
    kept = tl.zeros((KEY_BLOCK,), SUM)
    of_values = program * CHUNK * VALUE
    for value_column in range(0, VALUE, VALUE_BLOCK):
        of_state = program * KEY * VALUE + value_column * KEY
        memory = load(entering + of_state, KEY, VALUE - value_column, KEY, column, VALUE_BLOCK, KEY_BLOCK)
        doutput = load(row_at(do, batch, first, head), do.time, left, VALUE, value_column, CHUNK, VALUE_BLOCK).to(DOT)
        dreading = load(x + of_values, VALUE, CHUNK, VALUE, value_column, CHUNK, VALUE_BLOCK)
        dquery = tl.dot(doutput, memory, dquery, input_precision=PRECISION)
        dread = tl.dot(dreading, memory, dread, input_precision=PRECISION)
        dmemory = load(leaving + of_state, KEY, VALUE - value_column, KEY, column, VALUE_BLOCK, KEY_BLOCK)
        value = load(row_at(v, batch, first, head), v.time, left, VALUE, value_column, CHUNK, VALUE_BLOCK).to(DOT)
        reading = load(z + of_values, VALUE, CHUNK, VALUE, value_column, CHUNK, VALUE_BLOCK)
        dkey = tl.dot(value, dmemory, dkey, input_precision=PRECISION)
        dwrite = tl.dot(reading, dmemory, dwrite, input_precision=PRECISION)
        kept += tl.sum(memory.to(SUM) * dmemory.to(SUM), 0)

    query, key, read, write, g = _load_keys(
        q, k, a, b, log_decay, starts, batch, head, first, left, column, KEY, CHUNK, KEY_BLOCK, SUM
    )
    query *= tl.exp(g)
    since_start = tl.exp(sums(i > j, g, NARROW, SUM, EXACT))
    until_end = tl.exp(sums(i < j, g, NARROW, SUM, EXACT))
    dquery *= since_start
    dread *= since_start
    dkey *= until_end
    dwrite *= until_end
    # A decay acts on all that passes its token.
    dg = sums(i < j, query * dquery + read * dread, NARROW, SUM, EXACT)
    dg += sums(i > j, key * dkey + write * dwrite, NARROW, SUM, EXACT)
    dg += (kept * tl.load(keeps + program * KEY + at_key, mask=at_key < KEY, other=0))[None, :]
    square = CHUNK * CHUNK
    own = dscores + program * 4 * square + token * CHUNK + token
    dscores += program * 4 * square + i * CHUNK + j
    for level in range(LEVELS):
        decay = _near(i, j, level, g, NARROW, SUM, EXACT)
        pair = (i >> level + 1 == j >> level + 1) & (i >> level != j >> level)
        # Tokens of a later half read, those of an earlier one write: one product gives the gradients of both.
        later = (i >> level & 1) == 1
        near_query, near_read, near_key, near_write = query * decay, read * decay, key * decay, write * decay
        of_rk = tl.dot(
            tl.load(dscores, mask=pair, other=0), tl.where(later, near_query, near_key).to(DOT),
            input_precision=PRECISION, out_dtype=SUM,
        )  # fmt: skip
        of_rb = tl.dot(
            tl.load(dscores + square, mask=pair, other=0), tl.where(later, near_query, near_write).to(DOT),
            input_precision=PRECISION, out_dtype=SUM,
        )  # fmt: skip
        of_ak = tl.dot(
            tl.load(dscores + 2 * square, mask=pair, other=0), tl.where(later, near_read, near_key).to(DOT),
            input_precision=PRECISION, out_dtype=SUM,
        )  # fmt: skip
        of_ab = tl.dot(
            tl.load(dscores + 3 * square, mask=pair, other=0), tl.where(later, near_read, near_write).to(DOT),
            input_precision=PRECISION, out_dtype=SUM,
        )  # fmt: skip
        # For a later half the first is of q and the second of a, for an earlier one of k and of b.
        of_first = (of_rk + tl.where(later, of_rb, of_ak)) * decay
        of_second = (of_ab + tl.where(later, of_ak, of_rb)) * decay
        dquery += tl.where(later, of_first, 0)
        dread += tl.where(later, of_second, 0)
        dkey += tl.where(later, 0, of_first)
        dwrite += tl.where(later, 0, of_second)
        through = tl.where(later, query, key) * of_first + tl.where(later, read, write) * of_second
        dg += sums(to_middle(j, i, level) & (i != j), through, NARROW, SUM, EXACT)
    dg += query * dquery
    own_key = tl.load(own).to(SUM)[:, None]
    own_write = tl.load(own + square).to(SUM)[:, None]
    dquery = dquery * tl.exp(g) + own_key * key + own_write * write
    query = load(row_at(q, batch, first, head), q.time, left, KEY, column, CHUNK, KEY_BLOCK).to(SUM)
    store(row_at(dq, batch, first, head), dq.time, left, KEY, column, dquery)
    store(row_at(dk, batch, first, head), dk.time, left, KEY, column, dkey + own_key * query)
    store(row_at(db, batch, first, head), db.time, left, KEY, column, dwrite + own_write * query)
    if starts is not None:
        begins = tl.load(row_at(starts, batch, first + token, 0), mask=token < left, other=0) != 0
        dread = tl.where(begins[:, None], 0, dread)
    store(row_at(da, batch, first, head), da.time, left, KEY, column, dread)
    store(row_at(dlog_decay, batch, first, head), dlog_decay.time, left, KEY, column, dg)


@triton.jit(do_not_specialize=["time"])
def _step(
    q, k, v, a, b, log_decay, starts, state, o, last, time, heads,
    KEY: tl.constexpr, VALUE: tl.constexpr, KEY_BLOCK: tl.constexpr, VALUE_BLOCK: tl.constexpr, SUM: tl.constexpr,
):  # fmt: skip
    """A few tokens one by one, for one head and block of values."""
    blocks: tl.constexpr = (VALUE + VALUE_BLOCK - 1) // VALUE_BLOCK
    program = tl.program_id(0).to(tl.int64)
    row, column = program // blocks, program % blocks * VALUE_BLOCK
    batch, head = row // heads, row % heads
    at_key, at_value = tl.arange(0, KEY_BLOCK), column + tl.arange(0, VALUE_BLOCK)
    is_key, is_value = at_key < KEY, at_value < VALUE
    memory = tl.zeros((KEY_BLOCK, VALUE_BLOCK), SUM)
    if state is not None:
        memory += load(state + row * KEY * VALUE, VALUE, KEY, VALUE, column, KEY_BLOCK, VALUE_BLOCK)
    for token in range(time):
        if starts is not None:
            memory = tl.where(tl.load(row_at(starts, batch, token, 0)) != 0, 0, memory)
        query = tl.load(row_at(q, batch, token, head) + at_key, mask=is_key, other=0).to(SUM)
        key = tl.load(row_at(k, batch, token, head) + at_key, mask=is_key, other=0).to(SUM)
        read = tl.load(row_at(a, batch, token, head) + at_key, mask=is_key, other=0).to(SUM)
        write = tl.load(row_at(b, batch, token, head) + at_key, mask=is_key, other=0).to(SUM)
        g = tl.load(row_at(log_decay, batch, token, head) + at_key, mask=is_key, other=0).to(SUM)
        value = tl.load(row_at(v, batch, token, head) + at_value, mask=is_value, other=0).to(SUM)
        reading = tl.sum(memory * read[:, None], 0)
        memory = memory * tl.exp(g)[:, None] + write[:, None] * reading[None, :] + key[:, None] * value[None, :]
        output = tl.sum(memory * query[:, None], 0)
        tl.store(row_at(o, batch, token, head) + at_value, output.to(o.data.dtype.element_ty), mask=is_value)
    store(last + row * KEY * VALUE, VALUE, KEY, VALUE, column, memory)


_TYPES = {torch.bfloat16: tl.bfloat16, torch.float32: tl.float32, torch.float64: tl.float64}


class _Call(NamedTuple):
    """What is the same for all kernels of a call."""

    batch: int
    time: int
    heads: int
    key: int
    value: int
    chunk: int
    dtype: torch.dtype

    @property
    def wide(self):
        """Of sums and states."""
        return torch.promote_types(self.dtype, torch.float32)

    @property
    def narrow(self):
        """Of what tensor cores multiply. A state may be too large for float16; tfloat32 has as many digits."""
        return torch.float32 if self.dtype == torch.float16 else self.dtype

    def constants(self, *names):
        """Compile-time arguments by name."""
        exact = "ieee" if torch.version.hip else "tf32x3"
        known = {
            "KEY": self.key,
            "VALUE": self.value,
            "CHUNK": self.chunk,
            "LEVELS": self.chunk.bit_length() - 1,
            "DOT": _TYPES[self.narrow],
            "SUM": _TYPES[self.wide],
            "PRECISION": "tf32" if self.dtype == torch.float16 and exact == "tf32x3" else exact,
            "EXACT": exact,
        }
        return {name: known[name] for name in names}


def _describe(q, v):
    batch, time, heads, value = v.shape
    short = time <= FEW or v.dtype in (torch.float32, torch.float16)
    return _Call(batch, time, heads, q.shape[3], value, SHORT_CHUNK if short else CHUNK, v.dtype)


def _segments(call):
    return segments(call.time, segment(call.batch * call.heads), call.chunk)


class _Maps(NamedTuple):
    """What ``_prepare`` finds of a segment; ``None`` is what only the forward or only the backward needs."""

    z_reads: Tensor
    z_own: Tensor
    o_reads: Tensor
    o_own: Tensor | None
    k_end: Tensor
    b_end: Tensor
    keeps: Tensor
    solve: Tensor | None
    scores: Tensor | None


def _run_prepare(call, chunks, q, k, v, a, b, log_decay, starts, backward):
    cells = call.batch * call.heads * chunks

    def empty(*shape):
        return v.new_empty((cells, *shape), dtype=call.narrow)

    z_reads, o_reads, k_end, b_end = (empty(call.chunk, call.key) for _ in range(4))
    maps = _Maps(
        z_reads=z_reads,
        z_own=empty(call.chunk, call.value),
        o_reads=o_reads,
        o_own=None if backward else empty(call.chunk, call.value),
        k_end=k_end,
        b_end=b_end,
        keeps=v.new_empty((cells, call.key), dtype=call.wide),
        solve=empty(call.chunk, call.chunk) if backward else None,
        scores=empty(3, call.chunk, call.chunk) if backward else None,
    )
    _prepare[(cells,)](
        *(rows(x) for x in (q, k, v, a, b, log_decay, starts)), *maps, v.shape[1], call.heads, chunks,
        **call.constants("KEY", "VALUE", "CHUNK", "LEVELS", "DOT", "SUM", "PRECISION", "EXACT"),
        **_config("prepare", call),
    )  # fmt: skip
    return maps


def _run_walk(call, chunks, maps, v, state, o=None, z=None, entering=None, last=None):
    config = _config("walk", call)
    programs = call.batch * call.heads * triton.cdiv(call.value, config["VALUE_BLOCK"])
    _walk[(programs,)](
        rows(v), *maps[:7], state, rows(o), z, entering, last, v.shape[1], call.heads, chunks,
        **call.constants("KEY", "VALUE", "CHUNK", "DOT", "SUM", "PRECISION"), **config,
    )  # fmt: skip


def forward(q, k, v, a, b, log_decay, state, starts):
    """Outputs, the last state, and for the backward the states that enter every segment but the first."""
    call = _describe(q, v)
    inputs = (q, k, v, a, b, log_decay, starts)
    o = v.new_empty(v.shape)
    state = None if state is None else state.contiguous()
    shape = (call.batch, call.heads, call.key, call.value)
    last = v.new_empty(shape, dtype=call.wide)
    if call.time <= FEW:
        config = _config("step", call)
        programs = call.batch * call.heads * triton.cdiv(call.value, config["VALUE_BLOCK"])
        _step[(programs,)](
            *(rows(x) for x in inputs), state, rows(o), last, call.time, call.heads,
            **call.constants("KEY", "VALUE", "SUM"), **config,
        )  # fmt: skip
        return o, last, v.new_empty((0, *shape), dtype=call.wide)
    segments = _segments(call)
    states = v.new_empty((len(segments) - 1, *shape), dtype=call.wide)
    for index, (begin, end, chunks) in enumerate(segments):
        cut = [None if x is None else x[:, begin:end] for x in inputs]
        maps = _run_prepare(call, chunks, *cut, backward=False)
        leaves = last if index == len(segments) - 1 else states[index]
        _run_walk(call, chunks, maps, v[:, begin:end], state, o=o[:, begin:end], last=leaves)
        state = leaves
    return o, last, states


def backward(do, dlast, q, k, v, a, b, log_decay, state, starts, states):
    """Gradients of all inputs but ``starts``."""
    call = _describe(q, v)
    inputs = (q, k, v, a, b, log_decay, starts, do)
    gradients = [x.new_empty(x.shape) for x in (q, k, v, a, b, log_decay)]
    entries = [None if state is None else state.contiguous(), *states.unbind()]
    dstate = dlast.contiguous()
    for (begin, end, chunks), enters in reversed(list(zip(_segments(call), entries, strict=True))):
        cut = [None if x is None else x[:, begin:end] for x in inputs]
        outputs = [x[:, begin:end] for x in gradients]
        dstate = _segment_backward(call, chunks, cut, outputs, enters, dstate)
    return *gradients, dstate


def _segment_backward(call, chunks, inputs, outputs, state, dlast):
    """Write the gradients of a segment to ``outputs``; return that of the state that enters it."""
    *inputs, do = inputs
    v = inputs[2]
    time, cells = v.shape[1], call.batch * call.heads * chunks

    def empty(*shape):
        return v.new_empty((cells, *shape), dtype=call.narrow)

    maps = _run_prepare(call, chunks, *inputs, backward=True)
    z, x = (empty(call.chunk, call.value) for _ in range(2))
    entering, leaving = (empty(call.value, call.key) for _ in range(2))
    _run_walk(call, chunks, maps, v, state, z=z, entering=entering)

    do = rows(do)
    config = _config("walk back", call)
    programs = call.batch * call.heads * triton.cdiv(call.value, config["VALUE_BLOCK"])
    dstate = torch.empty_like(dlast)
    _walk_back[(programs,)](
        do, maps.z_reads, maps.o_reads, maps.b_end, maps.keeps, dlast, leaving, dstate, time, call.heads, chunks,
        **call.constants("KEY", "VALUE", "CHUNK", "DOT", "SUM", "PRECISION"), **config,
    )  # fmt: skip

    dq, dk, dv, da, db, dlog_decay = (rows(x) for x in outputs)
    dscores = empty(4, call.chunk, call.chunk)
    _solve_back[(cells,)](
        rows(v), do, z, maps.k_end, maps.b_end, maps.solve, maps.scores, leaving, x, dv, dscores,
        time, call.heads, chunks,
        **call.constants("KEY", "VALUE", "CHUNK", "DOT", "SUM", "PRECISION"), **_config("solve back", call),
    )  # fmt: skip
    config = _config("differentiate", call)
    _differentiate[(cells * triton.cdiv(call.key, config["KEY_BLOCK"]),)](
        *(rows(x) for x in inputs), do, z, x, entering, leaving, maps.keeps, dscores, dq, dk, da, db, dlog_decay,
        time, call.heads, chunks,
        **call.constants("KEY", "VALUE", "CHUNK", "LEVELS", "DOT", "SUM", "PRECISION", "EXACT"), **config,
    )  # fmt: skip
    return dstate


class _Config(NamedTuple):
    """The largest blocks of keys, None where a kernel takes all of them, and of values, and how it is compiled."""

    key_block: int | None
    value_block: int
    num_warps: int
    num_stages: int


# Found by compiling for real chips: no spills, and shared memory within the smallest limit. Chunks have two rows of
# tensor cores' tiles, so that where tokens are rows, more than two warps would do the same work twice.
_CONFIGS = {
    "step": _Config(None, 32, 4, 1),
    "prepare": _Config(16, 64, 2, 1),
    "walk": _Config(None, 32, 4, 3),
    "walk back": _Config(None, 32, 4, 3),
    "solve back": _Config(32, 16, 2, 1),
    "differentiate": _Config(16, 64, 2, 1),
}


def _config(kernel, call):
    """Blocks, warps and stages of a kernel."""
    config, key = _CONFIGS[kernel], power(call.key)
    size = call.narrow.itemsize
    value_block = config.value_block if size == 2 and key <= 128 else max(config.value_block // 4, 16)
    # Each stage of a walk has shared memory for whole rows of keys.
    num_stages = min(config.num_stages, 1 + 512 // (key * size))
    return {
        "KEY_BLOCK": key if config.key_block is None else min(key, config.key_block),
        "VALUE_BLOCK": min(power(call.value), value_block),
    } | launch_options(config.num_warps, num_stages)
