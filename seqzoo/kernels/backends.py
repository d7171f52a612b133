"""Choosing an implementation: one rule for every operator, and one place that says why."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

PLANNED = {
    "native": "compiled CPU kernels are not part of this release",
    "triton": "fused GPU kernels are not part of this release",
}


def choose(operator: str, implementations: Mapping[str, Callable[..., Any]], backend: str, time: int) -> str:
    """The name of the implementation that ``backend`` asks for.

    Args:
        operator: name of the operator, for messages.
        implementations: what exists, by name.
        backend: a name, or ``auto``: one token is stepped by ``reference``, more go through ``chunked``.
        time: tokens in the call.

    Raises:
        ValueError: ``backend`` cannot serve this operator; the message says why and what can.
    """
    if backend == "auto":
        return "reference" if time == 1 else "chunked"
    if backend not in implementations:
        why = PLANNED.get(backend, "there is no such backend")
        raise ValueError(
            f"backend={backend!r} cannot run {operator}: {why}; use {', '.join(['auto', *implementations])}"
        )
    return backend


def explain(operator: str, implementations: Mapping[str, Callable[..., Any]], time: int) -> str:
    """Which implementation ``auto`` takes for a call of ``time`` tokens, and why not the others."""
    chosen = choose(operator, implementations, "auto", time)
    reasons = {
        "reference": "walks token by token: right for one token, slow for more",
        "chunked": "pays for a whole chunk even when there is one token",
    } | PLANNED
    lines = [f"{operator}, {time} token(s): {chosen}"]
    lines += [f"  not {name}: {reason}" for name, reason in reasons.items() if name != chosen]
    return "\n".join(lines)


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
    if q.ndim != 4 or v.ndim != 4 or q.shape != k.shape or q.shape[:2] != v.shape[:2] or v.shape[2] % q.shape[2]:
        raise ValueError(
            f"{operator}: q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)} do not fit together; expected "
            "[batch, time, group, key] twice and [batch, time, head, value] with head a multiple of group"
        )
    for name, gate in gates.items():
        check_shape(operator, name, gate, tuple(v.shape[:3]))
    check_shape(operator, "state", state, (v.shape[0], v.shape[2], q.shape[3], v.shape[3]))
    check_shape(operator, "starts", starts, tuple(v.shape[:2]))
