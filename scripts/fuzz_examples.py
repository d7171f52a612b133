"""Random inputs in legal ranges of functions beside the operators, whose references have none: for fuzz_native.py."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor


class Draw:
    """Draws tensors of normal numbers.

    Args:
        dtype: of those that a layer computes in its own precision; the others are in float32 or better.
        seed: of the numbers.
    """

    def __init__(self, dtype: torch.dtype, seed: int) -> None:
        self.dtype, self.wide_dtype = dtype, torch.promote_types(dtype, torch.float32)
        self.random = torch.Generator().manual_seed(seed)

    def __call__(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self.random, dtype=torch.float64).to(self.dtype)

    def wide(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self.random, dtype=torch.float64).to(self.wide_dtype)


def gated_output(
    batch=2, time=37, heads=3, channels=8, gated=True, skips=True, activation=None, dtype=torch.float64, seed=0
):
    draw, shape = Draw(dtype, seed), (batch, time, heads * channels)
    inputs = {"x": draw(*shape)} | ({"gate": draw(*shape)} if gated else {})
    inputs |= {"skip": draw(*shape), "weight": draw.wide(batch, time, heads)} if skips else {}
    return inputs | {"activation": activation}


def token_shift(
    batch=2, time=37, glances=3, dim=8, goes_on=True, more=False, narrow=False, dtype=torch.float64, seed=0
):
    draw = Draw(dtype, seed)
    inputs = {"x": draw(batch, time, dim), "mix": draw.wide(glances, dim)}
    inputs |= {"last": draw(batch, dim)} if goes_on else {}
    inputs |= {"more": draw(glances, batch, time, dim)} if more else {}
    return inputs | ({"dtype": torch.bfloat16} if narrow else {})


def erasing_keys(batch=2, time=37, heads=3, key=8, dtype=torch.float64, seed=0):
    draw, width = Draw(dtype, seed), heads * key
    inputs = {name: draw(batch, time, width) for name in ("r", "k", "decay", "rate")}
    inputs |= {name: draw.wide(width) for name in ("decay_bias", "rate_bias", "key_scale", "key_rate")}
    return inputs | {"bonus": draw.wide(heads, key)}


def turned_keys(
    batch=2, time=37, groups=1, heads=3, key=8, pairs=4, channels=8, goes_on=True, dtype=torch.float64, seed=0
):
    draw, pairs = Draw(dtype, seed), max(1, min(pairs, key // 2))
    inputs = {"write": draw(batch, time, groups, key), "read": draw(batch, time, groups, key)}
    inputs |= {"write_bias": draw.wide(heads, key), "read_bias": draw.wide(heads, key)}
    inputs |= {"turn": draw.wide(batch, time, pairs), "step": draw.wide(batch, time, heads).exp()}
    inputs |= {"gain": draw.wide(batch, time, heads), "values": draw(batch, time, heads, channels)}
    if goes_on:
        inputs |= {"angle": draw.wide(batch, heads, pairs).abs(), "key": draw.wide(batch, heads, key)}
        inputs |= {"value": draw(batch, heads, channels)}
    return inputs


def recurrence_gates(batch=2, time=37, heads=1, size=8, begins=True, dtype=torch.float64, seed=0):
    draw, channels = Draw(dtype, seed), heads * size
    inputs = {"u": draw(batch, time, channels), "gates": draw(heads, batch, time, 2 * size)}
    inputs |= {"recurrence_bias": draw.wide(channels), "input_bias": draw.wide(channels)}
    inputs |= {"rate": draw.wide(channels).abs()}
    return inputs | ({"begins": torch.rand(batch, time, generator=draw.random) < 0.2} if begins else {})


def taylor_features(batch=2, time=37, dim=8, dtype=torch.float64, seed=0):
    return {"x": Draw(dtype, seed)(batch, time, dim)}


def split_short_conv(
    batch=2, time=37, first=8, second=3, third=1, size=4, bias=True, activation=None, dtype=torch.float64, seed=0
):
    draw, widths = Draw(dtype, seed), [width for width in (first, second, third) if width]
    channels = sum(widths)
    inputs = {"x": draw(batch, time, channels), "widths": widths, "weight": draw(channels, size)}
    inputs |= {"bias": draw(channels)} if bias else {}
    return inputs | {"state": draw(batch, size - 1, channels), "activation": activation}


class Other(NamedTuple):
    """As an operator's reference has them."""

    example: Callable[..., dict[str, Any]]
    VARIANTS: dict[str, dict[str, Any]]


OTHERS = {
    "gated_output": Other(
        gated_output,
        {
            "skip": {"gated": False},
            "gate": {"skips": False},
            "silu": {"activation": "silu", "skips": False},
            "sigmoid": {"activation": "sigmoid", "skips": False},
            "gelu": {"activation": "gelu", "skips": False},
            "skip and gate": {},
            "skip and silu": {"activation": "silu"},
        },
    ),
    "token_shift": Other(
        token_shift,
        {"alone": {"goes_on": False}, "last": {}, "more": {"more": True}, "narrow": {"more": True, "narrow": True}},
    ),
    "erasing_keys": Other(erasing_keys, {"all": {}}),
    "turned_keys": Other(turned_keys, {"alone": {"goes_on": False}, "going on": {}}),
    "recurrence_gates": Other(recurrence_gates, {"alone": {"begins": False}, "begins": {}}),
    "taylor_features": Other(taylor_features, {"all": {}}),
    "split_short_conv": Other(split_short_conv, {"no bias": {"bias": False}, "silu": {"activation": "silu"}}),
}
