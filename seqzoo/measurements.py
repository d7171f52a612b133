"""What ``seqzoo lengths | recall`` do: each a function of plain settings.

Apart from the other commands, which answer without Lightning: the annotations here name classes that stand on it.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console

if TYPE_CHECKING:
    from seqzoo.data import TextData
    from seqzoo.evals import LengthReport, RecallResult

CONFIG_FILE = "config.yaml"


def lengths(
    checkpoints: list[str],
    files: list[str] | None = None,
    train_length: int | None = None,
    multiples: list[int] = [1, 2, 4, 8, 16, 32],  # noqa: B006 (never changed)
    windows: int = 16,
    output: str = "runs/lengths",
) -> dict[str, LengthReport]:
    """Measure the loss at every position up to many times the training length; write a table, CSV files and a picture.

    Args:
        checkpoints: files or run folders of models of bytes.
        files: text to read; the held-out files of the first run's own data by default.
        train_length: tokens the models were trained on at a time; the first run's own by default.
        multiples: lengths to report, in training lengths.
        windows: how many stretches of text to read.
        output: folder for lengths.csv, curves.csv and lengths.png.
    """
    from seqzoo.evals import length_table, measure_lengths, plot_lengths, write_length_curves, write_lengths
    from seqzoo.models import load_model

    if not checkpoints:
        raise ValueError("checkpoints=[]: name at least one file or run folder")
    nets = {_run_name(Path(checkpoint)): load_model(checkpoint) for checkpoint in checkpoints}
    data = _text_data(Path(checkpoints[0]), files)
    documents = data.held_out_documents()
    reports = {}
    for name, net in nets.items():
        reports[name] = measure_lengths(
            net, documents, train_length=train_length or data.sequence_length, multiples=multiples, windows=windows
        )
    folder = Path(output)
    write_lengths(reports, folder / "lengths.csv")
    write_length_curves(reports, folder / "curves.csv")
    plot_lengths(reports, folder / "lengths.png")
    Console().print(length_table(reports))
    print(f"written to {folder}: lengths.csv, curves.csv, lengths.png")
    return reports


def recall(
    configs: list[str],
    output: str = "runs/recall",
    overrides: list[str] = [],  # noqa: B006 (never changed)
) -> list[RecallResult]:
    """Train each config on associative recall, score it on fresh rows; write a table, CSV files and a picture.

    Args:
        configs: config files whose data is seqzoo.tasks.MQARData.
        output: folder for the runs, recall.csv, curves.csv and recall.png.
        overrides: settings for all of them, such as trainer.max_steps=100.
    """
    from seqzoo.evals import plot_recall, recall_table, write_recall, write_recall_curves

    if not configs:
        raise ValueError("configs=[]: name at least one config file")
    stems = [Path(config).stem for config in configs]
    # Configs of one task begin alike, as in mqar_attention and mqar_mamba2; results are told apart by the rest.
    shared = len({stem.partition("_")[0] for stem in stems}) == 1
    names = [(shared and stem.partition("_")[2]) or stem for stem in stems]
    results = [train_recall(config, name, output, overrides) for config, name in zip(configs, names, strict=True)]
    folder = Path(output)
    write_recall(results, folder / "recall.csv")
    write_recall_curves(results, folder / "curves.csv")
    plot_recall(results, folder / "recall.png")
    Console().print(recall_table(results))
    print(f"written to {folder}: recall.csv, curves.csv, recall.png")
    return results


def train_recall(config: str, name: str, output: str, overrides: list[str]) -> RecallResult:
    """Train one config on associative recall and score it on fresh rows.

    Args:
        config: config file whose data is seqzoo.tasks.MQARData.
        name: what to call the result.
        output: folder for the run.
        overrides: settings that differ from the config's, such as ``trainer.max_steps=100``.

    Raises:
        ValueError: the config's data is of another task.
    """
    from seqzoo.evals import RecallResult
    from seqzoo.tasks import MQARData
    from seqzoo.training.command import TrainingCommand
    from seqzoo.training.history import History

    history = History("val/accuracy")
    arguments = ["--config", config, f"--trainer.default_root_dir={output}", *(f"--{each}" for each in overrides)]
    command = TrainingCommand(arguments, run=False, callbacks=(history,))
    data, net = command.datamodule, command.model.net
    if not isinstance(data, MQARData):
        raise ValueError(f"config {config} has data of {type(data).__name__}; recall needs seqzoo.tasks.MQARData")
    begin = time.perf_counter()
    command.trainer.fit(command.model, datamodule=data)
    seconds, steps = time.perf_counter() - begin, command.trainer.global_step
    command.trainer.test(command.model, datamodule=data, verbose=False)
    scores = command.trainer.callback_metrics
    segments = data.validation_names
    keys = ["test/accuracy"] if len(segments) == 1 else [f"test/accuracy/{segment}" for segment in segments]
    return RecallResult(
        name=name,
        accuracy={segment: float(scores[key]) for segment, key in zip(segments, keys, strict=True)},
        history=history.values,
        vocab_size=data.vocab_size,
        num_pairs=min(segment.pairs for segment in data.validation_segments),
        parameters=net.num_parameters(),
        state_bytes=net.state_bytes(max(segment.length for segment in data.validation_segments)),
        steps=steps,
        seconds=seconds,
    )


def _run_folder(checkpoint: Path) -> Path | None:
    """The folder of the run that wrote ``checkpoint``: the nearest one that holds its config."""
    from seqzoo.models.checkpoint import find_checkpoint

    return next((folder for folder in find_checkpoint(checkpoint).parents if (folder / CONFIG_FILE).is_file()), None)


def _run_name(checkpoint: Path) -> str:
    folder = _run_folder(checkpoint)
    return checkpoint.stem if folder is None else folder.parent.name


def _text_data(checkpoint: Path, files: list[str] | None) -> TextData:
    """The text that a run was trained on, with its held-out part; or ``files``, all of it held out."""
    from jsonargparse import ArgumentParser
    from yaml import safe_load

    from seqzoo.data import TextData

    folder = _run_folder(checkpoint)
    settings: dict[str, Any] = {} if folder is None else safe_load((folder / CONFIG_FILE).read_text())["data"]
    if settings and settings.get("class_path", "").rpartition(".")[2] != "TextData":
        raise ValueError(f"checkpoint {checkpoint} was not trained on text but on {settings.get('class_path')}")
    parser = ArgumentParser()
    parser.add_class_arguments(TextData, "data")
    data = parser.instantiate(parser.parse_object({"data": settings.get("init_args", {})}))["data"]
    if files:
        data = TextData(files=files, sequence_length=data.sequence_length, validation_fraction=1 - 1e-9)
    return data
