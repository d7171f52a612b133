"""What a run says on the terminal: one line about the model, one bar, no warnings that nobody can act on."""

from __future__ import annotations

from typing import Any

import lightning as L
from lightning.pytorch.callbacks import RichProgressBar

from seqzoo.announce import announce
from seqzoo.evals.report import bytes_text


class ProgressBar(RichProgressBar):
    """Lightning's rich bar, counting optimizer steps instead of epochs, which training data without an end has not."""

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        net = pl_module.net
        state = bytes_text(net.state_bytes(1024))
        announce(
            f"{' '.join(net.names)}: {net.num_parameters():,} parameters, {state} of state a sequence after 1,024 tokens"
        )

    def _get_train_description(self, current_epoch: int) -> str:
        return "Training"

    def get_metrics(self, trainer: L.Trainer, pl_module: L.LightningModule) -> dict[str, Any]:
        shown = super().get_metrics(trainer, pl_module)
        return {name: value for name, value in shown.items() if name != "v_num"}
