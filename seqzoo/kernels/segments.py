"""Long sequences in segments, each computed again in the backward pass, so that only states are kept between them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

SEGMENT = 1024

State = TypeVar("State")


def by_segments(
    run: Callable[..., tuple[Tensor, State]],
    inputs: Sequence[Tensor | None],
    state: State | None,
    starts: Tensor | None,
    size: int = SEGMENT,
) -> tuple[Tensor, State]:
    """``run(*inputs, state, starts)``; more than ``size`` tokens go segment by segment, with the state carried.

    Args:
        run: maps inputs, a state or None, and starts or None to outputs ``[batch, time, ...]`` and the next state. It
            may close over tensors without a time axis, which get their gradients all the same.
        inputs: tensors ``[batch, time, ...]``, or None.
        state: what enters the first segment, a tensor or a tuple of them.
        starts: ``[batch, time]``.
        size: tokens in a segment, a multiple of the chunk.
    """
    pieces: list[Any] = [x if x is None else x.split(size, 1) for x in (*inputs, starts)]
    count = max(len(piece) for piece in pieces if piece is not None)
    if count == 1:
        return run(*inputs, state, starts)
    # One split, not an index a segment: the backward of an index fills a tensor of the whole length with zeros.
    outputs = []
    for *piece, begins in zip(*([None] * count if piece is None else piece for piece in pieces), strict=True):
        if torch.is_grad_enabled():
            y, state = checkpoint(run, *piece, state, begins, use_reentrant=False, preserve_rng_state=False)
        else:
            y, state = run(*piece, state, begins)
        outputs.append(y)
    assert state is not None
    return torch.cat(outputs, 1), state
