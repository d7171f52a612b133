"""What every call of a mixer is checked for before any work is done: its inputs, its starts, and whose state it is.

Sizes of a state other than the batch are for those to check that read it: operators, and what attention remembers.
"""

from __future__ import annotations

import inspect
import typing
from collections.abc import Callable
from functools import wraps
from typing import Any, NamedTuple

import torch
from torch import Tensor

from seqzoo.kernels.backends import FLOATS

NO_ROWS = (None,)  # the shape of a number, for what reads its first axis


class Kind(NamedTuple):
    """A NamedTuple that is a state or a part of one, and its fields: the names, and the kinds of those that are too."""

    cls: type[tuple]
    fields: tuple[tuple[str, Kind | None], ...]


def checked(forward: Callable[..., Any]) -> Callable[..., Any]:
    """``forward`` of a mixer, which refuses what does not fit with a ValueError.

    The state's type is the one that ``forward`` is annotated with; where that says nothing, it may be any.
    """
    kinds = state_kinds(forward)

    @wraps(forward)
    def call(self: Any, x: Any, state: Any = None, starts: Any = None, *more: Any, **named: Any) -> Any:
        check_inputs(self, x, starts)
        if state is not None:
            check_state(self, state, kinds, x.shape[0])
        return forward(self, x, state, starts, *more, **named)

    return call


def check_inputs(mixer: Any, x: Any, starts: Any) -> None:
    """Raise ValueError unless ``x`` is ``[batch, time, dim]`` of a dtype that the mixer takes, and ``starts`` fits."""
    width, weight = mixer.input_width, mixer.input_weight()
    shape = x.shape if isinstance(x, Tensor) else ()
    if len(shape) != 3 or shape[1] == 0 or (width is not None and shape[2] != width):
        is_there = f"has shape {tuple(shape)}" if isinstance(x, Tensor) else f"is a {type(x).__name__}"
        raise ValueError(
            f"{type(mixer).__name__}: x {is_there}; expected a tensor (batch, time, {width or 'dim'}) with a time of "
            "1 or more"
        )
    if weight is not None and x.dtype != weight.dtype and not _casts(x, weight):
        raise ValueError(
            f"{type(mixer).__name__}: x is {x.dtype}; expected {weight.dtype}, which the layer's parameters are "
            "(x.to() or layer.to() converts; torch.autocast takes any of float32, bfloat16 and float16)"
        )
    if starts is not None and not (
        isinstance(starts, Tensor) and starts.dtype == torch.bool and starts.shape == shape[:2]
    ):
        is_there = f"{starts.dtype} {tuple(starts.shape)}" if isinstance(starts, Tensor) else type(starts).__name__
        raise ValueError(
            f"{type(mixer).__name__}: starts is {is_there}; expected torch.bool {tuple(shape[:2])}, a mark for each "
            "token of x"
        )


def _casts(x: Tensor, weight: Tensor) -> bool:
    """Whether products of the two are left to autocast, or to a weight that is stored in a format of its own."""
    if weight.dtype not in FLOATS:
        return True
    kind = x.device.type
    return torch.is_autocast_enabled(kind) and torch.float64 not in (x.dtype, weight.dtype) and x.dtype in FLOATS


def check_state(mixer: Any, state: Any, kinds: tuple[Kind, ...], batch: int) -> None:
    """Raise ValueError unless ``state`` is of one of ``kinds``, or there are none, and has ``batch`` rows."""
    for kind in kinds:
        if isinstance(state, kind.cls):
            return _check_fields(mixer, "state", state, kind.fields, batch)
    if kinds or not isinstance(state, tuple):
        _refuse_kind(mixer, "state", state, kinds)
    _check_items(mixer, "state", state, batch)


def _check_fields(mixer: Any, name: str, part: tuple, fields: tuple[tuple[str, Kind | None], ...], batch: int) -> None:
    for leaf, (field, kind) in zip(part, fields, strict=True):
        if kind is None:
            if not isinstance(leaf, Tensor) or (leaf.shape or NO_ROWS)[0] != batch:
                _check_item(mixer, f"{name}.{field}", leaf, batch)
        elif isinstance(leaf, kind.cls):
            _check_fields(mixer, f"{name}.{field}", leaf, kind.fields, batch)
        else:
            _refuse_kind(mixer, f"{name}.{field}", leaf, (kind,))


def _check_items(mixer: Any, name: str, part: tuple, batch: int) -> None:
    for index, leaf in enumerate(part):
        _check_item(mixer, f"{name}[{index}]", leaf, batch)


def _check_item(mixer: Any, name: str, leaf: Any, batch: int) -> None:
    if isinstance(leaf, tuple):
        return _check_items(mixer, name, leaf, batch)
    if not isinstance(leaf, Tensor) or (leaf.shape or NO_ROWS)[0] != batch:
        is_there = f"has shape {tuple(leaf.shape)}" if isinstance(leaf, Tensor) else f"is a {type(leaf).__name__}"
        raise ValueError(
            f"{type(mixer).__name__}: {name} {is_there}; expected a tensor ({batch}, ...), a row for each of x"
        )


def _refuse_kind(mixer: Any, name: str, part: Any, kinds: tuple[Kind, ...]) -> None:
    names = " or ".join(kind.cls.__name__ for kind in kinds) or "NamedTuple"
    raise ValueError(
        f"{type(mixer).__name__}: {name} is a {type(part).__name__}; expected a {names}, as an earlier call returned it"
    )


def state_kinds(forward: Callable[..., Any]) -> tuple[Kind, ...]:
    """The NamedTuples that ``forward`` is annotated to take as ``state``."""
    written = inspect.unwrap(forward)
    hint = written.__annotations__.get("state")
    if isinstance(hint, str):
        try:
            hint = eval(hint, written.__globals__)
        except NameError:  # of a type that only type checkers see
            return ()
    return tuple(_kind(cls) for cls in typing.get_args(hint) or (hint,) if _is_named_tuple(cls))


def _kind(cls: type[tuple]) -> Kind:
    fields = typing.get_type_hints(cls).items()
    return Kind(cls, tuple((name, _kind(hint) if _is_named_tuple(hint) else None) for name, hint in fields))


def _is_named_tuple(hint: Any) -> bool:
    return inspect.isclass(hint) and issubclass(hint, tuple) and hasattr(hint, "_fields")
