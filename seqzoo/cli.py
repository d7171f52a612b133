"""The command ``seqzoo``: train from a config, look at layers, generate, and measure."""

from __future__ import annotations

import inspect
import itertools
import json
import logging
import sys
import warnings
from collections.abc import Callable
from importlib import import_module
from typing import Any

TRAINING = {
    "fit": "train a model from a config",
    "validate": "score a checkpoint on the validation data of a config",
    "test": "score a checkpoint on the test data of a config",
}
# Each is a function whose signature and docstring are the command's settings and help.
COMMANDS = {
    "layers": ("seqzoo.commands:layers", "list the mixers that a config can name"),
    "show": ("seqzoo.commands:show", "a layer's equation, settings and state"),
    "generate": ("seqzoo.commands:generate", "continue a prompt with a trained model"),
    "lengths": ("seqzoo.measurements:lengths", "loss far beyond the training length, of one checkpoint or several"),
    "recall": ("seqzoo.measurements:recall", "train configs on associative recall and compare them"),
    "demo": ("seqzoo.demo:demo", "the whole way in five minutes: train a hybrid, measure it, draw the pictures"),
}
FUTILE_WARNINGS = (
    "does not have many workers",  # the data modules draw batches faster than models read them
    "The dirpath has changed from",  # a run that goes on writes to a folder of its own
    "could not find the monitored key",  # a run that is shorter than the first validation
    "isinstance.treespec, LeafSpec",  # between Lightning and torch
    "Mismatch dtype between input and weight",  # torch's own mixed precision
)


def main(arguments: list[str] | None = None) -> int:
    """Run one command; returns the process's exit code.

    Args:
        arguments: the command line without the program's name; None for this process's own.
    """
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(_usage())
        return 0 if arguments else 2
    if arguments[0] == "--version":
        print(f"seqzoo {import_module('seqzoo').__version__}")
        return 0
    _quieten()
    try:
        _run(arguments)
    except KeyboardInterrupt:
        print("seqzoo: stopped", file=sys.stderr)
        return 130
    except Exception as error:
        if not _is_for_user(error):
            raise
        print(f"seqzoo: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    return 0


def _is_for_user(error: Exception) -> bool:
    """Whether ``error`` says what the user can change: settings, files, or what Lightning refuses."""
    # By name, since importing Lightning takes seconds that most commands do not need.
    return isinstance(error, (ValueError, OSError)) or type(error).__name__ == "MisconfigurationException"


def _run(arguments: list[str]) -> None:
    name, *rest = arguments
    if name in TRAINING:
        import_module("seqzoo.training.command").TrainingCommand(arguments)
    elif name in COMMANDS:
        module, _, function = COMMANDS[name][0].partition(":")
        _call(name, getattr(import_module(module), function), rest)
    else:
        from difflib import get_close_matches

        near = get_close_matches(name, [*TRAINING, *COMMANDS], n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"there are {', '.join([*TRAINING, *COMMANDS])}"
        raise ValueError(f"no command {name!r}; {hint}")


def _call(name: str, function: Callable[..., Any], arguments: list[str]) -> None:
    from jsonargparse import ArgumentError, ArgumentParser

    parser = ArgumentParser(prog=f"seqzoo {name}", description=COMMANDS[name][1], exit_on_error=False)
    parser.add_function_arguments(function, as_positional=True)
    first = next(iter(inspect.signature(function).parameters.values()), None)
    if first is not None:
        # What stands first may be named as well, as all other settings are.
        flag = f"--{first.name}"
        arguments = [argument.removeprefix(f"{flag}=") for argument in arguments if argument != flag]
    if first is not None and first.annotation == "list[str]":
        # A list of names is written as in any shell: one after the other.
        names = list(itertools.takewhile(lambda argument: not argument.startswith("-"), arguments))
        arguments = [json.dumps(names), *arguments[len(names) :]] if names else arguments
    try:
        settings = parser.instantiate(parser.parse_args(arguments))
    except ArgumentError as error:
        from seqzoo.parse_errors import explain_parse_error

        known = parser.get_defaults(skip_validation=True).keys()
        raise ValueError(f"{explain_parse_error(str(error), known)} (see seqzoo {name} -h)") from error
    function(**dict(settings))


def _usage() -> str:
    commands = TRAINING | {name: line for name, (_, line) in COMMANDS.items()}
    lines = ["usage: seqzoo COMMAND [settings]      (seqzoo COMMAND -h lists its settings)", ""]
    lines += [f"  {name:<10}{line}" for name, line in commands.items()]
    lines += [
        "",
        "examples:",
        "  seqzoo fit --config configs/lm/hybrid.yaml --model.net.layers.local.window=32 --trainer.max_steps=100",
        "  seqzoo recall configs/recall/mqar_gated_deltanet.yaml configs/recall/mqar_sliding_window.yaml",
        "  seqzoo lengths runs/hybrid runs/sliding_window",
    ]
    return "\n".join(lines)


def _quieten() -> None:
    """Show this project's own messages, and of the libraries' only warnings that a user can act on."""
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    logging.getLogger("seqzoo").setLevel(logging.INFO)
    # Lightning sets its own handler and the levels of its packages when it is imported, later than this; what stays is
    # this flag, against saying everything twice, and the levels of the two modules that talk during a run.
    logging.getLogger("lightning").propagate = False
    for chatty in ("lightning.pytorch.utilities.rank_zero", "lightning.fabric.utilities.seed"):
        logging.getLogger(chatty).setLevel(logging.WARNING)
    for text in FUTILE_WARNINGS:
        warnings.filterwarnings("ignore", message=f".*{text}")
