"""What of a layer's time is neither a matrix product nor its operator (`shares`)."""

from __future__ import annotations

import contextlib
import itertools
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from layer_cases import CASES, DTYPES, chosen, module_side
from results import RESULTS, fill, markdown, read, write
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from torch.autograd.profiler_util import FunctionEvent

from seqzoo import layers
from seqzoo.mixer import Mixer

LIMIT = 0.15
"""Of a layer's time, what its short convolution, norms and gates may take together."""
PRODUCTS = ("aten::linear", "aten::mm", "aten::addmm", "aten::bmm", "aten::matmul", "aten::einsum", "aten::baddbmm")
KINDS = ("operator", "products", "convolution", "rest")


@contextlib.contextmanager
def marked(layer: Mixer) -> Iterator[None]:
    """The layer's operators, its short convolution apart, run under names that the profiler shows."""

    def under(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def run(*inputs: Any, **settings: Any) -> Any:
            with torch.profiler.record_function(name):
                return function(*inputs, **settings)

        return run

    with contextlib.ExitStack() as patches:
        for name in layer.operators:
            kind = "convolution" if name == "short_conv" else "operator"
            # The layer's file, or a part that calls it for the layer, in one form or the other.
            for (place, home), form in itertools.product(list(sys.modules.items()), (name, f"split_{name}")):
                if place.startswith(("seqzoo.layers.", "seqzoo.parts.")) and callable(getattr(home, form, None)):
                    patches.enter_context(patch.object(home, form, under(kind, getattr(home, form))))
        yield


def kind_of(event: FunctionEvent, forward_kinds: Mapping[int, str]) -> str:
    """What an event belongs to, by its callers; of a gradient, by what the forward call was."""
    kind, caller = "rest", event
    while caller is not None:  # outwards: what tells last is what holds the most, an operator its own products
        if caller.name in KINDS:
            return caller.name
        if caller.name.startswith("autograd::engine") and caller.sequence_nr in forward_kinds:
            return forward_kinds[caller.sequence_nr]
        if caller.name in PRODUCTS:
            kind = "products"
        caller = caller.cpu_parent
    return kind


def split_time(both: Callable[[], object]) -> dict[str, float]:
    """The shares of the kinds in the time of one forward and backward; what no event owns counts as the rest."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
        begin = time.perf_counter()
        both()
        total = (time.perf_counter() - begin) * 1e6
    events = sorted(profiler.events() or [], key=lambda event: event.time_range.start)
    forward_kinds: dict[int, str] = {}
    for event in events:  # of several calls with one number, the last one made the gradient
        if event.sequence_nr >= 0 and not event.name.startswith("autograd::engine") and "Backward" not in event.name:
            forward_kinds[event.sequence_nr] = kind_of(event, {})
    spent = dict.fromkeys(KINDS, 0.0)
    for event in events:
        spent[kind_of(event, forward_kinds)] += event.self_cpu_time_total
    spent["rest"] += max(0.0, total - sum(spent.values()))
    return {kind: seconds / total for kind, seconds in spent.items()}


def shares(
    console: Console,
    length: int = 4096,
    only: Sequence[str] = (),
    dtypes: Sequence[str] = (),
    results: Path = RESULTS,
) -> None:
    """What of a layer's forward and backward is neither a matrix product nor the operator: convolution, norms, gates.

    By the profiler, in one run of the whole layer; a gradient counts as the forward call that it belongs to. The rest
    is all else in the layer: norms, gates, activations, decays, glances back, copies. Medians of seven runs.
    """
    os.environ.setdefault("KINETO_LOG_LEVEL", "6")  # the profiler would report every run of its own
    path = results / "layer_shares.json"
    header = ["layer", "dtype", *KINDS, "convolution and rest", f"limit of {LIMIT:.0%}"]
    table = Table(*header, box=SIMPLE_HEAD)
    for case in chosen(only):
        if not set(getattr(layers, case.name).operators) - {"short_conv"}:
            continue  # the convolution itself mixes, or a loop that no operator holds
        for name in dtypes or DTYPES:
            layer = case.build(length)
            with marked(layer):
                both = module_side(layer, length, DTYPES[name]).both
                runs = [split_time(both) for _ in range(9)][2:]
            measured = {kind: statistics.median(run[kind] for run in runs) for kind in KINDS}
            kept = read(path)
            kept.setdefault(case.title, {})[name] = measured
            write(path, kept)
            table.add_row(case.title, name, *_cells(measured))
    console.print(table)
    kept = read(path)
    titles = [case.title for case in CASES if kept.get(case.title, {}).keys() >= DTYPES.keys()]
    rows = [[title, name, *_cells(kept[title][name])] for title in titles for name in DTYPES]
    fill(results, "docs/speed.md", "shares: scripts/bench.py shares", markdown(header, rows))


def _cells(measured: Mapping[str, float]) -> list[str]:
    together = measured["convolution"] + measured["rest"]
    verdict = "met" if together <= LIMIT else "missed"
    return [*(f"{measured[kind]:.0%}" for kind in KINDS), f"{together:.0%}", verdict]
