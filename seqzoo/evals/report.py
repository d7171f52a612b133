"""How every evaluation is shown: a CSV file, a rich table, and one style of figure.

The colours keep the hues of Okabe and Ito (https://jfly.uni-koeln.de/color/), darkened until names written in them
stand 3:1 from white, and moved apart until no colour blindness brings two of them near each other (17 apart in CIE76).
"""

from __future__ import annotations

import csv
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import matplotlib.axes
    import matplotlib.figure
    import rich.table

COLORS = ("#0055B8", "#A84A08", "#008A55", "#CC3B95", "#222222", "#B88D00", "#2696FF")
DASHES = ("-", (0, (4, 1.5)), (0, (1, 1)))
MARKERS = ("o", "s", "D", "^", "v", "<", ">")
INK, FAINT = "#333333", "#8A8A8A"
TEXT_POINTS = 10
Point = tuple[int | float, int | float, str]  # x, y, color
SIDES = ((1, 0), (-1, 0), (0, -1), (0, 1), (1, -1), (-1, -1), (1, 1), (-1, 1))


def write_csv(rows: Sequence[Mapping[str, Any]], path: str | Path) -> None:
    """Write ``rows`` under a header that names every key in the order of first appearance.

    Raises:
        ValueError: there are no rows.
    """
    if not rows:
        raise ValueError(f"rows=[]: nothing to write to {path}; give at least one row")
    names = list(dict.fromkeys(name for row in rows for name in row))
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, names)
        writer.writeheader()
        writer.writerows(rows)


def make_table(title: str, columns: Mapping[str, Callable[[Any], str]], rows: Iterable[Any]) -> rich.table.Table:
    """A table with one line a row; ``columns`` maps each header to what it says about a row."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    table = Table(title=title, box=SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
    for index, header in enumerate(columns):
        table.add_column(header, justify="right" if index else "left", no_wrap=index > 0, vertical="bottom")
    for row in rows:
        table.add_row(*(say(row) for say in columns.values()))
    return table


def bytes_text(number: int | float) -> str:
    """``number`` bytes in the largest binary unit that leaves at least one, to three digits: 1536 is ``1.5 KiB``."""
    units = ["B", "KiB", "MiB", "GiB", "TiB"]
    while number >= 1024 and len(units) > 1:
        number /= 1024
        units.pop(0)
    return f"{number:.0f} {units[0]}" if number >= 100 else f"{number:.3g} {units[0]}"


def tokens_text(number: int | float) -> str:
    """``number`` tokens for an axis: 512 is ``512``, 4096 is ``4K``."""
    return f"{number:g}" if number < 1024 else f"{number / 1024:g}K"


def two_panels(
    title: str, note: str, left_width: float
) -> tuple[matplotlib.figure.Figure, Sequence[matplotlib.axes.Axes]]:
    """A wide figure with two empty panels, readable at 900 pixels.

    Args:
        title: what the figure shows.
        note: how it was measured, in small print below.
        left_width: width of the left panel in widths of the right one.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    figure = Figure(figsize=(10, 4.6), dpi=150, layout=ConstrainedLayoutEngine(w_pad=0.1, h_pad=0.08))
    FigureCanvasAgg(figure)
    figure.suptitle(title, x=0.01, ha="left", weight="bold", size=13, color=INK)
    figure.supxlabel(note, x=0.01, ha="left", size=9, color=FAINT)
    return figure, figure.subplots(1, 2, width_ratios=(left_width, 1))


