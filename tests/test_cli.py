"""The command line: every command does what its help says, and every mistake is answered with one line."""

from __future__ import annotations

import csv
import errno
import logging
import os
import random
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from lightning_utilities.core.imports import RequirementCache

from seqzoo import LanguageModel, __version__, save_model
from seqzoo.cli import COMMANDS, TRAINING, main
from seqzoo.layers import LAYERS, ShortConv

TEXT = """\
# A tiny hybrid on text.
# For tests.
model:
  net:
    dim: 8
    pattern: [delta, local]
    layers:
      delta: {class_path: seqzoo.layers.GatedDeltaNet, init_args: {num_heads: 2}}
      local: {class_path: seqzoo.layers.Attention, init_args: {num_heads: 2, window: 4}}
data:
  class_path: seqzoo.data.TextData
  init_args: {files: corpus, sequence_length: 16, batch_size: 2, validation_batches: 2}
trainer: {max_steps: 4, val_check_interval: 2, log_every_n_steps: 2, accelerator: cpu, enable_progress_bar: false}
"""
RECALL = """\
# A tiny model on recall.
# For tests.
model:
  net:
    vocab_size: 32
    dim: 8
    pattern: [mix]
    layers: {mix: LAYER}
data:
  class_path: seqzoo.tasks.MQARData
  init_args: {vocab_size: 32, batch_size: 4, validation_rows: 8, train_segments: [{length: 16, pairs: 2}]}
trainer: {max_steps: 100, val_check_interval: 2, accelerator: cpu, enable_progress_bar: false}
"""
FIT = ["fit", "--config", "tiny.yaml"]
SAVE_EVERY_SECOND_STEP = [
    "--trainer.callbacks=lightning.pytorch.callbacks.ModelCheckpoint",
    "--trainer.callbacks.filename={step}",
    "--trainer.callbacks.every_n_train_steps=2",
    "--trainer.callbacks.save_top_k=-1",
]


def write_corpus(folder: Path) -> None:
    folder.mkdir()
    for index in range(3):
        words = random.Random(index).choices(["state", "space", "memory", "delta", "rule"], k=80)
        (folder / f"{index}.txt").write_text(" ".join(words))


@pytest.fixture(autouse=True)
def work(tmp_path, monkeypatch) -> Path:
    """A folder to work in with a corpus and a config; logging is put back as it was."""
    for name in ("seqzoo", "lightning"):
        logger = logging.getLogger(name)
        monkeypatch.setattr(logger, "level", logger.level)
        monkeypatch.setattr(logger, "propagate", logger.propagate)
    monkeypatch.chdir(tmp_path)
    write_corpus(tmp_path / "corpus")
    (tmp_path / "tiny.yaml").write_text(TEXT)
    return tmp_path


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """The folder of a finished run."""
    folder = tmp_path_factory.mktemp("trained")
    write_corpus(folder / "corpus")
    (folder / "tiny.yaml").write_text(TEXT)
    before = Path.cwd()
    os.chdir(folder)
    try:
        assert main([*FIT, f"--data.init_args.files={folder / 'corpus'}", *SAVE_EVERY_SECOND_STEP]) == 0
    finally:
        os.chdir(before)
    return folder / "runs" / "tiny"


def call(capsys, *arguments: str) -> str:
    """Run a command that succeeds; what it prints."""
    capsys.readouterr()
    try:
        code = main([*map(str, arguments)])
    except SystemExit as exit:  # how argparse ends after printing help
        code = exit.code
    assert not code, capsys.readouterr().err
    return capsys.readouterr().out


