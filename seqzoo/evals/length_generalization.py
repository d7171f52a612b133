"""Length generalization: the loss at every position far beyond the training length (Buitrago and Gu 2025, https://arxiv.org/abs/2507.02782).

The paper also follows the norm of the state and scores tasks; only its main measure, loss by position, is here.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from jaxtyping import Float, Integer, UInt8
from torch import Tensor, nn

from seqzoo.evals import report as show
from seqzoo.mixer import measure_state

if TYPE_CHECKING:
    import rich.table

NATS_PER_BIT = math.log(2)
BINS_PER_DOUBLING = 3


@dataclass(frozen=True)
class LengthRow:
    """What one model does up to one multiple of its training length.

    Attributes:
        multiple: length in training lengths.
        tokens: the same length in tokens.
        loss: mean over all positions up to this length, in nats per token.
        loss_error: its standard error over windows; NaN for a single window.
        depth_loss: mean over the last training length of positions before this length, in nats per token.
        depth_loss_error: its standard error over windows; NaN for a single window.
        perplexity: exp(loss).
        bits_per_byte: the loss in bits; a token is a byte.
        state_bytes: bytes of one sequence's state after this many tokens, measured, spare cache included.
        tokens_per_second: reading speed of all windows together, from the length one row above to this one.
    """

    multiple: int
    tokens: int
    loss: float
    loss_error: float
    depth_loss: float
    depth_loss_error: float
    perplexity: float
    bits_per_byte: float
    state_bytes: int
    tokens_per_second: float


@dataclass(frozen=True)
class CurvePoint:
    """The loss in one bin of positions: the bin's geometric middle, mean and standard error in nats per token."""

    position: float
    loss: float
    loss_error: float


@dataclass(frozen=True, eq=False)
class LengthReport:
    """The loss of one model by position, and its costs by length.

    Attributes:
        losses: nats at each position of each window, on the CPU; index 0 is the prediction made from one token.
        train_length: tokens the model was trained on at a time.
        documents: how many documents the windows come from.
        rows: one for each multiple of the training length.
    """

    losses: Float[Tensor, "window position"]
    train_length: int
    documents: int
    rows: tuple[LengthRow, ...]

    @property
    def windows(self) -> int:
        """How many windows were read."""
        return len(self.losses)

    @property
    def loss_by_position(self) -> Float[Tensor, " position"]:
        """Mean over windows, in nats per token."""
        return self.losses.mean(0)

    @property
    def standard_error(self) -> Float[Tensor, " position"]:
        """Standard error over windows at each position; NaN for a single window."""
        return _standard_error(self.losses)

    def curve(self) -> tuple[CurvePoint, ...]:
        """The loss in bins of equal width in log position, three to a doubling; one bin ends at the training length."""
        position = torch.arange(1, self.losses.shape[1] + 1, dtype=torch.float64)
        bins = (BINS_PER_DOUBLING * (position / self.train_length).log2()).ceil()
        sizes = bins.unique_consecutive(return_counts=True)[1].tolist()
        points = []
        for place, losses in zip(position.split(sizes), self.losses.split(sizes, dim=1), strict=True):
            loss, error = _mean_and_error(losses)
            points.append(CurvePoint(float(place.log().mean().exp()), loss, error))
        return tuple(points)


