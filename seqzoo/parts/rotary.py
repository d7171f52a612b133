"""Rotary positions (Su et al. 2021, https://arxiv.org/abs/2104.09864): pairs of channels turn with the position."""

from __future__ import annotations

import math
from typing import Literal, NamedTuple, get_args

import torch
from jaxtyping import Float, Int
from torch import Tensor

RopeScaling = Literal["none", "linear", "ntk", "yarn", "llama3"]
RopeLayout = Literal["halves", "neighbours"]

# Turns within the original length: of YaRN, above and below which pairs are kept or stretched; the same of Llama 3.
YARN_FAST, YARN_SLOW = 32, 1
LLAMA3_FAST, LLAMA3_SLOW = 4, 1


class Rotary(NamedTuple):
    """How queries and keys turn: a part of a layer, checked once.

    Args:
        size: channels that turn; even.
        base: larger bases turn the last pairs more slowly; above 1.
        layout: pairs are (i, i + size/2), ``halves``, as in Llama, or (2i, 2i + 1), ``neighbours``, as in GPT-J.
        scaling: how angles shrink for documents ``factor`` times as long as those of training: ``linear`` all alike
            (https://arxiv.org/abs/2306.15595), ``ntk`` the slower the more, by a larger base, ``yarn`` only pairs that
            do not turn often (https://arxiv.org/abs/2309.00071), which also makes logits larger, ``llama3`` the same
            with bounds of its own (https://arxiv.org/abs/2407.21783).
        factor: 1 or more.
        original_length: tokens in the documents of training, which ``yarn`` and ``llama3`` need.
    """

    size: int
    base: float = 10_000.0
    layout: RopeLayout = "halves"
    scaling: RopeScaling = "none"
    factor: float = 1.0
    original_length: int | None = None

    def check(self) -> Rotary:
        """Itself; raise ValueError unless the settings fit together."""
        if self.size < 2 or self.size % 2:
            raise ValueError(
                f"head_dim={self.size}, channels of a head that turn, is odd or 0; rotary positions need pairs"
            )
        if not 1 < self.base < math.inf:
            raise ValueError(f"rope_base={self.base}: expected a finite number above 1")
        for name, value, kinds in (
            ("rope_layout", self.layout, get_args(RopeLayout)),
            ("rope_scaling", self.scaling, get_args(RopeScaling)),
        ):
            if value not in kinds:
                raise ValueError(f"{name}={value!r}: use {', '.join(map(repr, kinds))}")
        if not 1 <= self.factor < math.inf or (self.factor != 1 and self.scaling == "none"):
            raise ValueError(
                f"rope_factor={self.factor} with rope_scaling={self.scaling!r}: expected 1 or more, and more than 1 "
                "only where a scaling uses it"
            )
        needs = self.scaling in ("yarn", "llama3")
        if needs != (self.original_length is not None) or (self.original_length or 1) < 1:
            raise ValueError(
                f"rope_original_length={self.original_length} with rope_scaling={self.scaling!r}: expected a number of "
                "tokens for yarn and llama3, and None for the others"
            )
        if self.scaling == "ntk" and self.size == 2:
            raise ValueError("rope_scaling='ntk' needs heads of more than 2 channels: it slows pairs by their place")
        return self

    def unused(self, where: str) -> None:
        """Nothing, for a layer that does not turn, as the setting ``where`` says.

        Raises:
            ValueError: a setting is not its default, as if it did something.
        """
        for name, default in self._field_defaults.items():
            value = getattr(self, name)
            if value != default:
                raise ValueError(
                    f"rope_{name}={value!r} with {where}: nothing turns; use {default!r}, or rotary positions"
                )

    def turn(
        self, x: Float[Tensor, "batch time head key"], positions: Int[Tensor, "rows time"]
    ) -> Float[Tensor, "batch time head key"]:
        """Turn the first ``size`` channels of each head by ``positions``, of which there may be one row for all."""
        dtype = torch.promote_types(x.dtype, torch.float32)
        angle = (positions[..., None] * self.frequencies(x.device, dtype))[:, :, None]
        cos, sin = angle.cos(), angle.sin()
        if self.scaling == "yarn":
            stretch = 0.1 * math.log(self.factor) + 1
            cos, sin = cos * stretch, sin * stretch
        turning, rest = x[..., : self.size].to(dtype), x[..., self.size :]
        turned = _turn(turning, cos, sin, self.layout).to(x.dtype)
        return torch.cat([turned, rest], -1) if rest.shape[-1] else turned

    def frequencies(self, device: torch.device, dtype: torch.dtype) -> Float[Tensor, " pair"]:
        """The angle of each pair from token to token: ``base^(-2i/size)``, scaled."""
        base = self.base
        if self.scaling == "ntk":
            base *= self.factor ** (self.size / (self.size - 2))
        pair = torch.arange(self.size // 2, dtype=dtype, device=device)
        plain = base ** -(2 * pair / self.size)
        if self.scaling in ("none", "ntk"):
            return plain
        slow = plain / self.factor
        if self.scaling == "linear":
            return slow
        assert self.original_length is not None
        if self.scaling == "yarn":
            low, high = (self._pair_that_turns(turns) for turns in (YARN_FAST, YARN_SLOW))
            low, high = max(math.floor(low), 0), min(math.ceil(high), self.size - 1)
            kept = 1 - ((pair - low) / max(high - low, 1e-3)).clamp(0, 1)
        else:
            turns = self.original_length * plain / (2 * math.pi)
            kept = ((turns - LLAMA3_SLOW) / (LLAMA3_FAST - LLAMA3_SLOW)).clamp(0, 1)
        return slow * (1 - kept) + plain * kept

    def _pair_that_turns(self, times: float) -> float:
        """The place of the pair that turns so many times within the original length."""
        assert self.original_length is not None
        return self.size * math.log(self.original_length / (2 * math.pi * times)) / (2 * math.log(self.base))


def rotate_neighbours(
    x: Float[Tensor, "batch time head key"], positions: Int[Tensor, "rows time"], base: float
) -> Float[Tensor, "batch time head key"]:
    """Turn channel pair (2i, 2i + 1) at position p by ``p * base^(-i/(key/2 - 1))``, as in RetNet.

    Args:
        x: queries or keys; ``key`` must be even.
        positions: one row for each of the batch, or a single row for all.
        base: how many times slower than the first pair the last one turns.
    """
    dtype = torch.promote_types(x.dtype, torch.float32)
    frequency = base ** -torch.linspace(0, 1, x.shape[-1] // 2, dtype=dtype, device=x.device)
    angle = (positions[..., None] * frequency)[:, :, None]
    return _turn(x.to(dtype), angle.cos(), angle.sin(), "neighbours").to(x.dtype)


def _turn(x: Tensor, cos: Tensor, sin: Tensor, layout: RopeLayout) -> Tensor:
    """All pairs of channels, with the cosine and sine of their angles ``[rows, time, 1, pair]``."""
    if layout == "halves":
        first, second = x.chunk(2, -1)
        return torch.cat([first * cos - second * sin, second * cos + first * sin], -1)
    first, second = x.unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack([first * cos - second * sin, second * cos + first * sin], -1).flatten(-2)