def refuse(capsys, *arguments: str) -> str:
    """Run a command that fails; the one line that it says."""
    capsys.readouterr()
    assert main([*map(str, arguments)]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1, lines
    assert lines[0].startswith("seqzoo: error: ")
    return lines[0].removeprefix("seqzoo: error: ")


def read_csv(path: Path) -> list[dict[str, str]]:
    with path.open() as file:
        return list(csv.DictReader(file))


# Help


@pytest.mark.parametrize("flag", ["-h", "--help", "help"])
def test_help_lists_every_command(flag, capsys):
    text = call(capsys, flag)
    assert all(re.search(rf"^  {name} ", text, re.MULTILINE) for name in [*TRAINING, *COMMANDS])


def test_says_how_it_is_used_when_nothing_is_asked(capsys):
    assert main([]) == 2
    assert capsys.readouterr().out.startswith("usage: seqzoo")


def test_names_its_version(capsys):
    assert call(capsys, "--version").split() == ["seqzoo", __version__]


@pytest.mark.parametrize(
    ("command", "setting"),
    [
        ("fit", "--model.net.pattern"),
        ("validate", "--ckpt_path"),
        ("test", "--ckpt_path"),
        ("layers", "seqzoo layers"),
        ("show", "name"),
        ("generate", "--max_new_tokens"),
        ("lengths", "--multiples"),
        ("recall", "--overrides"),
        ("demo", "--output"),
    ],
)
def test_each_command_has_help(command, setting, capsys):
    assert setting in call(capsys, command, "-h")


def test_help_covers_every_command():
    [marks] = [mark for mark in test_each_command_has_help.pytestmark if mark.name == "parametrize"]
    assert [command for command, _ in marks.args[1]] == [*TRAINING, *COMMANDS]


# Commands


def test_layers_names_every_layer(capsys):
    text = call(capsys, "layers")
    assert all(re.search(rf"\b{layer.__name__}\b", text) for layer in LAYERS)


@pytest.mark.parametrize("layer", LAYERS, ids=lambda layer: layer.__name__)
def test_show_prints_equation_settings_and_state(layer, capsys):
    text = call(capsys, "show", layer.__name__)
    assert f"seqzoo.layers.{layer.__name__}" in text and layer.state_formula in text
    assert all(operator in text for operator in layer.operators)
    if layer.__name__ == "Attention":
        assert "window: int | None = None" in text and "softmax" in text and "grows" in text


def test_fit_writes_config_metrics_and_checkpoints_and_numbers_its_runs(work, capsys):
    call(capsys, *FIT)
    folder = work / "runs" / "tiny" / "version_0"
    config = yaml.safe_load((folder / "config.yaml").read_text())
    assert config["model"]["net"]["layers"]["local"]["init_args"]["window"] == 4
    assert config["model"]["weight_decay"] == 0.1  # defaults are written out too
    rows = read_csv(folder / "metrics.csv")
    columns = {name for row in rows for name, value in row.items() if value}
    wanted = {"train/loss", "train/gradient_norm", "state_rms/00_delta", "val/loss", "val/bits", "val/accuracy"}
    assert wanted <= columns and any(name.startswith("lr-AdamW") for name in columns)
    assert (folder / "checkpoints" / "last.ckpt").is_file()
    best = min((float(row["val/loss"]), row["step"]) for row in rows if row["val/loss"])
    assert [path.name for path in (folder / "checkpoints").glob("best-*")] == [f"best-step={int(best[1]) + 1}.ckpt"]

    call(capsys, *FIT, "--model.learning_rate=0.001")
    config = yaml.safe_load((work / "runs" / "tiny" / "version_1" / "config.yaml").read_text())
    assert config["model"]["learning_rate"] == 0.001
    assert sorted(path.name for path in (work / "runs").iterdir()) == ["tiny"]


def test_another_logger_writes_beside_the_run_and_not_in_its_place(work, capsys):
    call(capsys, *FIT, "--trainer.logger=lightning.pytorch.loggers.logger.DummyLogger")
    folder = work / "runs" / "tiny" / "version_0"
    assert read_csv(folder / "metrics.csv") and (folder / "checkpoints" / "last.ckpt").is_file()
    assert "DummyLogger" in (folder / "config.yaml").read_text()
    assert sorted(path.name for path in work.iterdir()) == ["corpus", "runs", "tiny.yaml"]


def test_fit_without_a_logger(work, capsys):
    call(capsys, *FIT, "--trainer.logger=false")
    assert not list(work.rglob("metrics.csv"))


def test_fit_repeats_itself_from_the_config_that_it_wrote(run, work, capsys):
    (work / "again.yaml").write_text((run / "version_0" / "config.yaml").read_text())
    call(capsys, "fit", "--config", "again.yaml", "--name=other")
    first, again = (
        torch.load(folder / "version_0" / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]
        for folder in (run, work / "runs" / "other")
    )
    assert all(torch.equal(weight, again[name]) for name, weight in first.items())


def test_fit_goes_on_from_a_checkpoint_to_the_same_end(run, work, capsys):
    half = run / "version_0" / "checkpoints" / "step=2.ckpt"
    call(capsys, *FIT, f"--ckpt_path={half}", f"--data.init_args.files={run.parent.parent / 'corpus'}")
    straight, resumed = (
        torch.load(folder / "version_0" / "checkpoints" / "last.ckpt", weights_only=True)
        for folder in (run, work / "runs" / "tiny")
    )
    assert straight["global_step"] == resumed["global_step"] == 4
    assert all(torch.equal(weight, resumed["state_dict"][name]) for name, weight in straight["state_dict"].items())


def test_validate_scores_a_checkpoint(run, work, capsys):
    checkpoint = run / "version_0" / "checkpoints" / "last.ckpt"
    text = call(capsys, "validate", "--config", "tiny.yaml", f"--ckpt_path={checkpoint}")
    logged = [row["val/loss"] for row in read_csv(run / "version_0" / "metrics.csv") if row["val/loss"]]
    assert float(re.search(r"val/loss\W+([\d.]+)", text)[1]) == pytest.approx(float(logged[-1]), rel=1e-6)


def test_test_scores_a_checkpoint_on_rows_of_its_own(work, capsys):
    (work / "conv.yaml").write_text(RECALL.replace("LAYER", "seqzoo.layers.ShortConv"))
    settings = ["--config", "conv.yaml", "--trainer.max_steps=2"]
    call(capsys, "fit", *settings)
    text = call(capsys, "test", *settings, "--ckpt_path=runs/conv")
    [validated] = [row["val/loss"] for row in read_csv(work / "runs/conv/version_0/metrics.csv") if row["val/loss"]]
    assert 0 < abs(float(re.search(r"test/loss\W+([\d.]+)", text)[1]) - float(validated)) < 0.2


def test_print_config_writes_every_setting_and_runs_nothing(work, capsys):
    config = yaml.safe_load(call(capsys, *FIT, "--model.net.layers.local.window=7", "--print_config"))
    assert config["model"]["net"]["layers"]["local"]["init_args"]["window"] == 7
    assert config["model"]["net"]["norm"] == "rms" and config["data"]["init_args"]["seed"] == 0
    assert config["seed_everything"] == 0 and config["trainer"]["gradient_clip_val"] == 1.0
    assert not (work / "runs").exists()


@pytest.mark.parametrize("place", ["", "version_0/checkpoints/last.ckpt"])
def test_generate_prints_the_prompt_and_goes_on(place, run, capsys):
    arguments = ["generate", run / place, "--prompt", "space ", "--max_new_tokens=9"]
    text = call(capsys, *arguments)
    assert text.startswith("space ") and len(text) > len("space ")
    assert call(capsys, *arguments) == text
    assert call(capsys, *arguments, "--seed=1") != text


def test_generate_draws_as_it_is_told(run, capsys):
    def draw(*settings):
        return call(capsys, "generate", run, "--prompt=space ", "--max_new_tokens=9", *settings)

    greedy = draw("--temperature=0")
    assert draw("--top_k=1", "--seed=1") == draw("--top_p=0.001", "--seed=1") == draw("--temperature=1e-4") == greedy
    assert draw("--temperature=1") != greedy


def test_generate_needs_a_model_of_bytes(work, capsys):
    layers = {"mix": ShortConv}
    save_model(LanguageModel(vocab_size=32, dim=8, pattern=["mix"], layers=layers), work / "recall.safetensors")
    line = refuse(capsys, "generate", "recall.safetensors")
    assert "recall.safetensors" in line and "vocab_size=32" in line and "256" in line


def test_lengths_reads_other_text_at_another_length(run, work, capsys):
    arguments = ["lengths", run, "--train_length=8", "--multiples=[1]", "--windows=1", "--output=measured"]
    call(capsys, *arguments, f"--files=[{work / 'corpus'}]")
    assert [row["tokens"] for row in read_csv(work / "measured" / "lengths.csv")] == ["8"]
    assert "nowhere does not exist" in refuse(capsys, *arguments, "--files=[nowhere]")


def test_lengths_writes_tables_and_a_picture(run, work, capsys):
    text = call(capsys, "lengths", run, "--multiples=[1, 2, 4]", "--windows=2", "--output=measured")
    [*rows] = read_csv(work / "measured" / "lengths.csv")
    assert {row["model"] for row in rows} == {"tiny"} and [row["tokens"] for row in rows] == ["16", "32", "64"]
    assert read_csv(work / "measured" / "curves.csv")
    assert (work / "measured" / "lengths.png").read_bytes().startswith(b"\x89PNG")
    assert "tiny" in text and "measured" in text


def test_recall_trains_configs_and_writes_tables_and_a_picture(work, capsys):
    (work / "mqar_conv.yaml").write_text(RECALL.replace("LAYER", "seqzoo.layers.ShortConv"))
    (work / "mqar_delta.yaml").write_text(RECALL.replace("LAYER", "seqzoo.layers.GatedDeltaNet"))
    text = call(
        capsys, "recall", "mqar_conv.yaml", "mqar_delta.yaml", "--overrides=[trainer.max_steps=4]", "--output=out"
    )
    rows = read_csv(work / "out" / "recall.csv")
    assert {row["name"] for row in rows} == {"conv", "delta"} and {row["steps"] for row in rows} == {"4"}
    assert all(0 <= float(row["accuracy_T16_K2"]) <= 1 for row in rows)
    curves = read_csv(work / "out" / "curves.csv")
    assert [(row["name"], row["step"]) for row in curves if row["name"] == "conv"] == [("conv", "2"), ("conv", "4")]
    assert (work / "out" / "recall.png").read_bytes().startswith(b"\x89PNG")
    assert "conv" in text and "delta" in text


def test_commands_that_train_nothing_answer_without_lightning(run):
    calls = [["layers"], ["show", "Mamba2"], ["show"], ["generate", str(run), "--max_new_tokens=1"]]
    code = (
        f"import sys; from seqzoo.cli import main; print([main(call) for call in {calls}], 'lightning' in sys.modules)"
    )
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=120)
    assert done.stdout.splitlines()[-1] == "[0, 0, 2, 0] False", done.stdout + done.stderr


