"""Models on disk: safetensors with the config inside, and the weights of a Lightning checkpoint; never a pickle."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from seqzoo.models.language_model import LanguageModel

CONFIG_KEY = "seqzoo_config"
MODEL_PREFIX = "net."


def save_model(net: LanguageModel, path: str | Path) -> None:
    """Write weights and config to one ``.safetensors`` file.

    Raises:
        ValueError: a layer of ``net`` was given as a function, so that its config cannot be written.
    """
    # Tied weights are one tensor: the embedding's.
    tensors = {name: p.detach().contiguous() for name, p in net.named_parameters()}
    save_file(tensors, path, metadata={CONFIG_KEY: json.dumps(net.config())})


def load_model(path: str | Path, *, device: str | torch.device = "cpu") -> LanguageModel:
    """Build the model that ``path`` describes, with its weights.

    Args:
        path: a ``.safetensors`` file of ``save_model``, a ``.ckpt`` file of a training run, or a run's folder, of which
            the newest checkpoint is taken.
        device: where the model goes.

    Raises:
        ValueError: there is no such file, it is damaged, or it was not written by seqzoo.
    """
    file = find_checkpoint(Path(path))
    config, weights = _read_safetensors(file) if file.suffix == ".safetensors" else _read_lightning(file)
    net = build_model(config)
    missing, unexpected = net.load_state_dict(weights, strict=False)
    if net.unembedding.weight is net.embedding.weight:
        missing = [name for name in missing if name != "unembedding.weight"]
    if missing or unexpected:
        raise ValueError(f"checkpoint {file} does not fit its config: missing {missing}, unexpected {unexpected}")
    return net.to(device)


def build_model(config: dict[str, Any]) -> LanguageModel:
    """The model that ``LanguageModel.config()`` describes; only mixers are built.

    Raises:
        ValueError: the config holds unknown settings, wrong types, or classes that are not mixers.
    """
    from jsonargparse import ArgumentError, ArgumentParser

    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(LanguageModel, "net")
    try:
        return parser.instantiate(parser.parse_object({"net": config}))["net"]
    except ArgumentError as error:
        raise ValueError(f"the model's config cannot be built: {' '.join(str(error).split())}") from error


def find_checkpoint(path: Path) -> Path:
    """The file that ``path`` means: itself, or the newest checkpoint in a folder.

    Raises:
        ValueError: there is none.
    """
    if path.is_dir():
        found = [file for suffix in ("ckpt", "safetensors") for file in path.rglob(f"*.{suffix}")]
        if not found:
            raise ValueError(
                f"checkpoint folder {path} holds no .ckpt or .safetensors file; train first, or name a file"
            )
        return max(found, key=lambda file: file.stat().st_mtime)
    if not path.is_file():
        raise ValueError(f"checkpoint {path} does not exist; name a .ckpt or .safetensors file, or a run's folder")
    return path


def _read_safetensors(file: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    try:
        with safe_open(file, framework="pt") as opened:
            metadata = opened.metadata() or {}
            weights = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118 (not a mapping)
    except (SafetensorError, OSError) as error:
        raise ValueError(f"checkpoint {file} is damaged: {error}; copy or train it again") from error
    return _config(file, metadata), weights


def _read_lightning(file: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    try:
        saved = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises many types for many kinds of damage
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(f"checkpoint {file} is damaged or holds more than tensors: {reason}") from error
    weights = {
        name.removeprefix(MODEL_PREFIX): tensor
        for name, tensor in saved.get("state_dict", {}).items()
        if name.startswith(MODEL_PREFIX)
    }
    return _config(file, saved), weights


def _config(file: Path, saved: dict[str, Any]) -> dict[str, Any]:
    if CONFIG_KEY not in saved:
        raise ValueError(f"checkpoint {file} was not written by seqzoo: it has no {CONFIG_KEY!r}")
    return json.loads(saved[CONFIG_KEY])