def measure_lengths(
    net: nn.Module,
    documents: Sequence[UInt8[Tensor, " _"]],
    *,
    train_length: int,
    multiples: Sequence[int] = (1, 2, 4, 8, 16, 32),
    chunk: int | None = None,
    windows: int = 8,
    batch: int = 8,
) -> LengthReport:
    """Read windows of the longest length once, through the carried state, and report the loss at every position.

    Windows begin where documents begin; when there are too few documents, their later parts serve as further windows
    that share no predicted token; standard errors take them for independent. Every window starts from an empty state.
    Logits never outlive a chunk, so beside the net's own state the memory in use does not grow with the length, but
    for one number a position.

    Args:
        net: a language model, ``net(tokens, state) -> (logits, state)``; runs in eval mode, in its own precision.
        documents: texts as bytes; those shorter than the largest multiple are passed over.
        train_length: tokens the model was trained on at a time; at least 1.
        multiples: lengths to report, in training lengths; at least 1 each.
        chunk: tokens in one call of ``net``; None for ``train_length``.
        windows: how many windows to read; fewer are read where the documents hold no more.
        batch: windows read side by side.

    Raises:
        ValueError: a setting is out of range, or no document is long enough for the largest multiple.
    """
    chunk = train_length if chunk is None else chunk
    settings = {"train_length": train_length, "chunk": chunk, "windows": windows, "batch": batch}
    for name, value in settings.items():
        if value < 1:
            raise ValueError(f"{name}={value}: expected at least 1")
    if not multiples or min(multiples) < 1:
        raise ValueError(f"multiples={tuple(multiples)}: expected at least one, and all at least 1, such as (1, 2, 4)")
    multiples = sorted(set(multiples))
    marks = [multiple * train_length for multiple in multiples]
    chosen = _choose_windows([len(document) for document in documents], marks[-1])[:windows]
    if not chosen:
        longest = max(map(len, documents), default=0)
        fits = max(longest - 1, 0) // train_length
        advice = f"the largest multiple that fits is {fits}" if fits else "not even multiple 1 fits"
        raise ValueError(
            f"multiples={tuple(multiples)}: {multiples[-1]} x train_length={train_length} needs a document of "
            f"{marks[-1] + 1} tokens, but the longest of {len(documents)} has {longest}; {advice}"
        )

    tokens = torch.stack([documents[index][begin : begin + marks[-1] + 1] for index, begin in chosen])
    device = next(net.parameters()).device
    modes = [(module, module.training) for module in net.modules()]
    net.eval()
    try:
        with torch.inference_mode():  # an unmeasured call first, so that setting up is not counted as reading
            net(tokens[:batch, : min(chunk, marks[0])].to(device).long())
        reads = [_read(net, part.to(device).long(), marks, chunk) for part in tokens.split(batch)]
    finally:
        for module, training in modes:
            module.training = training

    losses = torch.cat([read[0] for read in reads])
    seconds = [sum(times) for times in zip(*(read[2] for read in reads), strict=True)]
    rows = []
    for index, (multiple, mark) in enumerate(zip(multiples, marks, strict=True)):
        loss, loss_error = _mean_and_error(losses[:, :mark])
        depth_loss, depth_loss_error = _mean_and_error(losses[:, mark - train_length : mark])
        tokens_read = len(losses) * (mark - (marks[index - 1] if index else 0))
        rows.append(
            LengthRow(
                multiple=multiple,
                tokens=mark,
                loss=loss,
                loss_error=loss_error,
                depth_loss=depth_loss,
                depth_loss_error=depth_loss_error,
                perplexity=float(torch.tensor(loss).exp()),
                bits_per_byte=loss / NATS_PER_BIT,
                state_bytes=reads[0][1][index],
                tokens_per_second=tokens_read / seconds[index],
            )
        )
    return LengthReport(losses, train_length, len({index for index, _ in chosen}), tuple(rows))


def _choose_windows(lengths: Sequence[int], length: int) -> list[tuple[int, int]]:
    """Every window as (document, begin): the beginnings of all documents first, then their second parts, and so on."""
    fits = [(index, begin) for index, size in enumerate(lengths) for begin in range(0, size - length, length)]
    return sorted(fits, key=lambda window: window[1])


