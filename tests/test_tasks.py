"""Synthetic tasks: every row obeys the task's rules, and rows follow its law."""

from itertools import islice

import lightning as L
import numpy as np
import pytest
import torch
from jsonargparse import ArgumentParser

from seqzoo.tasks import MQARData, Segment
from seqzoo.tasks.mqar import mqar

SETTINGS = [
    {"length": 64, "pairs": 4, "vocab_size": 8192},
    {"length": 32, "pairs": 8, "vocab_size": 33},
    {"length": 256, "pairs": 64, "vocab_size": 512},
    {"length": 4, "pairs": 1, "vocab_size": 5},
]


def draw(batch: int, *, seed: int = 0, **settings) -> tuple[torch.Tensor, torch.Tensor]:
    return mqar(batch, **settings, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("random_non_queries", [True, False])
@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_every_row_obeys_the_rules(settings, random_non_queries):
    pairs, half = settings["pairs"], settings["vocab_size"] // 2
    rows, labels = draw(300, **settings, random_non_queries=random_non_queries)
    assert rows.shape == labels.shape == (300, settings["length"])
    assert rows.dtype == labels.dtype == torch.long and rows.min() >= 0 and rows.max() < settings["vocab_size"]
    for row, answers in zip(rows.tolist(), labels.tolist(), strict=True):
        keys, values = row[: 2 * pairs : 2], row[1 : 2 * pairs : 2]
        assert len(set(keys)) == len(set(values)) == pairs
        assert all(1 <= key < half for key in keys) and all(half <= value < settings["vocab_size"] for value in values)
        asked = [place for place, answer in enumerate(answers) if answer != -100]
        assert all(place >= 2 * pairs and place % 2 == 0 for place in asked)
        assert {row[place]: answers[place] for place in asked} == dict(zip(keys, values, strict=True))
        assert len(asked) == pairs
        if not random_non_queries:
            assert not any(row[place] for place in range(2 * pairs, len(row)) if place not in asked)


def test_random_non_queries_are_uniform_over_the_vocabulary():
    rows, labels = draw(4000, length=64, pairs=4, vocab_size=128, random_non_queries=True)
    others = rows[:, 8:][labels[:, 8:] == -100]
    counts = others.bincount(minlength=128)
    chi_square = ((counts - len(others) / 128) ** 2 / (len(others) / 128)).sum()
    assert chi_square < 127 + 5 * (2 * 127) ** 0.5


def test_keys_and_values_are_uniform_choices_without_replacement():
    """Against all ordered pairs of keys and of values, in so small a vocabulary that most draws collide."""
    rows, _ = draw(60_000, length=8, pairs=2, vocab_size=10)
    keys, values = rows[:, 0:4:2], rows[:, 1:4:2]
    for drawn, low, size in ((keys, 1, 4), (values, 5, 5)):
        counts = ((drawn[:, 0] - low) * size + drawn[:, 1] - low).bincount(minlength=size**2).view(size, size)
        assert not counts.diagonal().any()
        expected = len(rows) / (size * (size - 1))
        chi_square = ((counts - expected) ** 2 / expected).sum() - size * expected
        assert chi_square < size * (size - 1) + 5 * (2 * size * (size - 1)) ** 0.5


def test_questions_follow_the_law_of_sequential_draws():
    """Where the i-th key is asked for, against slots drawn one by one without replacement with weights j ** -0.99."""
    length, pairs, count = 32, 4, 20_000
    rows, labels = draw(count, length=length, pairs=pairs, vocab_size=8192, random_non_queries=False)
    slots = length // 2 - pairs
    question = (rows[:, None, 2 * pairs :: 2] == rows[:, 0 : 2 * pairs : 2, None]).long().argmax(2)
    weights = np.arange(1, slots + 1) ** (0.01 - 1)
    numpy = np.random.default_rng(0)
    drawn = np.stack([numpy.choice(slots, pairs, replace=False, p=weights / weights.sum()) for _ in range(count)])
    for key in range(pairs):
        ours = question[:, key].bincount(minlength=slots).double()
        theirs = torch.from_numpy(drawn[:, key]).bincount(minlength=slots).double()
        chi_square = ((ours - theirs) ** 2 / (ours + theirs)).sum()
        assert chi_square < slots - 1 + 5 * (2 * (slots - 1)) ** 0.5
    assert (labels != -100).sum() == count * pairs


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"length": 62, "pairs": 16}, "length=62: expected an even number of at least 4 \\* pairs = 64"),
        ({"length": 65, "pairs": 4}, "length=65: expected an even number"),
        ({"length": 64, "pairs": 0}, "pairs=0: expected at least 1"),
        ({"length": 64, "pairs": 4, "vocab_size": 64}, "vocab_size=64: expected more than length=64"),
        ({"length": 64, "pairs": 4, "power_a": 0.0}, "power_a=0.0: expected a number above 0"),
        ({"length": 64, "pairs": 4, "batch": 0}, "batch=0: expected at least 1"),
    ],
)
def test_refuses_what_cannot_be_drawn(settings, message):
    with pytest.raises(ValueError, match=message):
        draw(settings.pop("batch", 2), **settings)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"train_segments": [Segment(64, 32)]}, "length=64: expected an even number of at least 4 \\* pairs = 128"),
        (
            {"validation_segments": [Segment(64, 4), Segment(9000, 4)]},
            "vocab_size=8192: expected more than length=9000",
        ),
        ({"validation_segments": [Segment(64, 4), Segment(64, 4)]}, "T64_K4', 'T64_K4'.*each length .* once"),
        ({"train_segments": [Segment(64, 4, batches=0)]}, "batches=0: expected at least 1"),
        ({"batch_size": 0}, "batch_size=0: expected at least 1"),
        ({"validation_rows": 0}, "validation_rows=0: expected at least 1"),
        ({"num_workers": -1}, "num_workers=-1: expected at least 0"),
    ],
)
def test_refuses_settings_before_training(settings, message):
    with pytest.raises(ValueError, match=message):
        MQARData(**settings)


