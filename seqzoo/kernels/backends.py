"""Choosing an implementation: one rule for every operator, and one place that says why."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
from torch import Tensor

from seqzoo.kernels import adapters, native, triton_support
from seqzoo.kernels.torch_operators import constant_in_graphs

# What ``auto`` tries on each kind of device before plain torch. Adapters of other packages run only when asked for.
FUSED = {"cpu": ("native",), "cuda": ("triton",)}

WHY_NOT_AUTO = {
    "reference": "walks token by token: right for one token, slow for more",
    "chunked": "pays for a whole chunk even when there is one token, and for many passes over memory",
}

BACKENDS = ("reference", "chunked", "native", "triton", "sdpa", *adapters.PACKAGES)

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
COMPLEX = (torch.complex64, torch.complex128)

_checks_ranges = False


def why_not(backend: str, device: torch.device, dtype: torch.dtype) -> str | None:
    """Why ``backend`` cannot run on tensors of this kind; None where it can."""
    if backend == "native":
        return native.reason() if device.type == "cpu" else f"its kernels are for CPUs, and the tensors are on {device}"
    if backend in adapters.PACKAGES:
        return adapters.missing(backend, device, dtype)
    return triton_support.missing(device) if backend == "triton" else None


@constant_in_graphs
@cache
def _warn_that_native_is_missing(reason: str) -> None:
    warnings.warn(f"seqzoo runs on the CPU without its native kernels, many times slower: {reason}", stacklevel=2)


def choose(
    operator: str, implementations: Mapping[str, Callable[..., Any]], backend: str, sample: Tensor, time: int
) -> str:
    """The name of the implementation that ``backend`` asks for.

    Args:
        operator: name of the operator, for messages.
        implementations: what exists, by name.
        backend: a name, or ``auto``: the fused kernels of the device where they can run; else one token is stepped by
            ``reference`` and more go through ``chunked``.
        sample: the input whose device and dtype decide.
        time: tokens in the call.

    Raises:
        ValueError: ``backend`` cannot serve; the message says why and what can.
    """
    device, dtype = sample.device, sample.dtype
    if backend == "auto":
        for name in FUSED.get(device.type, ()):
            if name in implementations:
                why = why_not(name, device, dtype)
                if why is None:
                    return name
                if name == "native":
                    _warn_that_native_is_missing(why)
        return "reference" if time == 1 else "chunked"
    names = ["auto", *implementations]
    why = why_not(backend, device, dtype) if backend in names else "there is no such backend"
    if why is not None:
        raise ValueError(f"backend={backend!r} cannot run {operator}: {why}; use {', '.join(names)}")
    return backend


def dispatch(
    operator: str, implementations: Mapping[str, Callable[..., Any]], backend: str, sample: Tensor, *inputs: Any
) -> Any:
    """Call the implementation that ``backend`` asks for: ``choose`` for ``sample`` ``[batch, time, ...]``."""
    run = implementations[choose(operator, implementations, backend, sample, sample.shape[1])]
    # Autocast would round every product inside: the operator itself chooses the precision of each step.
    with torch.autocast(sample.device.type, enabled=False):
        return run(*inputs)


def check_backend(operator: str, backend: str) -> None:
    """Raise ValueError unless ``backend`` is ``auto`` or what at least one operator has."""
    if backend != "auto" and backend not in BACKENDS:
        names = ", ".join(["auto", *BACKENDS])
        raise ValueError(f"backend={backend!r} cannot run {operator}: there is no such backend; use {names}")


def dispatch_elementwise(
    operator: str, implementations: Mapping[str, Callable[..., Any]], backend: str, sample: Tensor, *inputs: Any
) -> Any:
    """Call ``native`` for a ``backend`` of that name, or ``auto`` where it can run; else ``reference``, plain PyTorch.

    For what a layer does beside its operators, at the layer's backend, which may be one that only those have.

    Raises:
        ValueError: no operator has a ``backend`` of that name, or it is ``native``, which cannot run.
    """
    check_backend(operator, backend)
    why = why_not("native", sample.device, sample.dtype)
    if backend == "native" and why is not None:
        raise ValueError(f"backend='native' cannot run {operator}: {why}; use auto or reference")
    run = implementations["native" if backend in ("auto", "native") and why is None else "reference"]
    with torch.autocast(sample.device.type, enabled=False):
        return run(*inputs)


def explained(operator: str, implementations: Mapping[str, Callable[..., Any]]) -> Callable[..., str]:
    """The function ``explain`` of an operator's module."""

    def explain(time: int, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32) -> str:
        """Which implementation ``backend="auto"`` takes for ``time`` tokens, and why not the others."""
        device = torch.device(device)
        chosen = choose(operator, implementations, "auto", torch.empty(0, device=device, dtype=dtype), time)
        lines = [f"{operator}, {time} token(s) of {str(dtype).removeprefix('torch.')} on {device.type}: {chosen}"]
        for name in implementations:
            if name != chosen:
                reason = why_not(name, device, dtype) or WHY_NOT_AUTO.get(name, "runs only when it is asked for")
                lines.append(f"  not {name}: {reason}")
        return "\n".join(lines)

    return explain


