"""One line out of jsonargparse's many: which setting is wrong, what it was given, and what would fit."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterable
from difflib import get_close_matches
from importlib import import_module
from textwrap import shorten

TYPE_NAMES = {
    "NoneType": "null",
    "str": "a text",
    "int": "a whole number",
    "float": "a number",
    "bool": "true or false",
    "list": "a list",
    "Sequence": "a list",
    "dict": "a mapping",
}
CLASS_KEYS = ("class_path", "init_args")
NOISE = re.compile(
    r"Type \S+ \S+ expects a function or a callable class: |\.+ Got value: .*|"
    r"(Expected a path but|Does not validate against|Subtypes:|Errors:|Given value).*"
)


def explain_parse_error(message: str, known_options: Iterable[str] = ()) -> str:
    """Reword an error of jsonargparse.

    Args:
        message: the text of its ``ArgumentError``.
        known_options: all option names, for suggestions, such as ``model.net.dim``.
    """
    known = list(known_options)
    if match := re.search(r"does not accept option '([^']+)'|unrecognized arguments: --([^\s=]+)", message):
        return _unknown_option(match[1] or match[2], known)
    if match := re.match(r"unrecognized arguments: (\S+)", message):
        hint = "a config file stands after --config" if "config" in known else "settings are written --name=value"
        return f"unexpected {match[1]!r}; {hint}"
    if match := re.match(r"the following arguments are required: (.*)", message):
        names = [name if name in known else name.partition(".")[2] or name for name in match[1].split(", ")]
        hint = f"; give {'them' if len(names) > 1 else 'it'} in a config, after --config" if "config" in known else ""
        return f"missing {', '.join(names)}{hint}"
    if match := re.match(r"Problems parsing config: (.*)", message, re.DOTALL):
        return "config: not YAML: " + _one_line(re.sub(r'in "[^"]*",', "at", match[1]))
    if match := re.match(r"Unexpected config: (.*)", message):
        return f"config: expected settings, such as 'model:' with its own below, got {shorten(match[1], 60)!r}"
    keys, problem = _innermost(message)
    return f"{'.'.join(keys)}: {_reason(problem, message)}" if keys else _one_line(message)


def explain_build_error(message: str) -> str:
    """Reword what jsonargparse says when a class that a config names refuses to be built, or lacks a package.

    Args:
        message: the text of its ``ValueError``.
    """
    first = re.search(r"\nErrors:\n +- (.*?)(?=\n +- |\nGiven value)", message, re.DOTALL)
    return _one_line(re.sub(r"Problem with given class_path '(?:\w+\.)*(\w+)'", r"\1", first[1])) if first else message


def _unknown_option(option: str, known: list[str]) -> str:
    parent, _, leaf = option.rpartition(".")
    siblings = {
        name.removeprefix(f"{parent}.").split(".")[0] for name in known if not parent or name.startswith(f"{parent}.")
    }
    near = [f"{parent}.{name}" if parent else name for name in get_close_matches(leaf, siblings, n=1)]
    hint = _did_you_mean(near or get_close_matches(option, known, n=1))
    return f"unknown setting {option!r}" + (hint or f"; {parent or 'the config'} has {', '.join(sorted(siblings))}")


def _innermost(message: str) -> tuple[list[str], str]:
    """The keys that lead to the wrong setting, and the lines about it: those that stand as deep as the first."""
    keys, rest = [], message
    while match := re.search(r'Parser key "([^"]+)":(\s*\n| )', rest):
        keys += [match[1]] if match[1] not in keys else []
        rest = rest[match.end() :]
    lines = rest.splitlines() or [""]
    depths = [len(line) - len(line.lstrip()) for line in lines]
    end = next((index for index, depth in enumerate(depths) if depth < depths[0]), len(lines))
    return keys, "\n".join(lines[:end])


def _reason(problem: str, message: str) -> str:
    value = _value(problem)
    if match := re.search(r"Option '([^']+)' is not accepted", problem):
        return _misspelt_key(value) or _unknown_setting(match[1], message)
    if match := re.search(r"No module named '([^']+)'", problem):
        near = _did_you_mean(get_close_matches(match[1], ["seqzoo"]))
        return f"cannot import {_class_path(value)!r}: there is no module {match[1]!r}{near}"
    if match := re.search(r"module '([^']+)' has no attribute '([^']+)'", problem):
        near = _did_you_mean(get_close_matches(match[2], dir(import_module(match[1])), n=1))
        return f"module {match[1]!r} has no {match[2]!r}{near}"
    if re.search("Dict must include a class_path|Not a valid subclass of", problem):
        return _misspelt_key(value) or f"expected a class_path, and init_args where wanted, got {value!r}"
    if match := re.search(r"to be a subclass of <class '(\w+)'>|a subclass of (\w+)$", problem, re.MULTILINE):
        return f"expected a subclass of {match[1] or match[2]}, got {_class_path(value)!r}"
    if match := re.search(r"Expected a dot import path string: (.*)", problem):
        near = _did_you_mean(get_close_matches(match[1], dir(import_module("seqzoo.layers")), n=1))
        return f"expected the path of a class, such as package.module.Name, got {match[1]!r}{near}"
    lines = [line for line in (line.strip(" -") for line in NOISE.sub("", problem).splitlines()) if line]
    others = [line for line in lines if not line.startswith("Expected a ")]
    wanted = dict.fromkeys(_kind(line) for line in lines)
    return _one_line(" ".join(others[:2])) if others else f"expected {' or '.join(wanted)}, got {value!r}"


def _value(problem: str) -> str:
    """What the setting was given."""
    values = re.findall(r"(?:Given|Got) value: (.*?)(?:\. Got value: .*)?$", problem, re.MULTILINE)
    value = re.sub(r"^NestedArg\(key='\w+', val=(.*)\)$", r"\1", values[-1]) if values else ""
    return value.strip("'")


def _class_path(value: str) -> str:
    """The class that ``value`` names, by itself or in a mapping with its settings."""
    match = re.search(r"class_path'?[=:] ?'([^']+)'", value)
    return match[1] if match else value


def _kind(line: str) -> str:
    """What ``Expected a ...`` asks for, in words."""
    if match := re.match(r"Expected a <class '(?:\w+\.)*(\w+)'>", line):
        return TYPE_NAMES.get(match[1], match[1])
    if match := re.match(r"Expected a typing\.Literal\[(.*)\]", line):
        return " or ".join(match[1].split(", "))
    return line.removeprefix("Expected ")


def _misspelt_key(value: str) -> str:
    for key in re.findall(r"(\w+)'?[=:]", value):
        if key not in CLASS_KEYS and (near := get_close_matches(key, CLASS_KEYS, n=1, cutoff=0.8)):
            return f"unknown key {key!r}{_did_you_mean(near)}"
    return ""


def _unknown_setting(name: str, message: str) -> str:
    path = re.findall(r"class_path[=' ]+([\w.]+)'", message)[-1]
    module, _, owner = path.rpartition(".")
    if path == "seqzoo.Mixer":
        return f"{name!r} is set for a layer that the config does not define"
    if name == "class_path":
        return f"the settings of {owner} stand under init_args, beside class_path"
    parameters = inspect.signature(getattr(import_module(module), owner)).parameters
    settings = [parameter for parameter in parameters if parameter != "dim"]
    near = _did_you_mean(get_close_matches(name, settings, n=1))
    return f"{owner} has no setting {name!r}" + (near or f"; it has {', '.join(settings) or 'none'}")


def _did_you_mean(near: list[str]) -> str:
    return f"; did you mean {near[0]!r}?" if near else ""


def _one_line(text: str) -> str:
    return " ".join(text.split())