@torch.inference_mode()
def _read(
    net: nn.Module, tokens: Integer[Tensor, "window position_plus_one"], marks: Sequence[int], chunk: int
) -> tuple[Float[Tensor, "window position"], list[int], list[float]]:
    """The loss at every position; at each mark, the state's bytes a sequence and the seconds since the mark before."""
    losses, state_bytes, seconds = [], [], []
    state, begin = None, 0
    for mark in marks:
        clock = time.perf_counter()
        while begin < mark:
            end = min(begin + chunk, mark)
            logits, state = net(tokens[:, begin:end], state)
            loss = F.cross_entropy(logits.mT.float(), tokens[:, begin + 1 : end + 1], reduction="none")
            losses.append(loss.cpu())
            begin = end
        seconds.append(time.perf_counter() - clock)
        state_bytes.append(measure_state(state) // len(tokens))
    return torch.cat(losses, 1), state_bytes, seconds


def _standard_error(values: Tensor) -> Tensor:
    """Standard error of the mean over the first axis, the windows; NaN for a single window."""
    if len(values) == 1:
        return torch.full_like(values[0], math.nan)
    return values.std(0) / math.sqrt(len(values))


def _mean_and_error(losses: Float[Tensor, "window position"]) -> tuple[float, float]:
    """Mean of ``losses``, and its standard error; positions of a window go together, so windows are the sample."""
    by_window = losses.double().mean(1)
    return float(by_window.mean()), float(_standard_error(by_window))


def write_lengths(reports: Mapping[str, LengthReport], path: str | Path) -> None:
    """Write a CSV file with one row for each model and multiple of the training length."""
    rows = [
        {"model": name, "train_length": report.train_length, **asdict(row)}
        | {"windows": report.windows, "documents": report.documents}
        for name, report in reports.items()
        for row in report.rows
    ]
    show.write_csv(rows, path)


def write_length_curves(reports: Mapping[str, LengthReport], path: str | Path) -> None:
    """Write the curves as a CSV file with one row for each model and bin of positions, in nats per token."""
    rows = [{"model": name, **asdict(point)} for name, report in reports.items() for point in report.curve()]
    show.write_csv(rows, path)


def length_table(reports: Mapping[str, LengthReport]) -> rich.table.Table:
    """A table with one line for each model and multiple of the training length."""
    lines = [(name, row) for name, report in reports.items() for row in report.rows]
    return show.make_table(
        f"Loss beyond the training length ({_sample(reports)})",
        {
            "model": lambda line: line[0],
            "length": lambda line: f"{line[1].multiple}x",
            "tokens": lambda line: f"{line[1].tokens:,}",
            "bits/byte\nso far": lambda line: f"{line[1].bits_per_byte:.3f}",
            "bits/byte\nat that depth": lambda line: (
                f"{line[1].depth_loss / NATS_PER_BIT:.3f} ± {line[1].depth_loss_error / NATS_PER_BIT:.3f}"
            ),
            "state": lambda line: show.bytes_text(line[1].state_bytes),
            "tokens/s": lambda line: f"{line[1].tokens_per_second:,.0f}",
        },
        lines,
    )


def plot_lengths(reports: Mapping[str, LengthReport], path: str | Path) -> None:
    """Draw loss by position, and state by length, of all models into one PNG.

    Raises:
        ValueError: there are no reports.
    """
    if not reports:
        raise ValueError("reports={}: nothing to draw; give at least one report")
    train_lengths = sorted({report.train_length for report in reports.values()})
    farthest = max(report.rows[-1].multiple for report in reports.values())
    figure, (left, right) = show.two_panels(
        f"Loss and state up to {farthest}x the training length",
        f"Mean ± standard error over {_sample(reports)}.",
        left_width=1.5,
    )
    show.set_log_axis(left, "x", show.tokens_text, 6)
    show.set_log_axis(right, "x", show.tokens_text, 7)
    show.set_log_axis(right, "y", show.bytes_text, 7)
    show.set_axes(left, "Loss at each position", "position (tokens; a token is a byte)", "loss (bits per byte)")
    show.set_axes(right, "Memory at each length", "length (tokens)", "state per sequence")

    losses, states = {}, {}
    for index, (name, report) in enumerate(reports.items()):
        style = show.line_style(index)
        points = [
            point for point in report.curve() if point.position > train_lengths[0] / 8 and math.isfinite(point.loss)
        ]
        x = [point.position for point in points]
        y = [point.loss / NATS_PER_BIT for point in points]
        low, high = ([(point.loss + sign * point.loss_error) / NATS_PER_BIT for point in points] for sign in (-1, 1))
        left.plot(x, y, markersize=0, **style)
        left.fill_between(x, low, high, color=style["color"], alpha=0.15, linewidth=0)
        lengths, sizes = zip(*((row.tokens, show.on_log_axis(row.state_bytes)) for row in report.rows), strict=True)
        right.plot(lengths, sizes, markersize=5, **style)
        losses |= {name: (x[-1], y[-1], style["color"])} if points else {}
        states[name] = (lengths[-1], sizes[-1], style["color"])
    for train_length in train_lengths:
        for axes in (left, right):
            axes.axvline(train_length, color=show.FAINT, linestyle=(0, (4, 3)), linewidth=1.2, zorder=0)
        left.annotate(
            f" training length {train_length}",
            (train_length, 1),
            xycoords=("data", "axes fraction"),
            va="top",
            size=show.TEXT_POINTS - 1,
            color=show.FAINT,
        )
    show.label_ends(figure, left, losses)
    show.label_ends(figure, right, states)
    show.save_figure(figure, path)


def _sample(reports: Mapping[str, LengthReport]) -> str:
    """How much was read, in words: ``8 windows of 3 documents``."""
    samples = {(report.windows, report.documents) for report in reports.values()}
    return " or ".join(f"{windows} windows of {documents} documents" for windows, documents in sorted(samples))