# Mistakes: one line that names the setting, the value and what would fit; and nothing is written


def config(old: str, new: str) -> list[str]:
    """``fit`` with a config in which ``old`` is ``new``."""
    assert old in TEXT, old
    Path("wrong.yaml").write_text(TEXT.replace(old, new))
    return ["fit", "--config", "wrong.yaml"]


def write(content: str | bytes) -> list[str]:
    """``fit`` with a config file that holds ``content``."""
    Path("wrong.yaml").write_bytes(content.encode() if isinstance(content, str) else content)
    return ["fit", "--config", "wrong.yaml"]


DELTA = "seqzoo.layers.GatedDeltaNet"
MISTAKES = {
    # Layers
    "misspelt layer": (lambda: config(DELTA, f"{DELTA[:-3]}Nt"), ["model.net.layers", "did you mean GatedDeltaNet"]),
    "misspelt layer on the command line": (
        lambda: [*FIT, "--model.net.layers.delta=seqzoo.layers.Mamba33"],
        ["model.net.layers", "'Mamba33'", "did you mean Mamba3"],
    ),
    "layer without its module": (
        lambda: [*FIT, "--model.net.layers.delta=GatedDeltNet"],
        ["model.net.layers", "'GatedDeltNet'", "did you mean 'GatedDeltaNet'"],
    ),
    "misspelt module": (
        lambda: config(DELTA, "seqzo.layers.GatedDeltaNet"),
        ["model.net.layers", "'seqzo.layers.GatedDeltaNet'", "did you mean 'seqzoo'"],
    ),
    "misspelt submodule": (
        lambda: config(DELTA, "seqzoo.layer.GatedDeltaNet"),
        ["model.net.layers", "'layer'", "did you mean 'layers'"],
    ),
    "not a mixer": (
        lambda: config(DELTA, "torch.nn.Linear"),
        ["model.net.layers", "'torch.nn.Linear'", "subclass of Mixer"],
    ),
    "unknown setting of a layer": (
        lambda: config("window: 4", "windw: 4"),
        ["model.net.layers", "Attention", "'windw'", "did you mean 'window'"],
    ),
    "unknown setting of a layer on the command line": (
        lambda: [*FIT, "--model.net.layers.local.horizon=4"],
        ["model.net.layers", "Attention", "'horizon'", "num_heads", "window", "max_length"],
    ),
    "setting of a layer that is not there": (
        lambda: [*FIT, "--model.net.layers.globl.window=4"],
        ["model.net.layers", "'window'", "does not define"],
    ),
    "class_pth": (
        lambda: config(f"class_path: {DELTA}", f"class_pth: {DELTA}"),
        ["model.net.layers", "'class_pth'", "did you mean 'class_path'"],
    ),
    "init_arg": (
        lambda: config("init_args: {num_heads: 2}", "init_arg: {num_heads: 2}"),
        ["model.net.layers", "'init_arg'", "did you mean 'init_args'"],
    ),
    "settings beside the class": (
        lambda: config("init_args: {num_heads: 2}", "num_heads: 2"),
        ["model.net.layers", "GatedDeltaNet", "under init_args"],
    ),
    "wrong type in a layer": (
        lambda: config("window: 4", "window: wide"),
        ["model.net.layers.window", "a whole number or null", "'wide'"],
    ),
    "wrong choice in a layer": (
        lambda: [*FIT, "--model.net.layers.local.positions=rop"],
        ["model.net.layers.positions", "'rope' or 'none'", "'rop'"],
    ),
    "heads that do not divide": (lambda: [*FIT, "--model.net.dim=9"], ["'local'", "num_heads=2", "dim=9"]),
    "window of nothing": (lambda: config("window: 4", "window: 0"), ["'local'", "window=0", "1 or more"]),
    # Model and training
    "pattern names a missing layer": (
        lambda: config("[delta, local]", "[delta, locl]"),
        ["pattern", "'locl'", "did you mean 'local'"],
    ),
    "pattern is not a list": (lambda: config("[delta, local]", "delta"), ["model.net.pattern", "a list", "'delta'"]),
    "no pattern": (
        lambda: config("    pattern: [delta, local]\n", ""),
        ["missing model.net.pattern; give it in a config"],
    ),
    "unknown setting of the model": (
        lambda: config("dim: 8", "dims: 8"),
        ["'model.net.dims'", "did you mean 'model.net.dim'"],
    ),
    "unknown setting of the model on the command line": (
        lambda: [*FIT, "--model.net.repeat_all=2"],
        ["'model.net.repeat_all'", "did you mean 'model.net.repeats'"],
    ),
    "unknown setting of the trainer": (
        lambda: config("max_steps: 4", "max_step: 4"),
        ["'trainer.max_step'", "did you mean 'trainer.max_steps'"],
    ),
    "unknown group": (lambda: config("trainer:", "trainr:"), ["'trainr.", "did you mean 'trainer."]),
    "unknown option": (lambda: [*FIT, "--optimizer=sgd"], ["'optimizer'", "model", "trainer", "data"]),
    "wrong type": (lambda: config("dim: 8", "dim: wide"), ["model.net.dim", "a whole number", "'wide'"]),
    "wrong type on the command line": (
        lambda: [*FIT, "--model.learning_rate=fast"],
        ["model.learning_rate", "a number", "'fast'"],
    ),
    "wrong choice": (lambda: [*FIT, "--model.net.norm=rmss"], ["model.net.norm", "'rms' or 'layer'", "'rmss'"]),
    "out of range": (lambda: [*FIT, "--model.learning_rate=-1"], ["learning_rate=-1", "above 0"]),
    "no number of steps": (lambda: config("max_steps: 4, ", ""), ["trainer.max_steps=-1", "number of optimizer steps"]),
    "fraction of an epoch without end": (
        lambda: config("val_check_interval: 2", "val_check_interval: 0.5"),
        ["trainer.val_check_interval=0.5", "never ends", "number of batches"],
    ),
    "no batch a step": (
        lambda: [*FIT, "--trainer.accumulate_grad_batches=0"],
        ["trainer.accumulate_grad_batches=0", "1 batch a step, or more"],
    ),
    "callback that refuses its settings": (
        lambda: [
            *FIT,
            "--trainer.callbacks=EarlyStopping",
            "--trainer.callbacks.monitor=val/loss",
            "--trainer.callbacks.mode=low",
        ],
        ["`mode`", "min, max", "low"],
    ),
    "no such accelerator": (lambda: [*FIT, "--trainer.accelerator=gpuu"], ["'gpuu'", "cpu"]),
    "misspelt callback": (
        lambda: [*FIT, "--trainer.callbacks=lightning.pytorch.callbacks.EarlyStoping"],
        ["trainer.callbacks", "'EarlyStoping'", "did you mean 'EarlyStopping'"],
    ),
    # Data
    "misspelt data": (
        lambda: config("data.TextData", "data.TextDat"),
        ["data", "'TextDat'", "did you mean 'TextData'"],
    ),
    "not a data module": (
        lambda: config("seqzoo.data.TextData", "torch.nn.Linear"),
        ["data", "'torch.nn.Linear'", "subclass of LightningDataModule"],
    ),
    "not a data module on the command line": (
        lambda: [*FIT, "--data=torch.nn.Linear"],
        ["data", "'torch.nn.Linear'", "subclass of LightningDataModule"],
    ),
    "class_pth of data": (
        lambda: config("class_path: seqzoo.data", "class_pth: seqzoo.data"),
        ["data", "'class_pth'", "did you mean 'class_path'"],
    ),
    "unknown setting of data": (
        lambda: [*FIT, "--data.init_args.batchsize=2"],
        ["data", "TextData", "'batchsize'", "did you mean 'batch_size'"],
    ),
    "wrong type in data": (
        lambda: [*FIT, "--data.init_args.batch_size=many"],
        ["data.batch_size", "a whole number", "got 'many'"],
    ),
    "wrong type in a list of data": (
        lambda: [*FIT, "--data=seqzoo.tasks.MQARData", "--data.train_segments=[{length: 64, pairs: few}]"],
        ["data.train_segments.pairs", "a whole number", "got 'few'"],
    ),
    "missing corpus": (lambda: [*FIT, "--data.init_args.files=nowhere"], ["files", "nowhere", "does not exist"]),
    "empty corpus": (lambda: [Path("empty").touch(), *FIT, "--data.init_args.files=empty"][1:], ["files", "no text"]),
    "corpus that is too small": (
        lambda: [*FIT, "--data.init_args.sequence_length=9999"],
        ["sequence_length=9999", "at most", "more text"],
    ),
    # Files
    "missing config": (lambda: ["fit", "--config", "nothing.yaml"], ["config", "nothing.yaml", "does not exist"]),
    "no config": (lambda: ["fit"], ["missing model.net.pattern, model.net.layers; give them", "--config"]),
    "config without its flag": (lambda: ["fit", "tiny.yaml"], ["'tiny.yaml'", "--config"]),
    "folder for a config": (lambda: ["fit", "--config", "corpus"], ["config", "corpus", "not a file"]),
    "broken YAML": (lambda: config("[delta, local]", "[delta, local"), ["config", "not YAML", "line 7"]),
    "tab in YAML": (lambda: config("    dim", "\tdim"), ["config", "not YAML", "line 5"]),
    "text for a config": (lambda: ["fit", "--config", "corpus/0.txt"], ["config", "model:", "[...]'"]),
    "YAML of one word": (lambda: write("hello"), ["config", "'hello'", "model:"]),
    "empty config": (lambda: write("# nothing yet\n"), ["config", "'# nothing yet'", "model:"]),
    "config that is not text": (lambda: write(b"\xff\xfe\x00\x01"), ["config", "UTF-8"]),
    "missing checkpoint": (lambda: [*FIT, "--ckpt_path=no.ckpt"], ["checkpoint", "no.ckpt", "does not exist"]),
    "no checkpoint to validate": (lambda: ["validate", *FIT[1:]], ["missing ckpt_path", "validate", "runs/NAME"]),
    "Lightning's word for a checkpoint": (lambda: [*FIT, "--ckpt_path=last"], ["checkpoint last does not exist"]),
    "missing checkpoint to validate": (
        lambda: ["validate", *FIT[1:], "--ckpt_path=no.ckpt"],
        ["checkpoint", "no.ckpt", "does not exist"],
    ),
    # Other commands
    "unknown command": (lambda: ["fitt"], ["'fitt'", "did you mean 'fit'"]),
    "unheard-of command": (lambda: ["xyz"], ["'xyz'", "fit", "recall"]),
    "misspelt layer to show": (lambda: ["show", "GatedDelta"], ["'GatedDelta'", "did you mean GatedDeltaNet"]),
    "no layer to show": (lambda: ["show"], ["missing name", "seqzoo show -h"]),
    "not a layer to show": (lambda: ["show", "FAMILIES"], ["'FAMILIES'", "Mamba2"]),
    "two layers to show": (lambda: ["show", "Mamba2", "Attention"], ["'Attention'", "seqzoo show -h"]),
    "missing checkpoint to generate from": (lambda: ["generate", "no.ckpt"], ["no.ckpt", "does not exist"]),
    "missing checkpoint by its name": (lambda: ["generate", "--checkpoint", "no.ckpt"], ["no.ckpt", "does not exist"]),
    "missing checkpoint by its name and =": (
        lambda: ["generate", "--checkpoint=no.ckpt"],
        ["no.ckpt", "does not exist"],
    ),
    "folder without a checkpoint": (lambda: ["generate", "corpus"], ["corpus", "no .ckpt", "train first"]),
    "unknown setting of generate": (
        lambda: ["generate", "x", "--temprature=1"],
        ["'temprature'", "did you mean 'temperature'"],
    ),
    "wrong type in generate": (lambda: ["generate", "x", "--temperature=hot"], ["temperature", "a number", "'hot'"]),
    "nothing to measure": (lambda: ["lengths"], ["missing checkpoints"]),
    "no config to recall": (lambda: ["recall"], ["missing configs"]),
    "recall of text": (lambda: ["recall", "tiny.yaml"], ["tiny.yaml", "TextData", "MQARData"]),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_answered_with_one_line_and_nothing_is_written(name, capsys):
    arguments, wanted = MISTAKES[name]
    line = refuse(capsys, *arguments())
    assert all(word in line for word in wanted), line
    assert not any(noise in line for noise in ("Traceback", "Namespace", "typing.", "<class", "jsonargparse")), line
    assert not Path("runs").exists()


def test_a_corpus_that_cannot_be_read(work, capsys, monkeypatch):
    opened = Path.open

    def locked(path, *arguments, **settings):
        if path.name == "0.txt":  # not by its mode, which does not stop the superuser
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return opened(path, *arguments, **settings)

    monkeypatch.setattr(Path, "open", locked)
    line = refuse(capsys, *FIT)
    assert "files" in line and "0.txt" in line and "Permission denied" in line
    assert not (work / "runs").exists()


@pytest.mark.parametrize("content", [b"", b"not a checkpoint", b"PK\x03\x04 cut short"], ids=["empty", "text", "cut"])
@pytest.mark.parametrize("command", [["generate", "bad.ckpt"], [*FIT, "--ckpt_path=bad.ckpt"]], ids=lambda c: c[0])
def test_a_corrupt_checkpoint(command, content, work, capsys):
    (work / "bad.ckpt").write_bytes(content)
    line = refuse(capsys, *command)
    assert "checkpoint bad.ckpt is damaged" in line
    assert not (work / "runs").exists()


@pytest.mark.parametrize(
    ("saved", "reason"),
    [
        ({"state_dict": {}, "callbacks": subprocess.Popen}, "holds more than tensors"),
        ({"state_dict": {"weight": torch.zeros(2)}}, "was not written by seqzoo"),
        (torch.zeros(2), "was not written by seqzoo"),
    ],
    ids=["code", "weights", "tensor"],
)
@pytest.mark.parametrize("command", [["generate", "bad.ckpt"], [*FIT, "--ckpt_path=bad.ckpt"]], ids=lambda c: c[0])
def test_a_checkpoint_of_something_else(command, saved, reason, work, capsys):
    torch.save(saved, work / "bad.ckpt")
    line = refuse(capsys, *command)
    assert "checkpoint bad.ckpt" in line and reason in line
    assert not (work / "runs").exists()


def test_the_checkpoint_of_another_model(run, work, capsys):
    line = refuse(capsys, *FIT, "--model.net.dim=16", f"--ckpt_path={run / 'version_0' / 'checkpoints' / 'last.ckpt'}")
    assert "another model" in line
    assert not (work / "runs").exists()


def test_documents_beyond_the_limit(capsys):
    line = refuse(capsys, *FIT, "--model.net.layers.local.max_length=8")
    assert "16 tokens" in line and "max_length=8" in line and "window" in line


def test_a_loss_that_is_not_a_number(capsys):
    line = refuse(capsys, *FIT, "--model.learning_rate=1e30", "--model.warmup_steps=0", "--trainer.max_steps=20")
    assert "not a number" in line and "learning_rate=1e+30" in line and "lower" in line


def test_what_lightning_refuses_is_one_line_too(capsys):
    assert "limit_val_batches" in refuse(capsys, *FIT, "--trainer.limit_val_batches=-1")


def test_a_logger_whose_package_is_missing(work, capsys, monkeypatch):
    missing = RequirementCache("a-package-that-nobody-has")
    monkeypatch.setattr("lightning.pytorch.loggers.wandb._WANDB_AVAILABLE", missing)
    line = refuse(capsys, *FIT, "--trainer.logger=WandbLogger", "--trainer.logger.project=tiny")
    assert line.startswith("WandbLogger: ") and "a-package-that-nobody-has" in line and "Union" not in line
    assert not (work / "runs").exists()


def test_text_has_no_test_data(run, capsys):
    line = refuse(capsys, "test", *FIT[1:], f"--ckpt_path={run}")
    assert "TextData" in line and "seqzoo validate" in line


def test_a_command_that_the_user_stops(monkeypatch, capsys):
    def stopped():
        raise KeyboardInterrupt

    monkeypatch.setattr("seqzoo.commands.layers", stopped)
    assert main(["layers"]) == 130
    assert capsys.readouterr().err == "seqzoo: stopped\n"


def test_our_own_bugs_keep_their_traceback(monkeypatch):
    def broken():
        raise RuntimeError("a bug")

    monkeypatch.setattr("seqzoo.commands.layers", broken)
    with pytest.raises(RuntimeError, match="a bug"):
        main(["layers"])


def test_a_short_run_says_what_it_does_once_and_no_more(work):
    # In a process of its own: logging and warnings are those of a terminal only there.
    command = [sys.executable, "-c", "import sys; from seqzoo.cli import main; sys.exit(main())", *FIT]
    settings = ["--trainer.precision=bf16-mixed", "--trainer.max_steps=3", "--trainer.val_check_interval=9"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([*command, *settings], cwd=work, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    lines = [line for line in (done.stdout + done.stderr).splitlines() if line.strip()]
    assert len(lines) == 1 and re.match(r"TextData: [\d,]+ bytes", lines[0]), lines
