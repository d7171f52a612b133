"""What a run says on the terminal: one line about the model, one bar, no warnings that nobody can act on."""

from __future__ import annotations

from typing import Any, cast

import lightning as L
from lightning.pytorch.callbacks import RichProgressBar

from seqzoo.announce import announce
from seqzoo.evals.report import bytes_text
from seqzoo.training.language_modeling import LanguageModeling


class ProgressBar(RichProgressBar):
    """Lightning's rich bar, counting optimizer steps instead of epochs, which training data without an end has not."""

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        net = cast(LanguageModeling, pl_module).net
        state = bytes_text(net.state_bytes(1024))
        announce(f"{' '.join(net.names)}: {net.num_parameters():,} parameters, a state of {state} after 1,024 tokens")

    def _get_train_description(self, current_epoch: int) -> str:
        return "Training"

    def get_metrics(self, trainer: L.Trainer, pl_module: L.LightningModule) -> dict[str, Any]:
        shown = super().get_metrics(trainer, pl_module)
        return {name: value for name, value in shown.items() if name != "v_num"}
