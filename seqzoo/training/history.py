"""Remembers a metric at every validation, for tables and plots made after the run."""

from __future__ import annotations

import lightning as L


class History(L.Callback):
    """Collects ``(optimizer step, value)`` of one logged metric.

    Args:
        metric: its name, such as ``val/accuracy``.
    """

    def __init__(self, metric: str) -> None:
        self.metric = metric
        self.values: list[tuple[int, float]] = []

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if not trainer.sanity_checking:
            self.values.append((trainer.global_step, float(trainer.callback_metrics[self.metric])))
