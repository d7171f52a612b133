"""Numbered batches, drawn by counting (after Salmon et al. 2011, https://doi.org/10.1145/2063384.2063405).

Batch i is a function of the seed and i alone. So training data never runs out and needs no storage, every process
draws its own share, and a run that stopped goes on with exactly the batch that it would have trained on next.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from itertools import count, cycle
from typing import Literal

import lightning as L
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

Batch = dict[str, Tensor]
STREAMS = ("training", "validation", "test")


def numbered_generator(stream: Literal["training", "validation", "test"], *, seed: int, number: int) -> torch.Generator:
    """The random numbers of one batch.

    torch keeps only 32 bits of a CPU generator's seed. Two of them name the stream, so held-out batches never share
    numbers with the training of any seed; the other 30 are a one-to-one function of ``number`` that depends on
    ``seed``, so no two batches of a run share theirs.

    Args:
        stream: what the batch is for.
        seed: the run's seed.
        number: which batch of the stream; the numbers repeat after 2**30 batches.
    """
    digest = hashlib.sha256(str(seed).encode()).digest()
    odd_factor, shift = int.from_bytes(digest[:4], "big") | 1, int.from_bytes(digest[4:8], "big")
    scrambled = (odd_factor * number + shift) % 2**30
    return torch.Generator().manual_seed(4 * scrambled + STREAMS.index(stream))


def batch_numbers(first: int, *, rank: int = 0, processes: int = 1, repeated: int = 0) -> Iterator[int]:
    """Numbers of the batches that one process trains on, without end.

    The processes take turns, so that N of them train on what one would with ``accumulate_grad_batches=N``.

    Args:
        first: the next batch that no process has trained on.
        rank: which of the processes asks.
        processes: how many train together.
        repeated: where not 0, each process trains again and again on its first ``repeated`` batches.
    """
    if repeated:
        return cycle(range(rank, repeated * processes, processes))
    return count(first + rank, processes)


class TrainingLoader:
    """Endless training batches, beginning with the first that the trainer has not trained on.

    The count is the trainer's own: it stands in every checkpoint and moves when a batch has been trained on, not when
    it was drawn, so neither prefetching nor workers nor gradient accumulation can shift it. The loader's state is
    that count over all processes, for a run that goes on with another number of processes.

    Args:
        batches: item i is batch number i.
        trainer: whose training it feeds; None begins at batch 0.
        num_workers: processes that prepare batches ahead; 0 prepares them in the training process.
    """

    def __init__(self, batches: Dataset[Batch], *, trainer: L.Trainer | None, num_workers: int) -> None:
        self.batches = batches
        self.trainer = trainer
        self.num_workers = num_workers
        self.offset = 0

    def __iter__(self) -> Iterator[Batch]:
        # A fraction of an endless stream means nothing; the trainer itself refuses it.
        overfit = getattr(self.trainer, "overfit_batches", 0)
        rank, processes = self._share()
        numbers = batch_numbers(
            self._trained() + self.offset,
            rank=rank,
            processes=processes,
            repeated=overfit if isinstance(overfit, int) else 0,
        )
        return iter(_in_order(self.batches, numbers, self.num_workers))

    def _trained(self) -> int:
        if self.trainer is None:
            return 0
        progress = self.trainer.fit_loop.epoch_loop.batch_progress.total.state_dict()
        return progress["processed"] * self._share()[1]

    def _share(self) -> tuple[int, int]:
        # Not the trainer's world size: the ranks that hold parts of one model must see the same rows.
        share = self.trainer and self.trainer.distributed_sampler_kwargs
        return (share["rank"], share["num_replicas"]) if share else (0, 1)

    def state_dict(self) -> dict[str, int]:
        """The number of the next batch, over all processes."""
        return {"next_batch": self._trained() + self.offset}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Go on at the batch that ``state`` names; called after the trainer has restored its own count."""
        self.offset = state["next_batch"] - self._trained()


def fixed_loader(batches: Sequence[Batch]) -> DataLoader[Batch]:
    """The same batches in the same order, every time."""
    return _in_order(batches)


def _in_order(batches, numbers=None, num_workers: int = 0) -> DataLoader[Batch]:
    # Its own generator, or else each pass would draw from the global one and change the model's dropout.
    return DataLoader(batches, batch_size=None, sampler=numbers, num_workers=num_workers, generator=torch.Generator())


def require_at_least(least: int, **settings: int) -> None:
    """Raise ValueError for the first of ``settings`` that is smaller than ``least``."""
    for name, value in settings.items():
        if value < least:
            raise ValueError(f"{name}={value}: expected at least {least}")
