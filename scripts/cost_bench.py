"""Time and peak memory of every layer's forward and backward against length: kept, drawn and tabled (`costs`); and
beside its peers' at one length (`peaks`)."""

from __future__ import annotations

import re
import statistics
import time
from collections.abc import Mapping, Sequence
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

import torch
from layer_cases import CASES, chosen, makers
from results import RESULTS, fill, markdown, read, write
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from timing import PATIENCE, in_own_process, reset_peak, resident

from seqzoo.evals.report import COLORS, FAINT, INK, bytes_text, save_figure, set_axes, set_log_axis, tokens_text
from seqzoo.layers import FAMILIES

LENGTHS = (256, 1024, 4096, 16384, 65536)
ENOUGH = 3.0
"""Seconds after which a point is not timed again."""
BASELINES = ("Attention", "Attention, window of 512")
PANELS = {
    "State spaces": ("state space",),
    "Linear attention": ("linear attention",),
    "Delta rules, trained memories": ("delta rule", "test-time training"),
    "Recurrences, convolutions": ("linear recurrence", "nonlinear recurrence", "convolution"),
}
HUES = tuple(color for color in COLORS if color != "#222222")
Costs = Mapping[str, Mapping[str, Mapping[str, float]]]


def _cost(index: int, side: str, length: int, threads: int) -> dict[str, float]:
    torch.set_num_threads(threads)
    make = makers(CASES[index])[side]
    make(128, torch.float32).both()
    both = make(length, torch.float32).both
    before, seconds, peak = reset_peak(), [], 0
    while len(seconds) < 7 and sum(seconds) < ENOUGH:
        begin = time.perf_counter()
        both()
        seconds.append(time.perf_counter() - begin)
        peak = peak or resident("VmHWM") - before
    return {"seconds": statistics.median(seconds), "bytes": peak}


