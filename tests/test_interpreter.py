"""The repaired interpreter computes in bfloat16 what PyTorch does."""

from __future__ import annotations

import pytest
import torch

triton = pytest.importorskip("triton")
tl = pytest.importorskip("triton.language")

pytestmark = pytest.mark.skipif(not triton.knobs.runtime.interpret, reason="a GPU runs the kernels themselves")


@triton.jit
def _arithmetic(x, y, out, SIZE: tl.constexpr):
    at = tl.arange(0, SIZE)
    a, b = tl.load(x + at), tl.load(y + at)
    tl.store(out + at, a + b)
    tl.store(out + SIZE + at, a * b)
    tl.store(out + 2 * SIZE + at, tl.maximum(a, -b))
    tl.store(out + 3 * SIZE + at, tl.where(a < b, a, b))
    tl.store(out + 4 * SIZE + at, tl.abs(a) - 0.3)


@triton.jit
def _convert(x, out, SIZE: tl.constexpr):
    at = tl.arange(0, SIZE)
    tl.store(out + at, tl.load(x + at).to(out.dtype.element_ty))


@triton.jit
def _multiply(x, y, out, SIZE: tl.constexpr):
    at = tl.arange(0, SIZE)[:, None] * SIZE + tl.arange(0, SIZE)
    tl.store(out + at, tl.dot(tl.load(x + at), tl.load(y + at)))


@triton.jit
def _sum(x, out, SIZE: tl.constexpr):
    tl.store(out, tl.sum(tl.load(x + tl.arange(0, SIZE))))


@triton.jit
def _mask(out, limit, SIZE: tl.constexpr):
    at = tl.arange(0, SIZE)
    tl.store(out + at, at, mask=(at > 1) & (limit > 3))


@triton.jit
def _follow(decay, number, next_decay, next_number):
    return decay * next_decay, next_decay * number + next_number


@triton.jit
def _scan(a, b, out, ROWS: tl.constexpr, COLUMNS: tl.constexpr, AXIS: tl.constexpr, REVERSE: tl.constexpr):
    at = tl.arange(0, ROWS)[:, None] * COLUMNS + tl.arange(0, COLUMNS)
    _, total = tl.associative_scan((tl.load(a + at), tl.load(b + at)), AXIS, _follow, reverse=REVERSE)
    tl.store(out + at, total)


def draw(*shape):
    return torch.randn(shape).bfloat16()


def test_arithmetic():
    x, y, ours = draw(64), draw(64), draw(5, 64)
    _arithmetic[(1,)](x, y, ours, 64)
    constant = torch.tensor(0.3).bfloat16()
    truth = torch.stack([x + y, x * y, torch.maximum(x, -y), torch.minimum(x, y), x.abs() - constant])
    torch.testing.assert_close(ours, truth, rtol=0, atol=0)


@pytest.mark.parametrize("other", [torch.float64, torch.float32, torch.float16, torch.int32], ids=str)
def test_casts_round_to_nearest(other):
    x, there, back = (100 * torch.randn(64)).to(other), draw(64), torch.empty(64, dtype=other)
    _convert[(1,)](x, there, 64)
    torch.testing.assert_close(there, x.bfloat16(), rtol=0, atol=0)
    _convert[(1,)](there, back, 64)
    torch.testing.assert_close(back, there.to(other), rtol=0, atol=0)


def test_products_are_summed_in_float32():
    x, y, ours = draw(16, 16), draw(16, 16), torch.empty(16, 16)
    _multiply[(1,)](x, y, ours, 16)
    torch.testing.assert_close(ours, x.float() @ y.float())


def test_refuses_to_sum_in_bfloat16():
    with pytest.raises(Exception, match="cast to float32 first"):
        _sum[(1,)](draw(16), draw(1), 16)


@pytest.mark.parametrize("limit", [3, 4])
def test_a_scalar_comparison_can_mask(limit):
    ours = torch.zeros(4, dtype=torch.int32)
    _mask[(1,)](ours, limit, 4)
    assert ours.tolist() == ([0, 0, 2, 3] if limit > 3 else [0] * 4)


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("axis", [0, 1])
def test_scans(axis, reverse):
    a, b = torch.randn(2, 16, 8, dtype=torch.float64)
    ours = torch.empty_like(b)
    _scan[(1,)](a, b, ours, 16, 8, axis, reverse)
    steps, total = range(b.shape[axis]), 0
    for step in reversed(steps) if reverse else steps:
        total = a.select(axis, step) * total + b.select(axis, step)
        torch.testing.assert_close(ours.select(axis, step), total)
