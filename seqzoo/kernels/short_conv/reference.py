"""The equation, one token at a time."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F


def short_conv(x, weight, bias, state, starts, activation):
    size = weight.shape[1]
    window = x.new_zeros(len(x), size - 1, x.shape[2]) if state is None else state
    outputs = []
    for t, token in enumerate(x.unbind(1)):
        if starts is not None:
            window = window.masked_fill(starts[:, t, None, None], 0)
        window = torch.cat([window, token[:, None].to(window.dtype)], 1)
        y = (window * weight.T).sum(1)
        outputs.append(y if bias is None else y + bias)
        window = window[:, 1:]
    y = torch.stack(outputs, 1)
    # The state is a copy, for the oldest token would stay in memory behind a view.
    return (F.silu(y) if activation == "silu" else y).to(x.dtype), window.clone()


VARIANTS = {"no activation": {}, "silu": {"activation": "silu"}, "no bias": {"bias": False}}


def example(
    batch: int = 2,
    time: int = 37,
    channels: int = 6,
    size: int = 4,
    bias: bool = True,
    activation: str | None = None,
    dtype: torch.dtype = torch.float64,
    seed: int = 0,
) -> dict[str, Any]:
    """Random inputs in legal ranges, as keyword arguments of the operator."""
    random = torch.Generator().manual_seed(seed)
    shapes = {
        "x": (batch, time, channels),
        "weight": (channels, size),
        "bias": (channels,),
        "state": (batch, size - 1, channels),
    }
    inputs = {name: torch.randn(shape, generator=random, dtype=torch.float64) for name, shape in shapes.items()}
    if not bias:
        del inputs["bias"]
    return {name: tensor.to(dtype) for name, tensor in inputs.items()} | {"activation": activation}
