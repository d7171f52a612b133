"""Gated norms on a GPU: a program holds whole groups of channels in registers, so that memory is read once.

The backward normalises again: the inputs have to be read anyway. With z = scale w n + b and dn = scale w dz,

    gradient of u = r (dn - mean(dn) [of a centered norm] - n mean(n dn)),    r = 1 / sqrt(mean((u - c)^2) + eps),
    gradient of w = sum scale n dz,    gradient of b = sum dz;

each program sums the latter two over its own groups, and the launcher over programs.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from seqzoo.kernels.triton_support import last_axis_contiguous, launch_options

NUMBERS = 2048
"""Of a tile: as many groups as make so many, or one larger group."""
A_WARP, WARPS = 256, 8
"""Numbers of a tile for each warp, and the most warps: of more, threads have fewer registers, and wide groups spill."""
PROGRAMS = 1024
"""Of the backward, at most: they keep a GPU busy, and each has sums of its own."""


@triton.jit
def _places(tile, rows, repeats, size, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Tokens of a tile's rows, the first channels of their groups, channels inside of them, and which exist.

    A program along the second axis has its own numbers of weight and bias, for one group of each token or for all.
    """
    row = (tile * ROWS + tl.arange(0, ROWS))[:, None]
    column = tl.arange(0, COLUMNS)[None, :]
    group = tl.program_id(1) + row % repeats
    return (row // repeats).to(tl.int64), group * size + column, (row < rows) & (column < size)


@triton.jit
def _learned(pointer, size, COLUMNS: tl.constexpr, SUM: tl.constexpr):
    column = tl.arange(0, COLUMNS)[None, :]
    return tl.load(pointer + tl.program_id(1) * size + column, mask=column < size, other=0).to(SUM)


@triton.jit
def _activate(gate, SILU: tl.constexpr):
    """act(gate), and its derivative."""
    value = tl.sigmoid(gate)
    slope = value * (1 - value)
    if SILU:
        slope = value * (1 + gate * (1 - value))
        value *= gate
    return value, slope


@triton.jit
def _normalize(u, present, size, EPS: tl.constexpr, CENTERED: tl.constexpr):
    """n and r."""
    if CENTERED:
        u = tl.where(present, u - (tl.sum(u, 1) / size)[:, None], 0)
    root = tl.rsqrt(tl.sum(u * u, 1) / size + EPS)[:, None]
    return u * root, root


@triton.jit
def _forward(
    x, gate, weight, bias, y, rows, repeats, size, width, x_stride, gate_stride,
    EPS: tl.constexpr, SCALE: tl.constexpr, CENTERED: tl.constexpr, SILU: tl.constexpr, GATE_FIRST: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, SUM: tl.constexpr,
):  # fmt: skip
    token, channel, present = _places(tl.program_id(0), rows, repeats, size, ROWS, COLUMNS)
    u = tl.load(x + token * x_stride + channel, mask=present, other=0).to(SUM)
    if gate is not None:
        factor, _ = _activate(tl.load(gate + token * gate_stride + channel, mask=present, other=0).to(SUM), SILU)
        if GATE_FIRST:
            u *= factor
    z, _ = _normalize(u, present, size, EPS, CENTERED)
    z *= SCALE
    if weight is not None:
        z *= _learned(weight, size, COLUMNS, SUM)
    if bias is not None:
        z += _learned(bias, size, COLUMNS, SUM)
    if gate is not None and not GATE_FIRST:
        z *= factor
    tl.store(y + token * width + channel, z, mask=present)


@triton.jit
def _backward(
    dy, x, gate, weight, bias, dx, dgate, dweight, dbias, rows, repeats, size, width, dy_stride, x_stride, gate_stride,
    EPS: tl.constexpr, SCALE: tl.constexpr, CENTERED: tl.constexpr, SILU: tl.constexpr, GATE_FIRST: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, SUM: tl.constexpr,
):  # fmt: skip
    if weight is not None:
        of_weight = tl.zeros((ROWS, COLUMNS), SUM)
    if bias is not None:
        of_bias = tl.zeros((ROWS, COLUMNS), SUM)
    for tile in range(tl.program_id(0), tl.cdiv(rows, ROWS), tl.num_programs(0)):
        token, channel, present = _places(tile, rows, repeats, size, ROWS, COLUMNS)
        u = tl.load(x + token * x_stride + channel, mask=present, other=0).to(SUM)
        dz = tl.load(dy + token * dy_stride + channel, mask=present, other=0).to(SUM)
        if gate is not None:
            read = tl.load(gate + token * gate_stride + channel, mask=present, other=0).to(SUM)
            factor, slope = _activate(read, SILU)
            if GATE_FIRST:
                slope *= u
                u *= factor
        n, root = _normalize(u, present, size, EPS, CENTERED)
        # What is learned is read for each tile: of wide groups, registers hold no more than this.
        scale = tl.full((1, COLUMNS), SCALE, SUM)
        if weight is not None:
            scale *= _learned(weight, size, COLUMNS, SUM)
        if gate is not None and not GATE_FIRST:
            z = n * scale
            if bias is not None:
                z += _learned(bias, size, COLUMNS, SUM)
            tl.store(dgate + token * width + channel, dz * z * slope, mask=present)
            dz *= factor
        if weight is not None:
            of_weight += SCALE * n * dz
        if bias is not None:
            of_bias += dz
        dn = dz * scale
        du = dn - n * (tl.sum(n * dn, 1) / size)[:, None]
        if CENTERED:
            du -= (tl.sum(dn, 1) / size)[:, None]
        du *= root
        if gate is not None and GATE_FIRST:
            tl.store(dgate + token * width + channel, du * slope, mask=present)
            du *= factor
        tl.store(dx + token * width + channel, du, mask=present)

    column = tl.arange(0, COLUMNS)
    at = (tl.program_id(0).to(tl.int64) * tl.num_programs(1) + tl.program_id(1)) * size + column
    if weight is not None:
        tl.store(dweight + at, tl.sum(of_weight, 0), mask=column < size)
    if bias is not None:
        tl.store(dbias + at, tl.sum(of_bias, 0), mask=column < size)


def forward(x, gate, weight, bias, groups, eps, scale, centered, activation, gate_first):
    y = x.new_empty(x.shape)
    if x.numel():
        x, gate, weight, bias = _rows(x), _rows(gate), _packed(weight), _packed(bias)
        sizes, learned, config = _plan(x, weight, bias, groups)
        _forward[triton.cdiv(sizes[0], config["ROWS"]), learned](
            x, gate, weight, bias, y, *sizes, x.stride(0), 0 if gate is None else gate.stride(0),
            EPS=eps, SCALE=scale, CENTERED=centered, SILU=activation == "silu", GATE_FIRST=gate_first, **config,
        )  # fmt: skip
    return y


def backward(dy, x, gate, weight, bias, groups, eps, scale, centered, activation, gate_first):
    """Gradients of x, gate, weight and bias; None for what is None."""
    dx, dgate = (None if z is None else z.new_empty(z.shape) for z in (x, gate))
    if not x.numel():
        return dx, dgate, *(None if z is None else torch.zeros_like(z) for z in (weight, bias))
    dy, x, gate, weight, bias = _rows(dy), _rows(x), _rows(gate), _packed(weight), _packed(bias)
    sizes, learned, config = _plan(x, weight, bias, groups)
    programs = min(triton.cdiv(sizes[0], config["ROWS"]), max(PROGRAMS // learned, 1))
    wide = torch.promote_types(x.dtype, torch.float32)
    dweight, dbias = (None if z is None else z.new_empty(programs, len(z), dtype=wide) for z in (weight, bias))
    _backward[programs, learned](
        dy, x, gate, weight, bias, dx, dgate, dweight, dbias, *sizes,
        dy.stride(0), x.stride(0), 0 if gate is None else gate.stride(0),
        EPS=eps, SCALE=scale, CENTERED=centered, SILU=activation == "silu", GATE_FIRST=gate_first, **config,
    )  # fmt: skip
    return dx, dgate, *(None if z is None else z.sum(0) for z in (dweight, dbias))


def _plan(x, weight, bias, groups):
    """Rows, groups of a token among them, channels of a group, width; groups that learn apart; and the tile."""
    tokens, width = x.shape
    size = width // groups
    # Without anything learned, all groups are alike.
    learned = next((len(z) // size for z in (weight, bias) if z is not None), 1)
    repeats = groups // learned
    columns = triton.next_power_of_2(size)
    rows = min(max(NUMBERS // columns, 1), triton.next_power_of_2(tokens * repeats))
    return (tokens * repeats, repeats, size, width), learned, {
        "ROWS": rows,
        "COLUMNS": columns,
        "SUM": tl.float64 if x.dtype == torch.float64 else tl.float32,
        "enable_fp_fusion": True,
    } | launch_options(min(max(rows * columns // A_WARP, 1), WARPS), 1)  # fmt: skip


def _rows(x):
    """``x`` as ``[token, channel]``, with any distance between tokens."""
    return None if x is None else last_axis_contiguous(x.reshape(-1, x.shape[-1]))


def _packed(x):
    return None if x is None else x.contiguous()
