"""Associative recall: accuracy, learning speed and memory of models side by side (Arora et al. 2023, https://arxiv.org/abs/2312.04927)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torchmetrics import Metric

from seqzoo.evals import report as show
from seqzoo.models.language_model import IGNORED

if TYPE_CHECKING:
    import rich.table


@dataclass(frozen=True)
class RecallResult:
    """How well one trained model recalls, and what it cost.

    Attributes:
        name: name of the config.
        accuracy: final accuracy of each segment of the evaluation, such as ``{"T64_K4": 0.998}``; at least one.
        history: pairs of training step and accuracy, in the order of training.
        vocab_size: ids of the task; the lower half are keys, the upper half values.
        num_pairs: fewest key-value pairs in a row of any segment.
        parameters: how many numbers the model learned.
        state_bytes: bytes of one sequence's state at the evaluated length.
        steps: training steps taken.
        seconds: training time.

    Raises:
        ValueError: no segment, or sizes that no recall task has.
    """

    name: str
    accuracy: Mapping[str, float]
    history: Sequence[tuple[int, float]]
    vocab_size: int
    num_pairs: int
    parameters: int
    state_bytes: int
    steps: int
    seconds: float

    def __post_init__(self) -> None:
        if not self.accuracy:
            raise ValueError(
                f"accuracy={{}} of {self.name!r}: expected at least one segment, such as {{'T64_K4': 0.998}}"
            )
        if self.vocab_size < 2 * self.num_pairs or self.num_pairs < 1:
            raise ValueError(
                f"num_pairs={self.num_pairs}, vocab_size={self.vocab_size} of {self.name!r}: "
                "expected at least one pair, and twice as many ids as pairs"
            )

    @property
    def mean_accuracy(self) -> float:
        """Mean of ``accuracy`` over segments."""
        return sum(self.accuracy.values()) / len(self.accuracy)

    @property
    def chance(self) -> float:
        """Accuracy of guessing any value."""
        return 2 / self.vocab_size

    @property
    def floor(self) -> float:
        """Accuracy of guessing a value that stands in the row: the set is remembered, the binding is not."""
        return 1 / self.num_pairs


class RecallAccuracy(Metric):
    """Mean over rows of the fraction of labelled positions that are predicted right.

    Args:
        whole_rows: count a row as right only when all of its labelled positions are.
    """

    is_differentiable = False
    higher_is_better = True
    full_state_update = False
    right: Tensor
    rows: Tensor

    def __init__(self, *, whole_rows: bool = False) -> None:
        super().__init__()
        self.whole_rows = whole_rows
        self.add_state("right", torch.tensor(0.0), dist_reduce_fx="sum")
        self.add_state("rows", torch.tensor(0), dist_reduce_fx="sum")

    def update(self, predictions: Int[Tensor, " labelled"], labels: Int[Tensor, "batch time"]) -> None:
        """Count one batch.

        Args:
            predictions: the predicted id at each labelled position, in the order of ``labels[labels != -100]``.
            labels: the right ids; -100 where nothing is asked. Rows that ask nothing do not count.

        Raises:
            ValueError: there are not as many predictions as labelled positions.
        """
        asked = labels != IGNORED
        if predictions.shape != (int(asked.sum()),):
            raise ValueError(
                f"predictions of shape {tuple(predictions.shape)}: expected one for each of the {int(asked.sum())} "
                f"labelled positions, as in logits[labels != {IGNORED}].argmax(-1)"
            )
        right = asked.clone()
        right[asked] = predictions == labels[asked]
        count = asked.sum(1)
        fraction = right.sum(1) / count.clamp_min(1)
        self.right += (fraction == 1).sum() if self.whole_rows else fraction.sum()
        self.rows += (count > 0).sum()

    def compute(self) -> Float[Tensor, ""]:
        """The accuracy over all batches so far; NaN when no row asked anything."""
        return self.right / self.rows


def write_recall(results: Iterable[RecallResult], path: str | Path) -> None:
    """Write a CSV file with one row for each model, the best first."""
    rows = [
        {"name": result.name, "accuracy": result.mean_accuracy}
        | {f"accuracy_{segment}": value for segment, value in result.accuracy.items()}
        | {"chance": result.chance, "floor": result.floor, "parameters": result.parameters}
        | {"state_bytes": result.state_bytes, "steps": result.steps, "seconds": result.seconds}
        for result in _best_first(results)
    ]
    show.write_csv(rows, path)


def write_recall_curves(results: Iterable[RecallResult], path: str | Path) -> None:
    """Write the training curves as a CSV file with one row for each model and evaluated step."""
    rows = [
        {"name": result.name, "step": step, "accuracy": accuracy}
        for result in results
        for step, accuracy in result.history
    ]
    show.write_csv(rows, path)


def recall_table(results: Iterable[RecallResult]) -> rich.table.Table:
    """A table with one line for each model, the best first; a dash where a model was not tried on a segment."""
    results = _best_first(results)
    segments = list(dict.fromkeys(segment for result in results for segment in result.accuracy))
    return show.make_table(
        f"Associative recall ({', '.join(_guess_lines(results))})",
        {"model": lambda result: result.name}
        | {
            segment: lambda result, segment=segment: (
                f"{result.accuracy[segment]:.3f}" if segment in result.accuracy else "-"
            )
            for segment in segments
        }
        | {
            "parameters": lambda result: f"{result.parameters:,}",
            "state": lambda result: show.bytes_text(result.state_bytes),
            "steps": lambda result: f"{result.steps:,}",
            "seconds": lambda result: f"{result.seconds:,.0f}",
        },
        results,
    )


def plot_recall(results: Sequence[RecallResult], path: str | Path) -> None:
    """Draw accuracy against training step, and final accuracy against state, of all models into one PNG.

    Raises:
        ValueError: there are no results, or two of one name.
    """
    names = [result.name for result in results]
    if not names:
        raise ValueError("results=[]: nothing to draw; give at least one result")
    if len(set(names)) < len(names):
        raise ValueError(
            f"results are named {', '.join(names)}: every name may stand once, or curves cannot be told apart"
        )
    figure, (left, right) = show.two_panels(
        "Associative recall: how fast it is learned, and in how much memory",
        "Accuracy: fraction of the asked keys whose value is answered right, over rows and segments. "
        "A curve ends where training did.",
        left_width=1.25,
    )
    show.set_log_axis(right, "x", show.bytes_text, 4)
    show.set_axes(left, "Accuracy during training", "training step", "accuracy")
    show.set_axes(right, "Final accuracy by memory", "state per sequence", "accuracy")
    ends, points = {}, {}
    for index, result in enumerate(results):
        style = show.line_style(index)
        steps, accuracy = [step for step, _ in result.history], [value for _, value in result.history]
        left.plot(steps, accuracy, markersize=5, markevery=[-1], **style)
        size = show.on_log_axis(result.state_bytes)
        right.plot(size, result.mean_accuracy, markersize=8, markerfacecolor="none", markeredgewidth=2.5, **style)
        ends |= {result.name: (steps[-1], accuracy[-1], style["color"])} if steps else {}
        points[result.name] = (size, result.mean_accuracy, style["color"])
    last_step = max(result.steps for result in results)
    for name, value in _guess_lines(results).items():
        style = {"color": show.FAINT, "linestyle": (0, (4, 3)), "linewidth": 1.2, "zorder": 0}
        left.plot([0, last_step], [value, value], **style)
        right.axhline(value, **style)
        ends[name] = (last_step, value, show.FAINT)
    for axes in (left, right):
        axes.set_ylim(-0.03, 1.06)
    sizes = [size for size, _, _ in points.values()]
    right.set_xlim(min(sizes) / 3, max(sizes) * 3)
    show.label_ends(figure, left, ends)
    show.label_points(figure, right, points)
    show.save_figure(figure, path)


def _best_first(results: Iterable[RecallResult]) -> list[RecallResult]:
    return sorted(results, key=lambda result: -result.mean_accuracy)


def _guess_lines(results: Iterable[RecallResult]) -> dict[str, float]:
    """What guessing reaches, by name."""
    chances = {f"guess any value: 1/{result.vocab_size // 2}": result.chance for result in results}
    return {f"guess within row: 1/{result.num_pairs}": result.floor for result in results} | chances
