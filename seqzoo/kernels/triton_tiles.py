"""Tiles of tensors, and sums of log decays over spans of tokens: what the Triton kernels of delta rules share.

Sums of decays never cancel: each is a sum over the tokens of its span, all of one sign, as a product with a matrix of
zeros and ones. A decay below e^CUT is none at all: it counts as CUT, and so does a start.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from seqzoo.kernels.triton_support import last_axis_contiguous

# e^-800 is 0 even in float64.
CUT = tl.constexpr(-800.0)


class Rows(NamedTuple):
    """A tensor ``[batch time head ...]`` with any strides in front of its last axis, which is contiguous."""

    data: Any
    batch: int
    time: int
    head: int


def rows(x):
    """``x`` for a kernel: a copy only where an axis after the head's is strided."""
    if x is None:
        return None
    if x.ndim > 3:
        x = last_axis_contiguous(x)
    return Rows(x, x.stride(0), x.stride(1), x.stride(2) if x.ndim > 2 else 0)


def power(size):
    """Columns of a tile that holds ``size``: at least what tensor cores take."""
    return max(triton.next_power_of_2(size), 16)


@triton.jit
def row_at(x, batch, token, head):
    return x.data + batch * x.batch + token * x.time + head * x.head


@triton.jit
def load(pointer, stride, rows, size, column, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """A tile, 0 past the last row or column."""
    i, j = tl.arange(0, ROWS)[:, None], column + tl.arange(0, COLUMNS)[None, :]
    return tl.load(pointer + i * stride + j, mask=(i < rows) & (j < size), other=0)


@triton.jit
def store(pointer, stride, rows, size, column, tile):
    i, j = tl.arange(0, tile.shape[0])[:, None], column + tl.arange(0, tile.shape[1])[None, :]
    tl.store(pointer + i * stride + j, tile.to(pointer.dtype.element_ty), mask=(i < rows) & (j < size))


@triton.jit
def load_across(pointer, stride, rows, size, column, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """The transpose of a tile: its columns as rows."""
    i, j = tl.arange(0, ROWS)[None, :], column + tl.arange(0, COLUMNS)[:, None]
    return tl.load(pointer + i * stride + j, mask=(i < rows) & (j < size), other=0)


@triton.jit
def store_across(pointer, stride, rows, size, column, tile):
    i, j = tl.arange(0, tile.shape[1])[None, :], column + tl.arange(0, tile.shape[0])[:, None]
    tl.store(pointer + i * stride + j, tile.to(pointer.dtype.element_ty), mask=(i < rows) & (j < size))


@triton.jit
def load_square(pointer, SIZE: tl.constexpr):
    return tl.load(pointer + tl.arange(0, SIZE)[:, None] * SIZE + tl.arange(0, SIZE)[None, :])


@triton.jit
def store_square(pointer, tile):
    size: tl.constexpr = tile.shape[0]
    place = tl.arange(0, size)[:, None] * size + tl.arange(0, size)[None, :]
    tl.store(pointer + place, tile.to(pointer.dtype.element_ty))


@triton.jit
def channel_decays(log_decay, starts, batch, first, left, head, column, KEY: tl.constexpr, CHUNK: tl.constexpr,
                   KEY_BLOCK: tl.constexpr, SUM: tl.constexpr):  # fmt: skip
    """Log decays a channel of a chunk's tokens; CUT where they leave nothing of what was before, 0 past the last."""
    g = load(row_at(log_decay, batch, first, head), log_decay.time, left, KEY, column, CHUNK, KEY_BLOCK).to(SUM)
    g = tl.where(g < CUT, CUT, g)
    if starts is not None:
        token = tl.arange(0, CHUNK)
        begins = tl.load(row_at(starts, batch, first + token, 0), mask=token < left, other=0) != 0
        g = tl.where(begins[:, None], CUT, g)
    return g


@triton.jit
def sums(chosen, g, NARROW: tl.constexpr, SUM: tl.constexpr, PRECISION: tl.constexpr):
    """Sums over the rows of ``g`` that each row of ``chosen`` marks, to 16 bits or more beside narrow keys."""
    if NARROW:
        high = g.to(tl.bfloat16)
        low = (g - high.to(SUM)).to(tl.bfloat16)
        return tl.dot(chosen.to(tl.bfloat16), low, tl.dot(chosen.to(tl.bfloat16), high))
    else:
        return tl.dot(chosen.to(SUM), g, input_precision=PRECISION, out_dtype=SUM)


@triton.jit
def to_middle(i, j, level):
    """Marks the tokens j between token i and the middle of i's block of 2^(level + 1), i with the earlier half's."""
    return (i >> level == j >> level) & ((j <= i) == ((i >> level & 1) == 1))


@triton.jit
def mark(marks, CHUNK: tl.constexpr):
    """For one level, ones at the tokens j of ``to_middle``, and ones at pairs of tokens across a middle.

    Every chunk uses the same marks, and to read them takes less than to find them out again.
    """
    level = tl.program_id(0)
    i, j = tl.arange(0, CHUNK)[:, None], tl.arange(0, CHUNK)[None, :]
    marks += level * 2 * CHUNK * CHUNK
    store_square(marks, to_middle(i, j, level))
    store_square(marks + CHUNK * CHUNK, (i ^ j) >> level == 1)


@triton.jit
def load_marks(marks, level, CHUNK: tl.constexpr):
    marks += level * 2 * CHUNK * CHUNK
    return load_square(marks, CHUNK), load_square(marks + CHUNK * CHUNK, CHUNK)
