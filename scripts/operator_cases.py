"""Operators at the sizes of published layers of width 768, and the code of others that computes the same."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import operator_peers as peers
import torch
from torch import Tensor

CHUNK = 64


class Case(NamedTuple):
    """An operator at the sizes of a published layer of width 768, and the code of others that computes the same.

    Args:
        name: of the layer, or of the operator.
        operator: a folder of ``seqzoo/kernels``.
        sizes: what its ``example`` takes.
        peers: functions of the same inputs.
        targets: how much faster than the best peer forward and backward must be, in float32 and in bfloat16.
        ahead: the same of the forward alone.
    """

    name: str
    operator: str
    sizes: dict[str, Any]
    peers: tuple[Callable[..., Tensor], ...]
    targets: tuple[float, float] = (1.0, 1.0)
    ahead: float = 1.0


DELTA = {"groups": 12, "heads": 12, "key": 128, "value": 128}
SMALL = {"groups": 12, "heads": 12, "key": 64, "value": 64}
GLA = {"groups": 4, "heads": 4, "key": 96, "value": 192}
RETNET = {"groups": 8, "heads": 8, "key": 96, "value": 192}
FOX = SMALL | {"forgets": True}
MAMBA2 = {"groups": 1, "heads": 24, "key": 128, "value": 64}

CASES = (
    Case(
        "short convolution",
        "short_conv",
        {"channels": 1536, "bias": False, "activation": "silu"},
        (peers.torch_conv1d,),
        targets=(8, 8),
        ahead=10,
    ),
    Case(
        "selective scan (Mamba)",
        "selective_scan",
        {"channels": 1536, "size": 16},
        (peers.mambapy_selective_scan,),  # transformers' loop takes minutes: its backward is quadratic
    ),
    Case("RG-LRU, minGRU", "linear_scan", {"channels": 768}, (peers.mingru_scan, peers.transformers_rglru), (2, 2)),
    Case("Mamba-2", "gated_linear_attention", MAMBA2, (peers.transformers_mamba2, peers.fla_simple_gla), (3, 4)),
    Case("RetNet", "gated_linear_attention", RETNET, (peers.fla_simple_gla,), (3, 3)),
    Case("GLA", "gated_linear_attention", GLA | {"decay": "channel"}, (peers.fla_gla,), (8, 8)),
    Case("RWKV-6", "gated_linear_attention", SMALL | {"decay": "channel", "bonus": True}, (peers.fla_rwkv6,), (8, 8)),
    Case("mLSTM", "mlstm", {"heads": 4, "key": 96, "value": 192}, (peers.xlstm_mlstm,)),
    Case("DeltaNet", "gated_delta_rule", DELTA | {"decay": "none"}, (peers.fla_delta_rule,), (4, 6)),
    Case(
        "Gated DeltaNet",
        "gated_delta_rule",
        DELTA,
        (peers.transformers_gated_delta_rule, peers.fla_gated_delta_rule),
        (4, 6),
    ),
    Case("KDA", "gated_delta_rule", DELTA | {"decay": "channel"}, (peers.fla_kda,), (8, 8)),
    Case("FoX", "attention", FOX, (peers.fla_forgetting_attention,), (4, 4)),
    Case("RWKV-7", "dplr_delta_rule", {"heads": 12, "key": 64, "value": 64}, (peers.fla_dplr,), (8, 8)),
)


def draw(case: Case, length: int, dtype: torch.dtype) -> dict[str, Any]:
    """The operator's own example at the case's sizes, batch 1, without a state; minGRU's ranges in its scan."""
    example = importlib.import_module(f"seqzoo.kernels.{case.operator}.reference").example
    inputs = example(batch=1, time=length, dtype=dtype, **case.sizes)
    inputs = {name: x for name, x in inputs.items() if name != "state"}
    if case.operator == "linear_scan":
        inputs |= {"a": inputs["a"].clamp(0.01, 0.99), "b": inputs["b"].abs()}
    return inputs


def operator_of(case: Case, backend: str = "auto") -> Callable[..., Any]:
    operator = getattr(importlib.import_module(f"seqzoo.kernels.{case.operator}"), case.operator)
    return functools.partial(operator, backend=backend)


def work(case: Case, inputs: Mapping[str, Any]) -> tuple[float, float]:
    """Floating-point operations and bytes of forward and backward: what binds an operator however it is written.

    A matrix-state operator is counted in chunks of 64, attention by the pairs that see each other, the backward as
    twice the forward; each input, output and gradient passes through memory once.
    """
    batch, length = next(x.shape[:2] for x in inputs.values() if isinstance(x, Tensor))
    moved = 2 * sum(x.nbytes for x in inputs.values() if isinstance(x, Tensor))
    sizes = case.sizes
    if "key" in sizes:
        key, value, heads = sizes["key"], sizes["value"], sizes["heads"]
        within, across = {
            "gated_delta_rule": (3 * key + 2 * value, 6 * key * value),
            "dplr_delta_rule": (6 * key + 4 * value, 8 * key * value),
            "attention": (length / CHUNK * (key + value), 0),
        }.get(case.operator, (key + value, 4 * key * value))
        operations = heads * (CHUNK * within + across)
        out = inputs["v"].nbytes
    else:
        taps = sizes.get("size", 4)
        operations, out = 8 * taps * sizes["channels"], next(iter(inputs.values())).nbytes
    return 3 * operations * batch * length, moved + 2 * out
