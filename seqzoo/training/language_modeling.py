"""Next-token training of a language model in Lightning, on text or on a synthetic task.

A batch is a dict: ``tokens`` and ``labels`` ``[batch, time]`` (-100 where nothing is asked), and ``starts`` where
documents are packed. Only the labelled positions reach the head.
"""

from __future__ import annotations

import functools
import json
import math
import time
from typing import Any

import lightning as L
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves
from torchmetrics import MeanMetric

from seqzoo.evals.recall import RecallAccuracy
from seqzoo.models.checkpoint import CONFIG_KEY, check_weights, lightning_weights
from seqzoo.models.language_model import IGNORED, LanguageModel
from seqzoo.training.optimizer_groups import parameter_groups
from seqzoo.training.schedules import warmup_cosine

GRADIENTS_KEY = "accumulated_gradients"


class LanguageModeling(L.LightningModule):
    """AdamW, warm-up and cosine, on the mean cross-entropy of the labelled positions.

    Logs ``train/loss`` and ``val/loss`` in nats a labelled token, ``val/bits`` in bits, ``val/accuracy`` (the mean over
    rows of the share of labelled positions that are right), tokens a second, gradient norm and state norms.

    Args:
        net: the model.
        learning_rate: peak rate.
        weight_decay: of matrices; norms, biases, decay rates and other vectors never decay.
        betas: AdamW's averaging constants.
        warmup_steps: optimizer steps of linear warm-up.
        final_learning_rate: last rate over peak rate, 0 to 1; the cosine reaches it at ``trainer.max_steps``.
        compile: run the model through ``torch.compile``; pays from a few thousand steps on.

    Raises:
        ValueError: a setting is out of range, ``trainer.max_steps`` is missing, or the loss stops being a number.
    """

    def __init__(
        self,
        net: LanguageModel,
        *,
        learning_rate: float = 2e-3,
        weight_decay: float = 0.1,
        betas: tuple[float, float] = (0.9, 0.95),
        warmup_steps: int = 50,
        final_learning_rate: float = 0.1,
        compile: bool = False,
    ) -> None:
        super().__init__()
        if learning_rate <= 0:
            raise ValueError(f"learning_rate={learning_rate}: use a number above 0, such as 2e-3")
        if weight_decay < 0:
            raise ValueError(f"weight_decay={weight_decay}: use 0 or more")
        if not all(0 <= beta < 1 for beta in betas):
            raise ValueError(f"betas={betas}: use two numbers from 0 to below 1")
        if warmup_steps < 0:
            raise ValueError(f"warmup_steps={warmup_steps}: use 0 or more")
        if not 0 <= final_learning_rate <= 1:
            raise ValueError(f"final_learning_rate={final_learning_rate}: a share of the peak rate, 0 to 1")
        self.net = net
        self.learning_rate, self.weight_decay, self.betas = learning_rate, weight_decay, betas
        self.warmup_steps, self.final_learning_rate = warmup_steps, final_learning_rate
        self._hidden = torch.compile(net.hidden) if compile else net.hidden
        self._scores: dict[str, _Score] = {}
        self._clock: tuple[float, int] | None = None
        self._finite: Tensor | None = None
        self._accumulating = False
        self._accumulated: dict[str, Tensor] = {}

    # Training

    def on_fit_start(self) -> None:
        check_schedule(self.trainer)

    def on_train_start(self) -> None:
        for name, gradient in self._accumulated.items():
            parameter = self.net.get_parameter(name)
            parameter.grad = gradient.to(parameter)
        self._accumulated = {}

    def configure_optimizers(self) -> dict[str, Any]:
        groups = parameter_groups(self.net, self.weight_decay)
        optimizer = torch.optim.AdamW(groups, lr=self.learning_rate, betas=self.betas)
        factor = functools.partial(
            warmup_cosine,
            warmup_steps=self.warmup_steps,
            total_steps=self.trainer.max_steps,
            final_ratio=self.final_learning_rate,
        )
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        loss, _, state = self._loss(batch)
        finite = loss.detach().isfinite()
        self._finite = finite if self._finite is None else self._finite & finite
        self.log("train/loss", loss, prog_bar=True)
        if self._logs():
            self._log_pace(batch)
            self._log_state(state)
        return loss

    def on_after_backward(self) -> None:
        self._accumulating = True

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        self._accumulating = False
        if self._logs():
            self._check_finite()
            gradients = [p.grad for p in self.net.parameters() if p.grad is not None]
            self.log("train/gradient_norm", torch.nn.utils.get_total_norm(gradients))

    def _logs(self) -> bool:
        """Whether the step in progress is one of those that Lightning writes down, at their ends."""
        every = self.trainer.log_every_n_steps  # pyright: ignore[reportAttributeAccessIssue]
        return (self.global_step + 1) % every == 0

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self._check_finite()
        if not all(parameter.isfinite().all() for parameter in self.net.parameters()):
            raise ValueError(self._diverged("a weight is not a number"))
        checkpoint[CONFIG_KEY] = json.dumps(self.net.config())
        # Between two micro-batches the gradient so far belongs to the run; the mean of all processes serves each.
        checkpoint[GRADIENTS_KEY] = {
            name: self.trainer.strategy.reduce(parameter.grad.clone(), reduce_op="mean")
            for name, parameter in self.net.named_parameters()
            if self._accumulating and parameter.grad is not None
        }

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        check_weights("to go on from", lightning_weights(checkpoint), self.net)
        self._accumulated = checkpoint.get(GRADIENTS_KEY, {})

    def _check_finite(self) -> None:
        # Read back here only: a look at every step would make a GPU wait for the CPU.
        if self._finite is not None and not self._finite:
            raise ValueError(self._diverged("the training loss is not a number"))

    def _diverged(self, what: str) -> str:
        return (
            f"{what} by step {self.global_step}, at learning_rate={self.learning_rate}; lower it, or set "
            "trainer.gradient_clip_val; go on from the last checkpoint with --ckpt_path"
        )

    def _log_pace(self, batch: dict[str, Tensor]) -> None:
        now, step = time.perf_counter(), self.trainer.fit_loop.epoch_loop.total_batch_idx
        if self._clock is not None and step > self._clock[1]:
            tokens = batch["tokens"].numel() * (step - self._clock[1]) * self.trainer.world_size
            self.log("train/tokens_per_second", tokens / (now - self._clock[0]))
        self._clock = now, step

    def _log_state(self, state: tuple[Any, ...]) -> None:
        for index, (name, part) in enumerate(zip(self.net.names, state, strict=True)):
            numbers = [leaf.detach().float() for leaf in tree_leaves(part) if leaf.is_floating_point() and leaf.numel()]
            if numbers:
                flat = torch.cat([z.flatten() for z in numbers])
                self.log(f"state_rms/{index:02d}_{name}", flat.square().mean().sqrt())

    def _loss(self, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor, tuple[Any, ...]]:
        """The loss, the most likely token at each labelled position, and the state."""
        labels = batch["labels"]
        asked = labels != IGNORED
        hidden, state = self._hidden(batch["tokens"], starts=batch.get("starts"))
        logits = self.net.head(hidden[asked]).float()
        return F.cross_entropy(logits, labels[asked]), logits.detach().argmax(-1), state

    # Validation and test: one loader or several, named by the data module's ``validation_names``

    def on_validation_epoch_start(self) -> None:
        self._start_scores()

    def on_test_epoch_start(self) -> None:
        self._start_scores()

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int, dataloader_idx: int = 0) -> None:
        self._score(batch, dataloader_idx)

    def test_step(self, batch: dict[str, Tensor], batch_idx: int, dataloader_idx: int = 0) -> None:
        self._score(batch, dataloader_idx)

    def on_validation_epoch_end(self) -> None:
        self._log_scores("val")

    def on_test_epoch_end(self) -> None:
        self._log_scores("test")

    def _start_scores(self) -> None:
        names = getattr(getattr(self.trainer, "datamodule", None), "validation_names", None) or ["all"]
        self._scores = {name: _Score().to(self.device) for name in names}

    def _score(self, batch: dict[str, Tensor], dataloader_idx: int) -> None:
        loss, predictions, _ = self._loss(batch)
        list(self._scores.values())[dataloader_idx].update(loss, predictions, batch["labels"])

    def _log_scores(self, stage: str) -> None:
        scores = {name: (score.loss.compute(), score.accuracy.compute()) for name, score in self._scores.items()}
        losses, accuracies = (torch.stack(column) for column in zip(*scores.values(), strict=True))
        self.log(f"{stage}/loss", losses.mean(), prog_bar=True)
        self.log(f"{stage}/bits", losses.mean() / math.log(2))
        self.log(f"{stage}/accuracy", accuracies.mean(), prog_bar=True)
        if len(scores) > 1:
            for name, (loss, accuracy) in scores.items():
                self.log_dict({f"{stage}/loss/{name}": loss, f"{stage}/accuracy/{name}": accuracy})


def check_schedule(trainer: L.Trainer) -> None:
    """Raise ValueError unless the trainer can count by steps and batches alone, as data without an end needs."""
    if trainer.max_steps < 1:
        raise ValueError(
            f"trainer.max_steps={trainer.max_steps}: training data never ends; set a number of optimizer steps"
        )
    if trainer.accumulate_grad_batches < 1:
        raise ValueError(
            f"trainer.accumulate_grad_batches={trainer.accumulate_grad_batches}: use 1 batch a step, or more"
        )
    interval = trainer.val_check_interval
    if isinstance(interval, float) and interval < 1 and isinstance(trainer.limit_train_batches, float):
        raise ValueError(
            f"trainer.val_check_interval={interval} is a share of an epoch, but training data never ends; "
            "set a number of batches"
        )


class _Score(nn.Module):
    """Loss and accuracy over one validation loader."""

    def __init__(self) -> None:
        super().__init__()
        self.loss, self.accuracy = MeanMetric(), RecallAccuracy()

    def update(self, loss: Tensor, predictions: Tensor, labels: Tensor) -> None:
        self.loss.update(loss, weight=(labels != IGNORED).sum())
        self.accuracy.update(predictions, labels)