def test_training_goes_round_the_segments():
    segments = [Segment(16, 2, batches=2), Segment(32, 4), Segment(64, 8)]
    lengths = [batch["tokens"].shape for batch in islice(MQARData(train_segments=segments).train_dataloader(), 9)]
    assert lengths == [(64, time) for time in [16, 16, 32, 64] * 2 + [16]]


def test_training_rows_depend_on_seed_and_number_only():
    data = {seed: list(islice(MQARData(seed=seed).train_dataloader(), 3)) for seed in (0, 1)}
    again = list(islice(MQARData(num_workers=1).train_dataloader(), 3))
    assert all(torch.equal(one[name], two[name]) for one, two in zip(data[0], again, strict=True) for name in one)
    rows = torch.cat([batch["tokens"] for seed in data for batch in data[seed]])
    assert len(rows.unique(dim=0)) == len(rows)


def scored(data: MQARData, stream: str = "val") -> list[torch.Tensor]:
    return [torch.cat([batch["tokens"] for batch in loader]) for loader in getattr(data, f"{stream}_dataloader")()]


def test_validation_rows_are_fixed_and_told_apart_by_name():
    segments = [Segment(64, 4), Segment(64, 8), Segment(128, 8)]
    data = MQARData(validation_segments=segments, validation_rows=70)
    assert data.validation_names == ["T64_K4", "T64_K8", "T128_K8"]
    assert [tuple(rows.shape) for rows in scored(data)] == [(70, 64), (70, 64), (70, 128)]
    other = MQARData(validation_segments=segments, validation_rows=70, seed=5, batch_size=7)
    assert all(map(torch.equal, scored(data), scored(other)))
    pairs = [(batch["labels"] != -100).sum(1).unique().tolist() for loader in data.val_dataloader() for batch in loader]
    assert pairs == [[4], [4], [8], [8], [8], [8]]


def test_training_validation_and_test_rows_all_differ():
    data = MQARData(train_segments=[Segment(16, 4)], vocab_size=64, validation_rows=64)
    rows = [batch["tokens"] for batch in islice(data.train_dataloader(), 50)]
    rows = torch.cat([*rows, *scored(data), *scored(data, "test")])
    assert len(rows.unique(dim=0)) == len(rows) == 52 * 64


def test_validates_on_what_it_trains_on_by_default():
    assert MQARData().validation_names == ["T64_K4"]
    curriculum = [Segment(64, 4, batches=9), Segment(64, 8), Segment(64, 4)]
    assert MQARData(train_segments=curriculum).validation_names == ["T64_K4", "T64_K8"]


def test_is_built_from_yaml_and_written_back():
    parser = ArgumentParser(exit_on_error=False)
    parser.add_subclass_arguments(L.LightningDataModule, "data")
    segments = '[{"length": 32, "pairs": 2}, {"length": 64, "pairs": 4, "batches": 3}]'
    config = parser.parse_args(["--data=seqzoo.tasks.MQARData", f"--data.train_segments={segments}"])
    data = parser.instantiate(parser.parse_string(parser.dump(config))).data
    assert data.train_segments == [Segment(32, 2), Segment(64, 4, batches=3)]
    with pytest.raises(Exception, match="'pair' is not accepted"):
        parser.parse_args(["--data=seqzoo.tasks.MQARData", '--data.train_segments=[{"length": 32, "pair": 2}]'])
