"""The equation, one token at a time."""

from __future__ import annotations

from typing import Any

import torch

from seqzoo.kernels.backends import accumulation_dtype


def long_conv(x, kernel, state, starts):
    size = kernel.shape[1]
    window = x.new_zeros(len(x), size - 1, x.shape[2]) if state is None else state
    taps = kernel.flip(1).T.to(accumulation_dtype(x))
    outputs = []
    for t, token in enumerate(x.unbind(1)):
        if starts is not None:
            window = window.masked_fill(starts[:, t, None, None], 0)
        window = torch.cat([window, token[:, None].to(window.dtype)], 1)
        outputs.append((window * taps).sum(1))
        window = window[:, 1:]
    return torch.stack(outputs, 1).to(x.dtype), window.clone()  # a view would keep one token more


VARIANTS = {"shorter than the sequence": {"size": 12}, "longer than the sequence": {"size": 300}}


def example(
    batch: int = 2,
    time: int = 37,
    channels: int = 6,
    size: int = 12,
    dtype: torch.dtype = torch.float64,
    seed: int = 0,
) -> dict[str, Any]:
    """Random inputs, as keyword arguments of the operator."""
    random = torch.Generator().manual_seed(seed)
    shapes = {"x": (batch, time, channels), "kernel": (channels, size), "state": (batch, size - 1, channels)}
    return {name: torch.randn(shape, generator=random, dtype=torch.float64).to(dtype) for name, shape in shapes.items()}
