"""Random number generators that go on where a checkpoint left them, so that a resumed run is the same run."""

from __future__ import annotations

import random
from typing import Any

import lightning as L
import numpy
import torch


class RandomState(L.Callback):
    """Saves the state of Python's, NumPy's and torch's generators in every checkpoint, and restores it on resume.

    With several devices the checkpoint holds the main process's generators; the others draw from their own seeds.
    """

    def __init__(self) -> None:
        self._loaded: dict[str, Any] | None = None

    def state_dict(self) -> dict[str, Any]:
        legacy: dict[str, Any] = dict(numpy.random.get_state(legacy=False))  # pyright: ignore[reportArgumentType]
        legacy["state"] = {"key": legacy["state"]["key"].tolist(), "pos": int(legacy["state"]["pos"])}
        return {
            "python": random.getstate(),
            "numpy": legacy,
            "torch": torch.get_rng_state(),
            "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._loaded = state_dict

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if self._loaded is None:
            return
        version, internal, gauss = self._loaded["python"]
        random.setstate((version, tuple(internal), gauss))
        numpy.random.set_state(self._loaded["numpy"])
        torch.set_rng_state(self._loaded["torch"].cpu())
        if torch.cuda.is_available() and len(self._loaded["cuda"]) == torch.cuda.device_count():
            torch.cuda.set_rng_state_all([state.cpu() for state in self._loaded["cuda"]])
        self._loaded = None
