"""One line out of jsonargparse's many: which setting is wrong, what it was given, and what would fit."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterable
from difflib import get_close_matches
from importlib import import_module

TYPE_NAMES = {
    "NoneType": "null",
    "str": "a text",
    "int": "a whole number",
    "float": "a number",
    "bool": "true or false",
}


def explain_parse_error(message: str, known_options: Iterable[str] = ()) -> str:
    """Reword an error of jsonargparse.

    Args:
        message: the text of its ``ArgumentError``.
        known_options: all option names, for suggestions, such as ``model.net.dim``.
    """
    unknown = re.search(r"does not accept option '([^']+)'|unrecognized arguments: --([^\s=]+)", message)
    if unknown:
        return _unknown_option(unknown[1] or unknown[2], known_options)
    keys, rest = [], message
    while match := re.search(r'Parser key "([^"]+)":\s*', rest):
        keys.append(match[1])
        rest = rest[match.end() :]
    reason = _reason(rest, message)
    return f"{'.'.join(keys)}: {reason}" if keys else reason


def _unknown_option(option: str, known_options: Iterable[str]) -> str:
    known = list(known_options)
    parent, _, leaf = option.rpartition(".")
    siblings = {
        name.removeprefix(f"{parent}.").split(".")[0] for name in known if not parent or name.startswith(f"{parent}.")
    }
    near = get_close_matches(leaf, siblings, n=1)
    if near:
        hint = f"did you mean {f'{parent}.{near[0]}' if parent else near[0]!r}?"
    elif elsewhere := get_close_matches(option, known, n=1):
        hint = f"did you mean {elsewhere[0]!r}?"
    else:
        hint = f"{parent or 'the config'} has {', '.join(sorted(siblings)) or 'no settings'}"
    return f"unknown setting {option!r}; {hint}"


def _reason(rest: str, message: str) -> str:
    rest = re.sub(r"^Type .* expects a function or a callable class:\s*", "", rest, count=1)
    refused = re.search(r"Option '([^']+)' is not accepted", rest)
    if refused:
        return _unknown_setting(refused[1], message)
    wanted = list(dict.fromkeys(re.findall(r"Expected a <class '([^']+)'>", rest)))
    given = re.search(r"Got value: (.*)|Given value: (.*?)(?:\. Got value: .*)?$", rest, re.DOTALL)
    bullets = [line.strip(" -") for line in rest.splitlines() if line.strip().startswith("- ")]
    problem = next((bullet for bullet in bullets if not bullet.startswith("Expected a <class")), None)
    if problem is not None:
        following = rest[rest.index(problem) + len(problem) :].splitlines()[1:2]
        detail = following[0].strip(" -") if problem.endswith(":") and following else ""
        return " ".join(f"{problem} {detail}".split())
    if wanted:
        types = " or ".join(TYPE_NAMES.get(name, name.rsplit(".", 1)[-1]) for name in wanted)
        value = "" if given is None else f", got {(given[1] or given[2]).strip()!r}"
        return f"expected {types}{value}"
    return " ".join(re.sub(r"\.+ Got value: .*", "", rest, flags=re.DOTALL).split())


def _unknown_setting(name: str, message: str) -> str:
    owners = re.findall(r"class_path[=' ]+([\w.]+)'", message)
    settings = _settings(owners[-1]) if owners else []
    owner = owners[-1].rsplit(".", 1)[-1] if owners else "this class"
    near = get_close_matches(name, settings, n=1)
    return f"{owner} has no setting {name!r}; " + (
        f"did you mean {near[0]!r}?" if near else f"it has {', '.join(settings)}"
    )


def _settings(class_path: str) -> list[str]:
    module, _, name = class_path.rpartition(".")
    parameters = inspect.signature(getattr(import_module(module), name)).parameters.values()
    return [p.name for p in parameters if p.kind is p.KEYWORD_ONLY or p.default is not p.empty]
