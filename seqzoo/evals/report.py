"""How every evaluation is shown: a CSV file, a rich table, and one style of figure in colours that everybody can tell apart.

Colours follow Okabe and Ito (https://jfly.uni-koeln.de/color/); the light ones are darkened, because names are written in them.
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
    import matplotlib.lines
    import rich.table

COLORS = ("#0072B2", "#D55E00", "#009E73", "#C05A94", "#222222", "#B98500", "#3F9FDB")
DASHES = ("-", (0, (4, 1.5)), (0, (1, 1)))
MARKERS = ("o", "s", "D", "^", "v", "P", "X")
INK, FAINT = "#333333", "#8A8A8A"
TEXT_POINTS = 10


def write_csv(path: str | Path, rows: Sequence[Mapping[str, Any]]) -> None:
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
    from rich.table import Table

    table = Table(title=title)
    for index, header in enumerate(columns):
        table.add_column(header, justify="right" if index else "left", no_wrap=True)
    for row in rows:
        table.add_row(*(say(row) for say in columns.values()))
    return table


def bytes_text(number: float) -> str:
    """``number`` bytes in the largest binary unit that leaves at least one: ``1536`` is ``1.5 KiB``."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(number) < 1024:
            return f"{number:.3g} {unit}"
        number /= 1024
    return f"{number:.3g} TiB"


def tokens_text(number: float) -> str:
    """``number`` tokens for an axis: ``512``, ``4K`` for 4096."""
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

    figure = Figure(figsize=(10, 4.6), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(title, x=0.01, ha="left", weight="bold", size=13, color=INK)
    figure.supxlabel(note, x=0.01, ha="left", size=9, color=FAINT)
    figure.get_layout_engine().set(w_pad=0.1, h_pad=0.08)
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
    """The places nearest to ``wanted`` (least squares) that stand ``gap`` apart, and between ``low`` and ``high`` if they fit."""
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


def label_ends(axes: matplotlib.axes.Axes, lines: Mapping[str, matplotlib.lines.Line2D]) -> None:
    """Write each line's name in its colour at the right edge, apart from the others, with a thin lead from its last point."""
    figure = axes.get_figure(root=True)
    figure.draw_without_rendering()
    ends = {
        name: [point for point in line.get_xydata() if abs(point).max() < float("inf")] for name, line in lines.items()
    }
    ends = {name: points[-1] for name, points in ends.items() if points}
    height = axes.bbox.height
    wanted = [axes.transAxes.inverted().transform(axes.transData.transform(end))[1] for end in ends.values()]
    gap = TEXT_POINTS * 1.3 * figure.dpi / 72 / height
    for (name, end), place in zip(ends.items(), spread(wanted, gap, 0.0, 1.0), strict=True):
        color = lines[name].get_color()
        axes.annotate(
            name,
            xy=tuple(end),
            xytext=(1.04, place),
            textcoords="axes fraction",
            va="center",
            size=TEXT_POINTS,
            color=color,
            arrowprops=_lead(color) | {"relpos": (0, 0.5)},
        )


def label_points(axes: matplotlib.axes.Axes, points: Mapping[str, tuple[float, float, str]]) -> None:
    """Write a name beside each point ``(x, y, color)``, at the nearest place that covers no other name and no point.

    The figure keeps its layout from here on, so this comes last.
    """
    figure = axes.get_figure(root=True)
    figure.draw_without_rendering()
    figure.set_layout_engine("none")
    scale = figure.dpi / 72
    marks = {name: axes.transData.transform((x, y)) for name, (x, y, _) in points.items()}
    names = []
    frame = axes.bbox.extents
    for name, (x, y, color) in points.items():
        probe = axes.annotate(name, (x, y), size=TEXT_POINTS, ha="center", va="center")
        box = probe.get_window_extent()
        probe.remove()
        taken = list(names)
        for mark in marks.values():  # beside a mark that stands apart, the name would seem to be that mark's
            room = (5 if abs(mark - marks[name]).max() < 10 * scale else 14) * scale
            taken.append((mark[0] - room, mark[1] - room, mark[0] + room, mark[1] + room))
        for ring, (right, up) in product(
            range(1, 12), ((1, 0), (-1, 0), (0, -1), (0, 1), (1, -1), (-1, -1), (1, 1), (-1, 1))
        ):
            reach = 8 * scale * ring
            move_x, move_y = right * (reach + box.width / 2), up * (reach + box.height / 2)
            place = (box.x0 + move_x, box.y0 + move_y, box.x1 + move_x, box.y1 + move_y)
            inside = place[0] >= frame[0] and place[1] >= frame[1] and place[2] <= frame[2] and place[3] <= frame[3]
            if inside and not any(_overlap(place, other) for other in taken):
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


def _overlap(one: Sequence[float], other: Sequence[float]) -> bool:
    return one[0] < other[2] and other[0] < one[2] and one[1] < other[3] and other[1] < one[3]


def save_figure(figure: matplotlib.figure.Figure, path: str | Path) -> None:
    """Write ``figure`` as PNG, making the folder when it is missing."""
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, format="png")
