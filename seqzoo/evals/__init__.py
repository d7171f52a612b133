"""Evaluations: the loss far beyond the training length, and how well models recall what they were given."""

from importlib import import_module
from typing import TYPE_CHECKING

from seqzoo.evals.length_generalization import (
    LengthReport,
    LengthRow,
    length_table,
    measure_lengths,
    plot_lengths,
    write_length_curves,
    write_lengths,
)

if TYPE_CHECKING:
    from seqzoo.evals.recall import (
        RecallAccuracy,
        RecallResult,
        plot_recall,
        recall_table,
        write_recall,
        write_recall_curves,
    )
else:

    def __getattr__(name):
        # recall stands on torchmetrics, which takes most of a second to import.
        if name in __all__:
            return getattr(import_module("seqzoo.evals.recall"), name)
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}; it has {', '.join(__all__)}")


__all__ = [
    "LengthReport",
    "LengthRow",
    "RecallAccuracy",
    "RecallResult",
    "length_table",
    "measure_lengths",
    "plot_lengths",
    "plot_recall",
    "recall_table",
    "write_length_curves",
    "write_lengths",
    "write_recall",
    "write_recall_curves",
]