def accumulation_dtype(x: Tensor) -> torch.dtype:
    """The dtype of states and sums: float32, or float64 for float64 inputs."""
    return torch.promote_types(x.dtype, torch.float32)


def share_heads(x: Tensor, like: Tensor) -> Tensor:
    """Repeat each group of ``x`` ``[batch time group key]`` for the consecutive heads of ``like`` that share it."""
    return x.repeat_interleave(like.shape[2] // x.shape[2], 2)


def check_shape(operator: str, name: str, tensor: Tensor | None, expected: tuple[int, ...]) -> None:
    """Raise ValueError unless ``tensor`` has the ``expected`` shape, or is None."""
    if tensor is not None and tensor.shape != expected:
        raise ValueError(f"{operator}: {name} has shape {tuple(tensor.shape)}; expected {expected}")


def check_floats(operator: str, name: str, tensor: Tensor, expected: tuple[int, ...]) -> None:
    """Raise ValueError unless ``tensor`` is of floating-point numbers and has the ``expected`` shape."""
    if tensor.dtype not in FLOATS or tensor.shape != expected:
        raise ValueError(
            f"{operator}: {name} is {tensor.dtype} {tuple(tensor.shape)}; expected floating point {expected}"
        )


def check_kind_of_state(operator: str, state: Any, kind: type) -> None:
    """Raise ValueError unless ``state`` is of the class ``kind``."""
    if not isinstance(state, kind):
        raise ValueError(
            f"{operator}: state is a {type(state).__name__}; expected a {kind.__name__}, as an earlier call returned it"
        )


def check_tensor(operator: str, name: str, given: Any) -> Tensor:
    """``given``; raise ValueError unless it is a tensor."""
    if not isinstance(given, Tensor):
        kind = "None" if given is None else f"a {type(given).__name__}"
        raise ValueError(f"{operator}: {name} is {kind}; expected a tensor")
    return given


def check_kind(operator: str, first: str, like: Tensor, **others: Tensor | None) -> None:
    """Raise ValueError unless ``like``, called ``first``, has a token, and all ``others`` its dtype and device."""
    if like.shape[1] == 0:
        raise ValueError(f"{operator}: {first} has shape {tuple(like.shape)}, no token; expected a time of 1 or more")
    for name, tensor in others.items():
        if tensor is not None and (tensor.dtype != like.dtype or tensor.device != like.device):
            raise ValueError(
                f"{operator}: {name} is {tensor.dtype} on {tensor.device}; expected what {first} is, "
                f"{like.dtype} on {like.device}"
            )


def check_numbers(
    operator: str,
    starts: Tensor | None,
    optional: Mapping[str, Tensor | None] | None = None,
    *,
    complex_too: bool = False,
    **inputs: Tensor,
) -> None:
    """Raise ValueError unless ``inputs`` are floating-point (or complex) and ``starts`` is of bools, on one device.

    What is ``optional`` may be None. Kernels read memory as what they take it for: a wrong dtype would not be an error
    there, but a wrong answer.
    """
    allowed = FLOATS + COMPLEX if complex_too else FLOATS
    device = None
    for name, tensor in (inputs if optional is None else {**inputs, **optional}).items():
        if not isinstance(tensor, Tensor):
            if tensor is None and name not in inputs:
                continue
            tensor = check_tensor(operator, name, tensor)
        device = device or tensor.device
        if tensor.dtype not in allowed or tensor.device != device:
            names = ", ".join(str(dtype).removeprefix("torch.") for dtype in allowed)
            kind = f"{tensor.dtype} on {tensor.device}"
            raise ValueError(f"{operator}: {name} is {kind}; expected one of {names} on {device}")
    if starts is not None and (starts.dtype != torch.bool or starts.device != device):
        raise ValueError(f"{operator}: starts is {starts.dtype} on {starts.device}; expected torch.bool on {device}")


@contextmanager
def checked_ranges() -> Iterator[None]:
    """Inside, operators also check that values are legal (no log decay above 0), which costs a pass over them."""
    global _checks_ranges
    before, _checks_ranges = _checks_ranges, True
    try:
        yield
    finally:
        _checks_ranges = before


def checks_ranges() -> bool:
    """Whether this is inside ``checked_ranges``."""
    return _checks_ranges


def check_log_decay(operator: str, log_decay: Tensor | None, name: str = "log_decay", *, finite: bool = False) -> None:
    """Under ``checked_ranges``, raise ValueError unless ``log_decay`` is at most 0 everywhere, and ``finite`` if so."""
    if not _checks_ranges or log_decay is None:
        return
    if not (log_decay <= 0).all():
        raise ValueError(f"{operator}: {name} reaches {log_decay.max().item():g}; expected at most 0 everywhere")
    if finite and log_decay.isinf().any():
        raise ValueError(f"{operator}: {name} reaches -inf; expected finite numbers, of which -1e4 forgets all as well")


def check_heads(
    operator: str,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    gates: Mapping[str, Tensor],
    state: Tensor | None,
    starts: Tensor | None,
) -> None:
    """Raise ValueError unless queries, keys, values, per-head gates, state and starts fit together."""
    ranks = q.ndim == v.ndim == 4
    if not ranks or q.shape != k.shape or q.shape[:2] != v.shape[:2] or not share_evenly(q.shape[2], v.shape[2]):
        raise ValueError(
            f"{operator}: q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)} do not fit together; expected "
            "[batch, time, group, key] twice and [batch, time, head, value] with head a multiple of group, 1 or more"
        )
    check_kind(operator, "v", v, q=q, k=k)
    for name, gate in gates.items():
        check_shape(operator, name, gate, tuple(v.shape[:3]))
    check_shape(operator, "state", state, (v.shape[0], v.shape[2], q.shape[3], v.shape[3]))
    check_shape(operator, "starts", starts, tuple(v.shape[:2]))


def share_evenly(groups: int, heads: int) -> bool:
    """Whether there are groups and heads, as many of these in each."""
    return 0 < groups <= heads and heads % groups == 0


def check_attention(operator: str, q: Tensor, k: Tensor, v: Tensor) -> None:
    """Raise ValueError unless queries of the last slots fit keys and values of all, each shared by a group of heads."""
    check_numbers(operator, None, q=q, k=k, v=v)
    ranks = q.ndim == k.ndim == v.ndim == 4
    if not ranks or k.shape[:3] != v.shape[:3] or q.shape[0] != k.shape[0] or q.shape[3] != k.shape[3]:
        raise ValueError(
            f"{operator}: q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)} do not fit together; expected "
            "[batch, time, head, key], [batch, slot, group, key] and [batch, slot, group, value]"
        )
    if not 1 <= q.shape[1] <= k.shape[1] or q.shape[3] < 1 or not share_evenly(k.shape[2], q.shape[2]):
        raise ValueError(
            f"{operator}: q {tuple(q.shape)}, k {tuple(k.shape)}: expected a time of 1 or more, at least as many "
            "slots, and heads that are a multiple of groups"
        )
    check_kind(operator, "q", q, k=k, v=v)


def check_index(operator: str, name: str, index: Tensor | None, like: Tensor) -> None:
    """Raise ValueError unless ``index`` is of int64 and beside ``like``, or None."""
    if index is not None and (index.dtype != torch.int64 or index.device != like.device):
        raise ValueError(
            f"{operator}: {name} is {index.dtype} on {index.device}; expected torch.int64 on {like.device}"
        )


def check_decay(operator: str, log_decay: Tensor | None, q: Tensor, v: Tensor) -> None:
    """Raise ValueError unless ``log_decay`` is None, per head or per key channel, and in range where asked for."""
    expected = [tuple(v.shape[:3]), (*v.shape[:3], q.shape[3])]
    if log_decay is not None and tuple(log_decay.shape) not in expected:
        raise ValueError(
            f"{operator}: log_decay has shape {tuple(log_decay.shape)}; expected {expected[0]} or {expected[1]} or None"
        )
    check_log_decay(operator, log_decay)
