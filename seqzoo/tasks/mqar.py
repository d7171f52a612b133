"""Multi-query associative recall: find each key's value again (Arora et al. 2023, https://arxiv.org/abs/2312.04927).

The paper's fixed sets of rows became endless fresh ones, so that nothing can be memorised but the task.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Literal

import lightning as L
import torch
from jaxtyping import Int
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from seqzoo.data.batches import Batch, TrainingLoader, fixed_loader, numbered_generator, require_at_least
from seqzoo.models.language_model import IGNORED


@dataclass(frozen=True)
class Segment:
    """One difficulty of the task.

    Args:
        length: tokens in a row; even, and at least four for each pair.
        pairs: key-value pairs to remember, each asked for once.
        batches: training batches in a row that are drawn from this segment before the next one's turn.
    """

    length: int
    pairs: int
    batches: int = 1

    @property
    def name(self) -> str:
        """How results name this segment, such as ``T64_K4``."""
        return f"T{self.length}_K{self.pairs}"


def mqar(
    batch: int,
    *,
    length: int,
    pairs: int,
    vocab_size: int = 8192,
    power_a: float = 0.01,
    random_non_queries: bool = True,
    generator: torch.Generator,
) -> tuple[Int[Tensor, "batch time"], Int[Tensor, "batch time"]]:
    """Draw rows of the task.

    A row is ``key value key value ...`` for all pairs, then a stretch of two-token slots in which each key comes once
    more, at a slot drawn with a chance of about 1 / slot, so that most questions come soon and some late. The label of
    a question is its value; the value itself is not written into the row again, and nothing else has a label.

    Args:
        batch: rows.
        length: tokens in a row; even, and at least four for each pair.
        pairs: distinct keys in a row, from the lower half of the vocabulary without 0, and as many distinct values,
            from the upper half.
        vocab_size: tokens there are; more than ``length``.
        power_a: the j-th slot, from 1, has weight ``j ** (power_a - 1)``; above 0.
        random_non_queries: fill the other places with random tokens, keys and values among them, instead of 0.
        generator: where randomness comes from; the rows live on its device.

    Returns:
        tokens, and labels with -100 where none is asked for.

    Raises:
        ValueError: the settings do not go together.
    """
    require_at_least(1, batch=batch)
    _check_settings(length=length, pairs=pairs, vocab_size=vocab_size)
    if power_a <= 0:
        raise ValueError(f"power_a={power_a}: expected a number above 0")
    device = generator.device
    keys = _distinct(batch, pairs, 1, vocab_size // 2, generator)
    values = _distinct(batch, pairs, vocab_size // 2, vocab_size, generator)

    # The K first of independent exponential clocks with rates w are K draws without replacement with weights w, in
    # the order of drawing: so the first pairs of a row tend to be asked for first, as in the paper.
    slots = length // 2 - pairs
    weights = torch.arange(1, slots + 1, device=device).float() ** (power_a - 1)
    clocks = torch.empty(batch, slots, device=device).exponential_(generator=generator) / weights
    questions = 2 * pairs + 2 * clocks.topk(pairs, largest=False).indices

    if random_non_queries:
        tokens = torch.randint(vocab_size, (batch, length), generator=generator, device=device)
    else:
        tokens = torch.zeros(batch, length, dtype=torch.long, device=device)
    tokens[:, : 2 * pairs : 2] = keys
    tokens[:, 1 : 2 * pairs : 2] = values
    tokens.scatter_(1, questions, keys)
    labels = torch.full_like(tokens, IGNORED).scatter_(1, questions, values)
    return tokens, labels


def _check_settings(*, length: int, pairs: int, vocab_size: int) -> None:
    """Raise ValueError unless rows of ``length`` tokens can hold and ask for ``pairs`` pairs."""
    require_at_least(1, pairs=pairs)
    if length % 2 or length < 4 * pairs:
        raise ValueError(
            f"length={length}: expected an even number of at least 4 * pairs = {4 * pairs}, "
            "half for the pairs and their questions, half for what lies between"
        )
    if vocab_size <= length:
        raise ValueError(f"vocab_size={vocab_size}: expected more than length={length}")


def _distinct(batch: int, count: int, low: int, high: int, generator: torch.Generator) -> Int[Tensor, "batch count"]:
    """``count`` distinct ids a row, uniform over all ordered choices from ``low`` up to but not including ``high``.

    Repeated ids are drawn again until none is left. Which ones are depends only on which ids are equal, not on what
    they are; so no id is preferred, and every ordered choice is equally likely.
    """
    ids = torch.randint(low, high, (batch, count), generator=generator, device=generator.device)
    open_rows = torch.arange(batch, device=generator.device)
    while len(open_rows):
        drawn = ids[open_rows]
        # A stable sort keeps the first of equal ids first: an unstable one could choose by what the ids are.
        ordered, order = drawn.sort(dim=1, stable=True)
        repeated = torch.zeros_like(drawn, dtype=torch.bool)
        repeated.scatter_(1, order[:, 1:], ordered[:, 1:] == ordered[:, :-1])
        fresh = torch.randint(low, high, drawn.shape, generator=generator, device=generator.device)
        ids[open_rows] = torch.where(repeated, fresh, drawn)
        open_rows = open_rows[repeated.any(1)]
    return ids


class MQARBatches(Dataset[Batch]):
    """Numbered batches that go round the segments, ``batches`` of each in turn."""

    def __init__(
        self, segments: Sequence[Segment], *, batch_size: int, vocab_size: int, random_non_queries: bool, seed: int
    ) -> None:
        self.segments = segments
        self.ends = list(accumulate(segment.batches for segment in segments))
        self.batch_size = batch_size
        self.vocab_size = vocab_size
        self.random_non_queries = random_non_queries
        self.seed = seed

    def __getitem__(self, number: int) -> Batch:
        segment = self.segments[bisect_right(self.ends, number % self.ends[-1])]
        tokens, labels = mqar(
            self.batch_size,
            length=segment.length,
            pairs=segment.pairs,
            vocab_size=self.vocab_size,
            random_non_queries=self.random_non_queries,
            generator=numbered_generator("training", seed=self.seed, number=number),
        )
        return {"tokens": tokens, "labels": labels}


class MQARData(L.LightningDataModule):
    """Endless rows of multi-query associative recall, and fixed rows of each validation segment to score.

    A training batch comes from one segment. Batch i depends on the settings and i only; validation and test rows are
    the same for every seed and batch size, differ from each other, and share no randomness with training.

    Args:
        train_segments: what to train on, in turn and round and round; none for the paper's smallest, 64 tokens and
            4 pairs.
        validation_segments: what to score, one dataloader each, in the order of ``validation_names``; none for the
            training segments. Lengths and numbers of pairs beyond training are welcome.
        batch_size: rows in a batch.
        vocab_size: tokens there are; more than the longest row.
        random_non_queries: fill the places that are neither pair nor question with random tokens, instead of 0.
        seed: which of the endless streams of training batches.
        validation_rows: rows of each validation segment.
        num_workers: processes that prepare training batches ahead; 0 prepares them in the training process.

    Raises:
        ValueError: a setting is out of its range, or a segment cannot be drawn.
    """

    def __init__(
        self,
        *,
        train_segments: Sequence[Segment] = (),
        validation_segments: Sequence[Segment] = (),
        batch_size: int = 64,
        vocab_size: int = 8192,
        random_non_queries: bool = True,
        seed: int = 0,
        validation_rows: int = 1000,
        num_workers: int = 0,
    ) -> None:
        super().__init__()
        require_at_least(1, batch_size=batch_size, validation_rows=validation_rows)
        require_at_least(0, num_workers=num_workers)
        self.train_segments = list(train_segments) or [Segment(64, 4)]
        named = {segment.name: segment for segment in validation_segments or self.train_segments}
        if len(named) < len(validation_segments):
            names = [segment.name for segment in validation_segments]
            raise ValueError(f"validation_segments={names}: expected each length and number of pairs once")
        for segment in [*self.train_segments, *named.values()]:
            _check_settings(length=segment.length, pairs=segment.pairs, vocab_size=vocab_size)
            require_at_least(1, batches=segment.batches)
        self.validation_segments = list(named.values())
        self.batch_size = batch_size
        self.vocab_size = vocab_size
        self.random_non_queries = random_non_queries
        self.seed = seed
        self.validation_rows = validation_rows
        self.num_workers = num_workers

    @property
    def validation_names(self) -> list[str]:
        """One name a validation and test dataloader, such as ``T64_K4``."""
        return [segment.name for segment in self.validation_segments]

    def train_dataloader(self) -> TrainingLoader:
        """Endless batches from where training stopped."""
        batches = MQARBatches(
            self.train_segments,
            batch_size=self.batch_size,
            vocab_size=self.vocab_size,
            random_non_queries=self.random_non_queries,
            seed=self.seed,
        )
        return TrainingLoader(batches, trainer=self.trainer, num_workers=self.num_workers)

    def val_dataloader(self) -> list[DataLoader[Batch]]:
        """One loader a validation segment."""
        return self._fixed_loaders("validation")

    def test_dataloader(self) -> list[DataLoader[Batch]]:
        """The same segments with rows that validation never showed."""
        return self._fixed_loaders("test")

    def _fixed_loaders(self, stream: Literal["validation", "test"]) -> list[DataLoader[Batch]]:
        loaders = []
        for number, segment in enumerate(self.validation_segments):
            tokens, labels = mqar(
                self.validation_rows,
                length=segment.length,
                pairs=segment.pairs,
                vocab_size=self.vocab_size,
                random_non_queries=self.random_non_queries,
                generator=numbered_generator(stream, seed=0, number=number),
            )
            parts = zip(tokens.split(self.batch_size), labels.split(self.batch_size), strict=True)
            loaders.append(fixed_loader([{"tokens": part, "labels": answers} for part, answers in parts]))
        return loaders
