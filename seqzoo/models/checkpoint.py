"""Models on disk: safetensors with the config inside, and the weights of a Lightning checkpoint; never a pickle."""

from __future__ import annotations

import copy
import importlib
import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from seqzoo.mixer import Mixer
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
    config, weights = read_checkpoint(path)
    try:
        net = build_model(config)
    except ValueError as error:
        raise ValueError(f"checkpoint {path}: {error}") from error
    check_weights(path, weights, net)
    net.load_state_dict(weights, strict=False)
    return net.to(device)


def read_checkpoint(path: str | Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The config and the weights in a checkpoint; path and errors as in ``load_model``."""
    file = find_checkpoint(Path(path))
    return _read_safetensors(file) if file.suffix == ".safetensors" else _read_lightning(file)


def check_weights(path: str | Path, weights: dict[str, Tensor], net: LanguageModel) -> None:
    """Raise ValueError unless ``weights``, read from ``path``, are those of a model like ``net``."""
    wanted = {name: tuple(parameter.shape) for name, parameter in net.named_parameters()}
    found = {name: tuple(tensor.shape) for name, tensor in weights.items()}
    # Tied weights have two names in a Lightning checkpoint and one in safetensors.
    names = wanted.keys() | (found.keys() - net.state_dict().keys())
    differing = sorted(name for name in names if wanted.get(name) != found.get(name))
    if differing:
        name = differing[0]
        raise ValueError(
            f"checkpoint {path} is of another model: {name} is {found.get(name, 'missing')} there and "
            f"{wanted.get(name, 'missing')} here; use the config that it was trained with"
        )


def check_layers(layers: dict[str, Any]) -> None:
    """Raise ValueError unless every layer of a parsed config names a mixer.

    The parser takes any dotted path to something callable, and a function would be called with the file's arguments.
    """
    for name, layer in layers.items():
        path = getattr(layer, "class_path", layer)
        module, _, attribute = str(path).rpartition(".")
        found = getattr(importlib.import_module(module), attribute, None) if module else None
        if not (isinstance(found, type) and issubclass(found, Mixer)):
            raise ValueError(f"model.net.layers.{name}: {path} is not a layer; expected a subclass of seqzoo.Mixer")


def build_model(config: dict[str, Any]) -> LanguageModel:
    """The model that ``LanguageModel.config()`` describes; only mixers are built.

    Raises:
        ValueError: the config holds unknown settings, wrong types, or classes that are not mixers.
    """
    from jsonargparse import ArgumentError, ArgumentParser

    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(LanguageModel, "net")
    try:
        parsed = parser.parse_object({"net": copy.deepcopy(config)})
        check_layers(parsed["net"]["layers"])
        return parser.instantiate(parsed)["net"]
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
    if not (isinstance(saved, dict) and isinstance(saved.get("state_dict"), dict)):
        raise ValueError(f"checkpoint {file} was not written by seqzoo: it has no 'state_dict'")
    return _config(file, saved), lightning_weights(saved)


def lightning_weights(saved: dict[str, Any]) -> dict[str, Tensor]:
    """The model's own weights among those of the Lightning module that holds it as ``net``."""
    names = (name for name in saved["state_dict"] if name.startswith(MODEL_PREFIX))
    return {name.removeprefix(MODEL_PREFIX): saved["state_dict"][name] for name in names}


def _config(file: Path, saved: dict[str, Any]) -> dict[str, Any]:
    if CONFIG_KEY not in saved:
        raise ValueError(f"checkpoint {file} was not written by seqzoo: it has no {CONFIG_KEY!r}")
    try:
        config = json.loads(saved[CONFIG_KEY])
    except (TypeError, json.JSONDecodeError) as error:
        raise ValueError(f"checkpoint {file} is damaged: its config is no JSON ({error})") from error
    if not isinstance(config, dict):
        raise ValueError(f"checkpoint {file} is damaged: its config is a {type(config).__name__}, not a mapping")
    return config