def set_axes(axes: matplotlib.axes.Axes, title: str, x_label: str, y_label: str) -> None:
    """Title and label one panel; a light grid and two spines are all the frame there is."""
    axes.set_title(title, loc="left", size=TEXT_POINTS + 1, color=INK, pad=10)
    axes.set_xlabel(x_label, size=TEXT_POINTS, color=INK)
    axes.set_ylabel(y_label, size=TEXT_POINTS, color=INK)
    axes.tick_params(labelsize=TEXT_POINTS, colors=INK, which="both")
    axes.minorticks_off()
    axes.grid(color="#E6E6E6", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(FAINT)


def line_style(index: int) -> dict[str, Any]:
    """Colour, dashes and marker of the model at ``index``; no two of the first 21 look alike."""
    turn, place = divmod(index, len(COLORS))
    return {"color": COLORS[place], "linestyle": DASHES[turn % len(DASHES)], "marker": MARKERS[place], "linewidth": 2}


def set_log_axis(axes: matplotlib.axes.Axes, which: str, say: Callable[[float], str], count: int) -> None:
    """Make the ``x`` or ``y`` axis logarithmic, with at most ``count`` ticks, at powers of two, worded by ``say``."""
    from matplotlib.ticker import FuncFormatter, LogLocator

    axes.set(**{f"{which}scale": "log"})
    axis = axes.xaxis if which == "x" else axes.yaxis
    axis.set_major_locator(LogLocator(base=2, numticks=count))
    axis.set_major_formatter(FuncFormatter(lambda number, _: say(number)))


def on_log_axis(size: int) -> int:
    """``size`` bytes as a logarithmic axis can show it: nothing at all stands at one byte."""
    return max(size, 1)


def spread(wanted: Sequence[float], gap: float, low: float, high: float) -> list[float]:
    """The places nearest to ``wanted``, in least squares, that stand ``gap`` apart between ``low`` and ``high``.

    Where that range is too short for all of them, they go on past ``high``.
    """
    order = sorted(range(len(wanted)), key=lambda index: wanted[index])
    blocks: list[tuple[float, int]] = []
    for rank, index in enumerate(order):
        mean, size = wanted[index] - rank * gap, 1
        while blocks and blocks[-1][0] >= mean:
            other, count = blocks.pop()
            mean, size = (mean * size + other * count) / (size + count), size + count
        blocks.append((mean, size))
    packed = [mean for mean, size in blocks for _ in range(size)]
    places = [0.0] * len(wanted)
    for rank, index in enumerate(order):
        places[index] = max(low, min(packed[rank], high - (len(wanted) - 1) * gap)) + rank * gap
    return places


def label_ends(figure: matplotlib.figure.Figure, axes: matplotlib.axes.Axes, ends: Mapping[str, Point]) -> None:
    """Write names at the right edge, clear of each other, each led to from the end of its line."""
    figure.draw_without_rendering()
    to_axes = (axes.transData + axes.transAxes.inverted()).transform
    wanted = [to_axes((x, y))[1] for x, y, _ in ends.values()]
    gap = TEXT_POINTS * 1.3 * figure.dpi / 72 / axes.bbox.height
    for (name, (x, y, color)), place in zip(ends.items(), spread(wanted, gap, 0.0, 1.0), strict=True):
        axes.annotate(
            name,
            xy=(x, y),
            xytext=(1.04, place),
            textcoords="axes fraction",
            va="center",
            size=TEXT_POINTS,
            color=color,
            arrowprops=_lead(color) | {"relpos": (0, 0.5)},
        )


def label_points(figure: matplotlib.figure.Figure, axes: matplotlib.axes.Axes, points: Mapping[str, Point]) -> None:
    """Write a name beside each point, at the nearest place that covers no other name and no point.

    The figure keeps its layout from here on, so this comes last.
    """
    from matplotlib.transforms import Bbox

    figure.draw_without_rendering()
    figure.set_layout_engine("none")
    scale = figure.dpi / 72
    marks = {name: axes.transData.transform((x, y)) for name, (x, y, _) in points.items()}
    frame, names = axes.bbox, []
    for name, (x, y, color) in points.items():
        probe = axes.annotate(name, (x, y), size=TEXT_POINTS, ha="center", va="center")
        box = probe.get_window_extent()
        probe.remove()
        taken = list(names)
        for mark in marks.values():  # beside a mark that stands apart, the name would seem to be that mark's
            room = (5 if abs(mark - marks[name]).max() < 10 * scale else 14) * scale
            taken.append(Bbox([mark - room, mark + room]))
        for ring, (right, up) in product(range(1, 12), SIDES):
            reach = 8 * scale * ring
            move_x, move_y = right * (reach + box.width / 2), up * (reach + box.height / 2)
            if up:  # above and below, the name may slide sideways to stay in the panel
                move_x += max(0, frame.x0 - box.x0 - move_x) - max(0, box.x1 + move_x - frame.x1)
            place = box.translated(move_x, move_y)
            inside = frame.contains(place.x0, place.y0) and frame.contains(place.x1, place.y1)
            if inside and not place.count_overlaps(taken):
                break
        names.append(place)
        axes.annotate(
            name,
            xy=(x, y),
            xytext=(move_x / scale, move_y / scale),
            textcoords="offset points",
            ha="center",
            va="center",
            size=TEXT_POINTS,
            color=color,
            arrowprops=_lead(color) if ring > 1 else None,
        )


def _lead(color: str) -> dict[str, Any]:
    """The thin line between a name and what it names."""
    return {"arrowstyle": "-", "color": color, "linewidth": 0.7, "alpha": 0.6, "shrinkA": 1, "shrinkB": 4}


def save_figure(figure: matplotlib.figure.Figure, path: str | Path) -> None:
    """Write ``figure`` as PNG, making the folder when it is missing."""
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, format="png")
