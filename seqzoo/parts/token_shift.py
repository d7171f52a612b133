"""RWKV's token shift, by which each channel glances at the token before, and how much it does at first."""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from seqzoo.kernels.token_shift import token_shift


class ShiftState(NamedTuple):
    """The last token that was read."""

    last: Float[Tensor, "batch dim"]


def glance_back(
    x: Float[Tensor, "batch time dim"],
    mix: Float[Tensor, "glance dim"],
    last: Float[Tensor, "batch dim"] | None,
    starts: Bool[Tensor, "batch time"] | None,
    *,
    more: Float[Tensor, "glance batch time dim"] | None = None,
    backend: str = "auto",
) -> tuple[tuple[Float[Tensor, "batch time dim"], ...], Float[Tensor, "batch dim"]]:
    """``x_t + (x_{t-1} - x_t) * mix`` for each row of ``mix``, where zero precedes a document; and the last token.

    Glances are what projections read: under autocast they come in the dtype that those would cast them to.

    Args:
        x: tokens.
        mix: how far each glance goes back.
        last: the token before the first; None at the start of a sequence.
        starts: True where a new document begins.
        more: added to ``mix``, by token.
        backend: the layer's.
    """
    kind = x.device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype
    glances = token_shift(x, mix, last, starts, more=more, dtype=dtype, backend=backend)
    return glances, x[:, -1].clone()  # a view would keep all of x in memory


def ramp(channels: Tensor, power: float) -> Tensor:
    """``1 - (i/D)^power`` for each of the D channels along the last axis: the first look back, the last hardly do."""
    size = channels.shape[-1]
    return 1 - (torch.arange(size, device=channels.device) / size) ** power
