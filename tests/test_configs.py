"""Every config that ships: it says why it exists, it builds, and it trains."""

from __future__ import annotations

import math
import random
from pathlib import Path

import lightning as L
import pytest
import yaml

from seqzoo.training.command import TrainingCommand

CONFIGS = Path(__file__).parent.parent / "configs"
PATHS = sorted(CONFIGS.rglob("*.yaml"))
SHRINK = [
    "--data.init_args.batch_size=2",
    "--trainer.max_steps=2",
    "--trainer.val_check_interval=2",
    "--trainer.limit_val_batches=1",
    "--trainer.num_sanity_val_steps=0",
    "--trainer.accelerator=cpu",
    "--trainer.devices=1",
    "--trainer.logger=false",
    "--trainer.enable_checkpointing=false",
    "--trainer.enable_progress_bar=false",
]
SHRINK_DATA = {
    "seqzoo.data.TextData": ["--data.init_args.files={corpus}", "--data.init_args.validation_batches=1"],
    "seqzoo.tasks.MQARData": ["--data.init_args.validation_rows=2"],
}


class Losses(L.Callback):
    """Keeps the loss of every training batch, and the last validation's."""

    def __init__(self):
        self.train, self.validation = [], None

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.train.append(float(outputs["loss"]))

    def on_validation_end(self, trainer, pl_module):
        self.validation = float(trainer.callback_metrics["val/loss"])


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> Path:
    """Little text to read, but more than a window of any config."""
    folder = tmp_path_factory.mktemp("corpus")
    for index in range(3):
        letters = random.Random(index).choices("abcdefgh \n", k=20_000)
        (folder / f"{index}.txt").write_text("".join(letters))
    return folder


def test_there_are_configs():
    assert PATHS


@pytest.mark.parametrize("path", PATHS, ids=lambda path: str(path.relative_to(CONFIGS)))
def test_opens_with_why_it_exists(path):
    lines = path.read_text().splitlines()
    comment = lines[: next(index for index, line in enumerate(lines) if not line.startswith("#"))]
    assert len(comment) >= 2, "begin with a comment of two lines or more: why this config exists, what it reaches"
    assert all(len(line.strip("# ").split()) >= 3 for line in comment[:2]), comment


@pytest.mark.parametrize("path", PATHS, ids=lambda path: str(path.relative_to(CONFIGS)))
def test_ends_and_is_validated_at_its_end(path):
    config = yaml.safe_load(path.read_text())
    steps, interval = config["trainer"]["max_steps"], config["trainer"]["val_check_interval"]
    assert 0 < config["model"]["warmup_steps"] < steps and steps % interval == 0


@pytest.mark.parametrize("path", PATHS, ids=lambda path: str(path.relative_to(CONFIGS)))
def test_builds_and_trains(path, corpus, tmp_path):
    data = yaml.safe_load(path.read_text())["data"]["class_path"]
    settings = [setting.format(corpus=corpus) for setting in [*SHRINK, *SHRINK_DATA.get(data, [])]]
    losses = Losses()
    arguments = ["fit", "--config", str(path), *settings, f"--trainer.default_root_dir={tmp_path}"]
    command = TrainingCommand(arguments, callbacks=(losses,))
    assert command.trainer.global_step == 2
    assert len(losses.train) == 2 and all(map(math.isfinite, [*losses.train, losses.validation]))
    assert command.model.net.vocab_size == getattr(command.datamodule, "vocab_size", 256), "text is bytes, of 256 kinds"
    # Untrained, all tokens are about equally likely: a loss far from that is a wrong vocabulary or a wild start.
    assert losses.train[0] == pytest.approx(math.log(command.model.net.vocab_size), rel=0.15)
