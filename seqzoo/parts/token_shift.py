"""RWKV's token shift, by which each channel glances at the token before, and what starts by a layer's depth."""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor


class ShiftState(NamedTuple):
    """The last token that was read."""

    last: Float[Tensor, "batch dim"]


def token_shift(
    x: Float[Tensor, "batch time dim"],
    last: Float[Tensor, "batch dim"] | None,
    starts: Bool[Tensor, "batch time"] | None,
) -> tuple[Float[Tensor, "batch time dim"], Float[Tensor, "batch dim"]]:
    """The way back from each token to the one before, ``x_{t-1} - x_t``, where zero precedes a document; and the last.

    Args:
        x: tokens.
        last: the token before the first; None at the start of a sequence.
        starts: True where a new document begins.
    """
    first = torch.zeros_like(x[:, :1]) if last is None else last[:, None].to(x.dtype)
    before = torch.cat([first, x[:, :-1]], 1)
    if starts is not None:
        before = before.masked_fill(starts[..., None], 0)
    return before - x, x[:, -1].clone()  # a view would keep all of x in memory


def depth_ratios(layer_index: int, num_layers: int) -> tuple[float, float]:
    """How deep a layer stands: from 0 to 1, and from 1 down to almost 0; RWKV's layers start by both.

    Raises:
        ValueError: ``layer_index`` is not from 0 to ``num_layers - 1``.
    """
    if not 0 <= layer_index < num_layers:
        raise ValueError(f"layer_index={layer_index}: expected 0 or more, and less than num_layers={num_layers}")
    return layer_index / max(num_layers - 1, 1), 1 - layer_index / num_layers


def ramp(channels: Tensor, power: float) -> Tensor:
    """``1 - (i/D)^power`` for each of the D channels along the last axis: the first look back, the last hardly do."""
    size = channels.shape[-1]
    return 1 - (torch.arange(size, device=channels.device) / size) ** power