def _ahead(measured: Mapping[str, Mapping[str, float]], length: int, what: str) -> float:
    """What the lengths below foretell: a line at least, or as much steeper as it was from the last but one on."""
    last, before = [measured.get(str(length // step), {}).get(what) for step in (4, 16)]
    return 0.0 if last is None else last * max(4.0, last / before if before else 0.0)


def _available() -> int:
    found = re.search(r"MemAvailable:\s+(\d+) kB", Path("/proc/meminfo").read_text())
    assert found
    return int(found[1]) * 1024


def costs(console: Console, only: Sequence[str] = (), results: Path = RESULTS, patience: float = PATIENCE) -> None:
    """Time and peak memory of forward and backward at 256 to 64k tokens, float32, each point in a process of its own.

    What costs.json holds already is not measured again: delete it, or a layer's entry, to begin anew.
    """
    path = results / "costs.json"
    for case in chosen(only):
        for length in LENGTHS:
            measured = read(path)
            points = measured.setdefault(case.title, {})
            if str(length) in points:
                continue
            seconds, size = _ahead(points, length, "seconds"), _ahead(points, length, "bytes")
            if seconds > patience or size > _available():
                console.print(f"{case.title}: {length:,} tokens left out, some {seconds:.0f} s and {bytes_text(size)}")
                break
            try:
                points[str(length)] = in_own_process(
                    _cost, CASES.index(case), "seqzoo", length, torch.get_num_threads()
                )
            except BrokenProcessPool:
                console.print(f"{case.title}: the process died at {length:,} tokens")
                break
            write(path, measured)
            point = points[str(length)]
            console.print(f"{case.title}: {length:,} tokens, {point['seconds']:.3g} s, {bytes_text(point['bytes'])}")
    measured = read(path)
    draw(measured, results / "costs.png")
    fill(results, "README.md", "picture: scripts/bench.py costs", "![time and memory against length](docs/costs.png)")
    fill(results, "docs/speed.md", "picture: scripts/bench.py costs", "![time and memory against length](costs.png)")
    fill(results, "docs/speed.md", "costs: scripts/bench.py costs", table(measured))


def table(measured: Costs) -> str:
    """A row for each layer: forward and backward at 4k and 64k tokens, and softmax attention's time over it."""
    lengths = (4096, 65536)
    header = ["layer"]
    for length in lengths:
        header += [f"ms at {length:,}", "softmax / it", "peak memory"]
    rows = []
    for title, points in measured.items():
        row = [title]
        for length in lengths:
            point, softmax = points.get(str(length)), measured.get("Attention", {}).get(str(length))
            row += ["", "", ""] if point is None else [f"{point['seconds'] * 1e3:.0f}", "", bytes_text(point["bytes"])]
            if point and softmax:
                row[-2] = f"{softmax['seconds'] / point['seconds']:.1f}"
        rows.append(row)
    return markdown(header, rows)


def _style(name: str, members: Sequence[str]) -> dict[str, Any]:
    if name in BASELINES:
        return {"color": INK, "linewidth": 2.4, "linestyle": "-" if name == BASELINES[0] else (0, (1, 1)), "zorder": 4}
    if name not in members:
        return {"color": "#DDDDDD", "linewidth": 1, "zorder": 1}
    turn, place = divmod(members.index(name), len(HUES))
    return {"color": HUES[place], "linewidth": 1.8, "linestyle": "-" if not turn else (0, (4, 1.5)), "zorder": 3}


def draw(measured: Costs, path: Path) -> None:
    """Time a token above, peak memory below; a column for each kind of layer, all others behind it in grey."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator

    figure = Figure(figsize=(13, 9), dpi=130, layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle("Forward and backward, width 768, batch 1", x=0.01, ha="left", weight="bold", size=14, color=INK)
    note = f"float32, two CPU threads, torch {torch.__version__.split('+')[0]}; grey: the layers of the other columns"
    figure.supxlabel(note, x=0.01, ha="left", size=10, color=FAINT)
    grid = figure.subplots(2, len(PANELS), sharex=True, sharey="row", height_ratios=(3, 2))
    rows = (("seconds", "microseconds a token"), ("bytes", "peak memory"))
    for column, (title, families) in enumerate(PANELS.items()):
        members = [layer.__name__ for family in families for layer in FAMILIES[family] if layer.__name__ in measured]
        for row, (what, label) in enumerate(rows):
            axes = grid[row, column]
            for name, points in measured.items():
                if "," in name and name not in BASELINES:
                    continue  # a variant of a layer that is drawn
                lengths = sorted(map(int, points))
                values = [points[str(length)][what] for length in lengths]
                if what == "seconds":
                    values = [value / length * 1e6 for value, length in zip(values, lengths, strict=True)]
                named = name in members or name in BASELINES
                style = _style(name, members)
                axes.plot(lengths, values, label=name if named else None, marker="o" if named else "", ms=3.5, **style)
            set_axes(axes, title if not row else "", "tokens" if row else "", label if not column else "")
            set_log_axis(axes, "x", tokens_text, 9)
            axes.set_xticks(LENGTHS)
            if row:
                set_log_axis(axes, "y", bytes_text, 8)
            else:
                axes.set_yscale("log")
                axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
                axes.yaxis.set_major_formatter(lambda value, _: f"{value:,.0f}" if value >= 1 else f"{value:g}")
            axes.minorticks_off()
        handles, names = grid[1, column].get_legend_handles_labels()
        last = {name: measured[name][max(measured[name], key=int)]["seconds"] for name in names}
        order = sorted(range(len(names)), key=lambda index: (names[index] in BASELINES, -last[names[index]]))
        grid[1, column].legend(
            [handles[index] for index in order],
            [names[index] for index in order],
            loc="upper left",
            bbox_to_anchor=(0, -0.16),
            frameon=False,
            fontsize=10,
            labelcolor=INK,
            title="slowest first",
            title_fontsize=9,
            alignment="left",
        )
    save_figure(figure, path)


def peaks(console: Console, length: int = 4096, only: Sequence[str] = ()) -> None:
    """Time and peak memory of layers and of their peers, forward and backward, float32, each in its own process."""
    report = Table("layer", "side", "ms", "peak memory", "peak / ours", box=SIMPLE_HEAD)
    for case in chosen(only):
        ours = 0.0
        for side in makers(case):
            try:
                cost = in_own_process(_cost, CASES.index(case), side, length, torch.get_num_threads())
            except (ImportError, RuntimeError) as error:
                if side == "seqzoo":
                    raise
                console.print(f"{case.title}: {side} cannot run: {str(error).splitlines()[0]}")
                continue
            ours = ours or cost["bytes"]
            title, ratio = (case.title, "") if side == "seqzoo" else ("", f"{cost['bytes'] / ours:.1f}")
            report.add_row(title, side, f"{cost['seconds'] * 1e3:.0f}", bytes_text(cost["bytes"]), ratio)
    console.print(report)
