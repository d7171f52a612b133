"""What attention remembers: a buffer of all keys and values that doubles when full, or a ring of the last ones.

Both are states (tensors only, batch first). ``position`` counts the tokens of the open document, row by row.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor


class KeyValueBuffer(NamedTuple):
    """All keys and values so far, in order; slots past ``filled`` are room for more.

    ``filled`` has a last axis of size 0: its shape, not its content, says how many slots are in use, so that no
    number has to be read back from the device. ``log_forget`` has a last axis of size 0 where nothing is forgotten.
    """

    keys: Float[Tensor, "batch slot head key"]
    values: Float[Tensor, "batch slot head value"]
    log_forget: Float[Tensor, "batch slot heads"]
    position: Int[Tensor, " batch"]
    filled: Float[Tensor, "batch used 0"]

    @classmethod
    def after(
        cls,
        past: KeyValueBuffer | None,
        keys: Tensor,
        values: Tensor,
        position: Tensor,
        log_forget: Tensor | None = None,
    ) -> KeyValueBuffer:
        """The memory once more is read; in place, growing by doubling, when autograd is off."""
        if log_forget is None:
            log_forget = keys.new_empty(*keys.shape[:2], 0)
        if past is not None:
            past.check(keys.shape[2:], values.shape[2:], log_forget.shape[2:])
        used = 0 if past is None else past.filled.shape[1]
        filled = keys.new_empty(len(keys), used + keys.shape[1], 0)
        if past is None:
            # As views of a projection's output they would keep all of it in memory.
            keys, values = keys.clone(), values.clone()
        else:
            keys, values = _extended(past.keys, used, keys), _extended(past.values, used, values)
            log_forget = _extended(past.log_forget, used, log_forget)
        return cls(keys, values, log_forget, position, filled)

    def check(self, keys: Sequence[int], values: Sequence[int], log_forget: Sequence[int]) -> None:
        """Raise ValueError unless it holds numbers of these shapes in a slot: of keys, values and what is forgotten."""
        filled = self.filled.shape
        if len(filled) != 3 or filled[2]:
            raise ValueError(
                f"KeyValueBuffer: state.filled has shape {tuple(filled)}; expected (batch, slots in use, 0)"
            )
        for name, kept, shape in zip(
            ("keys", "values", "log_forget"), self[:3], (keys, values, log_forget), strict=True
        ):
            if kept.ndim < 2 or kept.shape[2:] != shape or kept.shape[1] < filled[1] or not kept.is_floating_point():
                raise ValueError(
                    f"KeyValueBuffer: state.{name} is {kept.dtype} {tuple(kept.shape)}; expected floating point "
                    f"(batch, {filled[1]} or more, {', '.join(map(str, shape))})"
                )

    def used(self, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
        """Keys and values as ``dtype``, and logarithms of what is forgotten, in the slots that are filled."""
        count = self.filled.shape[1]
        return self.keys[:, :count].to(dtype), self.values[:, :count].to(dtype), self.log_forget[:, :count]


def first_slots(positions: Int[Tensor, "batch time"], slots: int) -> Int[Tensor, "batch time"]:
    """The slot where the document of each of the last ``time`` tokens begins, if all of it is in the ``slots``."""
    time = positions.shape[1]
    return torch.arange(slots - time, slots, device=positions.device) - positions


class KeyValueRing(NamedTuple):
    """The first ``sinks`` keys of the open document and its last ``window`` ones.

    Slots fill from the last one on. Counted from there, position p stands in slot p if it is a sink, else in slot
    ``sinks + (p - sinks) mod window``; what is still empty comes first, and is zero.
    """

    keys: Float[Tensor, "batch slot head key"]
    values: Float[Tensor, "batch slot head value"]
    position: Int[Tensor, " batch"]

    def check(self, slots: int, keys: Sequence[int], values: Sequence[int]) -> None:
        """Raise ValueError unless it has so many slots, and in each keys and values of these shapes."""
        for name, kept, shape in zip(("keys", "values"), self[:2], (keys, values), strict=True):
            if kept.shape[1:] != (slots, *shape) or not kept.is_floating_point():
                raise ValueError(
                    f"KeyValueRing: state.{name} is {kept.dtype} {tuple(kept.shape)}; expected floating point "
                    f"(batch, {slots}, {', '.join(map(str, shape))})"
                )

    def empty(self) -> Int[Tensor, " batch"]:
        """How many slots in front hold nothing yet."""
        return (self.keys.shape[1] - self.position).clamp(min=0)

    def before(
        self, keys: Tensor, values: Tensor, positions: Int[Tensor, "batch time"], window: int, sinks: int
    ) -> tuple[Tensor, Tensor, Int[Tensor, "batch time"]]:
        """What it holds, oldest first, in front of new ``keys`` and ``values``; and where each token's document begins.

        Slots that hold nothing come first. What stands between sinks and window is gone, so that a slot's distance to
        a token is right within the window, and that to the first slot among the sinks.
        """
        held = held_positions(self.position, window, sinks)
        order = held.argsort(-1)
        rows = torch.arange(len(held), device=held.device)[:, None]
        keys, values = (
            torch.cat([old[rows, order].to(new.dtype), new], 1)
            for old, new in ((self.keys, keys), (self.values, values))
        )
        goes_on = positions == self.position[:, None] + torch.arange(positions.shape[1], device=held.device)
        first = torch.where(goes_on, self.empty()[:, None], first_slots(positions, keys.shape[1]))
        return keys, values, first

    @classmethod
    def after(
        cls, past: KeyValueRing | None, keys: Tensor, values: Tensor, position: Tensor, window: int, sinks: int
    ) -> KeyValueRing:
        """The ring once more ``keys`` and ``values`` are read and the open document has ``position`` tokens."""
        if past is not None:
            past.check(sinks + window, keys.shape[2:], values.shape[2:])
        held = held_positions(position, window, sinks)
        token = keys.shape[1] - position[:, None] + held
        if past is None:
            source = token.clamp(min=0)
        else:
            slots = torch.arange(held.shape[1], device=held.device)
            source = torch.where((token >= 0) & (held >= 0), token + held.shape[1], slots)
            keys = torch.cat([past.keys, keys.to(past.keys.dtype)], 1)
            values = torch.cat([past.values, values.to(past.values.dtype)], 1)
        rows = torch.arange(len(held), device=held.device)[:, None]
        empty = (held < 0)[..., None, None]
        keys, values = keys[rows, source].masked_fill(empty, 0), values[rows, source].masked_fill(empty, 0)
        return cls(keys, values, position)

    def step(self, key: Tensor, value: Tensor, position: Tensor, window: int, sinks: int) -> KeyValueRing:
        """``after`` for one token ``[batch 1 head key]``; in place when autograd is off."""
        self.check(sinks + window, key.shape[2:], value.shape[2:])
        last = position - 1
        slot = sinks + window - 1 - torch.where(last < sinks, last, sinks + (last - sinks) % window)
        rows = torch.arange(len(slot), device=slot.device)
        write = torch.index_put if torch.is_grad_enabled() else torch.Tensor.index_put_
        keys = write(self.keys, (rows, slot), key[:, 0].to(self.keys.dtype))
        values = write(self.values, (rows, slot), value[:, 0].to(self.values.dtype))
        return KeyValueRing(keys, values, position)


def held_positions(position: Int[Tensor, " batch"], window: int, sinks: int) -> Int[Tensor, "batch slot"]:
    """The position that each slot of a ring holds once ``position`` tokens of the document are read; -1 for none."""
    slot = torch.arange(sinks + window, device=position.device).flip(0)
    last = position[:, None] - 1
    recent = last - (last - slot) % window
    return torch.where(slot < sinks, torch.where(slot <= last, slot, -1), torch.where(recent >= sinks, recent, -1))


def _extended(old: Tensor, used: int, new: Tensor) -> Tensor:
    """The first ``used`` slots of ``old`` with ``new`` behind them, and room for more when autograd is off."""
    total, new = used + new.shape[1], new.to(old.dtype)
    if torch.is_grad_enabled():
        return torch.cat([old[:, :used], new], 1)
    if total > old.shape[1]:
        grown = old.new_empty(len(old), max(2 * old.shape[1], total), *old.shape[2:])
        grown[:, :used] = old[:, :used]
        old = grown
    old[:, used:total] = new
    return old
