"""Whole layers against other people's whole layers and softmax attention (`layers`)."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import layer_peers
import torch
from layer_cases import CASES, DTYPES, LayerCase, Side, chosen, makers, side_maker
from results import RESULTS, fill, markdown, read, verdict, write
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from timing import PATIENCE, medians

SOFTMAX = layer_peers.softmax_sdpa.__name__


def patient(make: Callable[[int, torch.dtype], Side], length: int, dtype: torch.dtype) -> bool:
    """Whether one run of ``length`` tokens stays within the patience, as shorter ones say if time grows by a line."""
    shorts = [max(64, length // part) for part in (16, 4)]  # some peers take whole chunks of 64 only
    make(shorts[0], dtype).both()  # warms up
    for short in shorts:
        side = make(short, dtype)
        begin = time.perf_counter()
        side.both()
        if (time.perf_counter() - begin) * length / short > PATIENCE:
            return False
    return True


def measure(case: LayerCase, length: int, dtype: torch.dtype, console: Console) -> dict[str, list[float]]:
    """Seconds of forward, and of forward and backward, of each side; peers that fail or take too long are left out."""
    sides = {}
    for name, make in (makers(case) | dict([side_maker(layer_peers.softmax_sdpa)])).items():
        try:
            if name == "seqzoo" or patient(make, length, dtype):
                sides[name] = make(length, dtype)
            else:
                console.print(f"{case.title}: {name} would take over {PATIENCE:.0f} s in {dtype}; left out")
        except (ImportError, RuntimeError) as error:
            if name == "seqzoo":
                raise
            console.print(f"{case.title}: {name} cannot run in {dtype}: {str(error).splitlines()[0]}")
    ahead = medians({name: side.ahead for name, side in sides.items()}, 7, PATIENCE)
    both = medians({name: side.both for name, side in sides.items()}, 7, PATIENCE)
    return {name: [ahead[name], both[name]] for name in sides}


def best_peer(times: Mapping[str, list[float]], which: int) -> tuple[str, float] | None:
    """The fastest of the others that compute the same, forward (0) or with backward (1), and its time over ours."""
    others = {name: both[which] for name, both in times.items() if name not in ("seqzoo", SOFTMAX)}
    if not others:
        return None
    name = min(others, key=others.__getitem__)
    return name, others[name] / times["seqzoo"][which]


def against_target(case: LayerCase, times: Mapping[str, list[float]], dtype: str) -> str:
    """Whether the layer is as much faster than its best peer as it must be; forward, it may not be slower."""
    ahead, both = best_peer(times, 0), best_peer(times, 1)
    target = case.targets[list(DTYPES).index(dtype)]
    if ahead is None or both is None or (target == 1 and both[0].endswith("alone")):
        return ""  # a layer need not be as fast as a bare operator is
    return verdict(target, {"forward": (ahead[1], 1), "with backward": (both[1], target)})


def layers(
    console: Console,
    length: int = 4096,
    only: Sequence[str] = (),
    dtypes: Sequence[str] = (),
    results: Path = RESULTS,
) -> None:
    """Layers against other people's and softmax attention through SDPA: milliseconds, and their time over ours."""
    path = results / "layer_times.json"
    for case in chosen(only):
        table = Table("layer", "dtype", "side", "ms forward", "both", "x forward", "x both", "target", box=SIMPLE_HEAD)
        for index, name in enumerate(dtypes or DTYPES):
            torch.manual_seed(0)
            times = measure(case, length, DTYPES[name], console)
            kept = read(path)
            kept.setdefault(case.title, {})[name] = times
            write(path, kept)
            for side, (ahead, both) in times.items():
                ours = side == "seqzoo"
                ratios = [] if ours else [f"{ahead / times['seqzoo'][0]:.1f}", f"{both / times['seqzoo'][1]:.1f}"]
                table.add_row(
                    case.title if ours and not index else "",
                    name if ours else "",
                    side,
                    f"{ahead * 1e3:.1f}",
                    f"{both * 1e3:.1f}",
                    *(ratios or ["", ""]),
                    against_target(case, times, name) if ours else "",
                )
        console.print(table)
    kept = read(path)
    fill(results, "README.md", "times: scripts/bench.py layers", summary(kept))
    fill(results, "docs/speed.md", "times: scripts/bench.py layers", details(kept))


def _measured(kept: Mapping[str, Any]) -> list[LayerCase]:
    return [case for case in CASES if kept.get(case.title, {}).keys() >= DTYPES.keys()]


def _owner(side: str) -> str:
    return side.split("_")[0] + ("'s operator alone" if side.endswith("alone") else "")


def summary(kept: Mapping[str, Any]) -> str:
    """A row for each layer: forward and backward, over the best peer and over softmax attention."""
    header = ["layer"]
    for name in DTYPES:
        header += [f"ms, {name}", "best peer / ours", "SDPA / ours"]
    rows = []
    for case in _measured(kept):
        row = [f"`{case.name}`" + (f", {case.variant}" if case.variant else "")]
        for name in DTYPES:
            times = kept[case.title][name]
            peer = best_peer(times, 1)
            row.append(f"{times['seqzoo'][1] * 1e3:.0f}")
            row.append("" if peer is None else f"{peer[1]:.1f} ({_owner(peer[0])})")
            row.append(f"{times[SOFTMAX][1] / times['seqzoo'][1]:.1f}")
        rows.append(row)
    return markdown(header, rows)


def details(kept: Mapping[str, Any]) -> str:
    """A row for each layer and side: forward, and forward and backward, in both precisions."""
    header = ["layer", "side"]
    for name in DTYPES:
        header += [f"ms forward, {name}", "both", "over ours", "target"]
    rows = []
    for case in _measured(kept):
        both = kept[case.title]
        for side in dict.fromkeys(side for times in both.values() for side in times):
            row = [case.title if side == "seqzoo" else "", side]
            for name in DTYPES:
                times = both[name]
                if side not in times:
                    row += [""] * 4
                    continue
                row += [f"{seconds * 1e3:.1f}" for seconds in times[side]]
                row.append("" if side == "seqzoo" else f"{times[side][1] / times['seqzoo'][1]:.1f}")
                row.append(against_target(case, times, name) if side == "seqzoo" else "")
            rows.append(row)
    return markdown(header, rows)
