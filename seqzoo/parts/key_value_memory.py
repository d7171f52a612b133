"""What attention remembers: a buffer of all keys and values that doubles when full, or a ring of the last ones.

Both are states (tensors only, batch first). ``position`` counts the tokens of the open document, row by row.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor


class KeyValueBuffer(NamedTuple):
    """All keys and values so far, in order; slots past ``filled`` are room for more.

    ``filled`` has a last axis of size 0: its shape, not its content, says how many slots are in use, so that no
    number has to be read back from the device.
    """

    keys: Float[Tensor, "batch slot head key"]
    values: Float[Tensor, "batch slot head key"]
    position: Int[Tensor, " batch"]
    filled: Float[Tensor, "batch used 0"]

    def append(self, keys: Tensor, values: Tensor, position: Tensor) -> KeyValueBuffer:
        """The memory with new keys and values at its end; in place, growing by doubling, when autograd is off."""
        used = self.filled.shape[1]
        total = used + keys.shape[1]
        filled = keys.new_empty(len(keys), total, 0)
        if torch.is_grad_enabled():
            keys = torch.cat([self.keys[:, :used], keys], 1)
            return KeyValueBuffer(keys, torch.cat([self.values[:, :used], values], 1), position, filled)
        old_keys, old_values = self.keys, self.values
        if total > old_keys.shape[1]:
            slots = max(2 * old_keys.shape[1], total)
            old_keys, old_values = _with_room(old_keys[:, :used], slots), _with_room(old_values[:, :used], slots)
        old_keys[:, used:total] = keys
        old_values[:, used:total] = values
        return KeyValueBuffer(old_keys, old_values, position, filled)

    def visible(self, positions: Int[Tensor, "batch time"]) -> Bool[Tensor, "batch time used"]:
        """Which filled slots the last ``time`` tokens see: themselves and what came before in their document."""
        used, time = self.filled.shape[1], positions.shape[1]
        slot = torch.arange(used, device=positions.device)
        own = slot[used - time :, None]
        return (slot <= own) & (slot >= own - positions[..., None])


class KeyValueRing(NamedTuple):
    """The first ``sinks`` keys of the open document and its last ``window`` ones.

    Position p stands in slot p if it is a sink, else in slot ``sinks + (p - sinks) mod window``; all else is zero.
    """

    keys: Float[Tensor, "batch slot head key"]
    values: Float[Tensor, "batch slot head key"]
    position: Int[Tensor, " batch"]

    @classmethod
    def after(
        cls, past: KeyValueRing | None, keys: Tensor, values: Tensor, position: Tensor, window: int, sinks: int
    ) -> KeyValueRing:
        """The ring once more ``keys`` and ``values`` are read and the open document has ``position`` tokens."""
        held = held_positions(position, window, sinks)
        token = keys.shape[1] - position[:, None] + held
        if past is None:
            source = token.clamp(min=0)
        else:
            slots = torch.arange(held.shape[1], device=held.device)
            source = torch.where((token >= 0) & (held >= 0), token + held.shape[1], slots)
            keys, values = torch.cat([past.keys, keys], 1), torch.cat([past.values, values], 1)
        rows = torch.arange(len(held), device=held.device)[:, None]
        empty = (held < 0)[..., None, None]
        keys, values = keys[rows, source].masked_fill(empty, 0), values[rows, source].masked_fill(empty, 0)
        return cls(keys, values, position)

    def step(self, key: Tensor, value: Tensor, position: Tensor, window: int, sinks: int) -> KeyValueRing:
        """``after`` for one token ``[batch 1 head key]``; in place when autograd is off."""
        last = position - 1
        slot = torch.where(last < sinks, last, sinks + (last - sinks) % window)
        rows = torch.arange(len(slot), device=slot.device)
        write = torch.index_put if torch.is_grad_enabled() else torch.Tensor.index_put_
        keys, values = write(self.keys, (rows, slot), key[:, 0]), write(self.values, (rows, slot), value[:, 0])
        return KeyValueRing(keys, values, position)


def held_positions(position: Int[Tensor, " batch"], window: int, sinks: int) -> Int[Tensor, "batch slot"]:
    """The position that each slot of a ring holds once ``position`` tokens of the document are read; -1 for none."""
    slot = torch.arange(sinks + window, device=position.device)
    last = position[:, None] - 1
    recent = last - (last - slot) % window
    return torch.where(slot < sinks, torch.where(slot <= last, slot, -1), torch.where(recent >= sinks, recent, -1))


def _with_room(x: Tensor, slots: int) -> Tensor:
    grown = x.new_empty(x.shape[0], slots, *x.shape[2:])
    grown[:, : x.shape[1]] = x
    return grown
