"""Evaluations: what is measured is what a plain computation gives, and the tables, files and pictures say so."""

from __future__ import annotations

import csv
import io
import math
import subprocess
import sys
from dataclasses import replace
from functools import partial
from itertools import pairwise

import pytest
import recall_per_byte
import torch
import torch.nn.functional as F
from matplotlib.text import Text
from rich.console import Console
from torch import nn

import seqzoo.evals
from seqzoo.evals import report as show
from seqzoo.evals.length_generalization import (
    LengthReport,
    length_table,
    measure_lengths,
    plot_lengths,
    write_length_curves,
    write_lengths,
)
from seqzoo.evals.recall import (
    RecallAccuracy,
    RecallResult,
    plot_recall,
    recall_table,
    write_recall,
    write_recall_curves,
)
from seqzoo.layers import FAMILIES, Attention, GatedDeltaNet, ShortConv
from seqzoo.models import LanguageModel

TRAIN_LENGTH = 8


def make_net(layer=GatedDeltaNet) -> LanguageModel:
    torch.manual_seed(0)
    return LanguageModel(vocab_size=256, dim=16, pattern=["mixer"], layers={"mixer": partial(layer, num_heads=2)})


def make_documents(*lengths: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(256, (length,), dtype=torch.uint8, generator=generator) for length in lengths]


class Uniform(nn.Module):
    """Says that all ``vocab`` tokens are equally likely, and remembers nothing."""

    def __init__(self, vocab: int) -> None:
        super().__init__()
        self.level = nn.Parameter(torch.zeros(vocab))

    def forward(self, tokens, state=None):
        return self.level.expand(*tokens.shape, -1), ()


class Certain(nn.Module):
    """Puts the loss ``levels[token]`` on the token 255 after ``token``; so a document chooses its own losses."""

    def __init__(self, levels: list[float]) -> None:
        super().__init__()
        self.levels = nn.Parameter(torch.tensor(levels))

    def forward(self, tokens, state=None):
        wanted = self.levels[tokens]
        logits = torch.full((*tokens.shape, 256), -math.inf)
        logits[..., 255] = -wanted
        logits[..., 0] = torch.log1p(-torch.exp(-wanted))
        return logits, ()


@pytest.mark.parametrize("layer", [GatedDeltaNet, Attention])
@pytest.mark.parametrize("chunk", [1, 5, None, 64])
def test_losses_do_not_depend_on_the_chunk(layer, chunk):
    net, (document,) = make_net(layer), make_documents(33)
    report = measure_lengths(net, [document], train_length=TRAIN_LENGTH, multiples=(1, 4), chunk=chunk)
    logits, _ = net(document[None, :-1].long())
    expected = F.cross_entropy(logits[0], document[1:].long(), reduction="none")
    torch.testing.assert_close(report.losses[0], expected.detach(), atol=1e-5, rtol=1e-5)
    assert report.rows[0].loss == pytest.approx(expected[:8].mean().item(), abs=1e-5)
    assert report.rows[1].loss == pytest.approx(expected.mean().item(), abs=1e-5)
    assert report.rows[1].depth_loss == pytest.approx(expected[-8:].mean().item(), abs=1e-5)


def test_losses_do_not_depend_on_the_batch():
    net, documents = make_net(), make_documents(33, 40, 33)
    one, many = (
        measure_lengths(net, documents, train_length=TRAIN_LENGTH, multiples=(4,), windows=3, batch=batch)
        for batch in (1, 2)
    )
    torch.testing.assert_close(one.losses, many.losses, atol=1e-5, rtol=1e-5)
    assert one.rows[0].state_bytes == many.rows[0].state_bytes


def test_a_uniform_predictor_loses_log_vocab_everywhere():
    report = measure_lengths(Uniform(256), make_documents(100), train_length=TRAIN_LENGTH, multiples=(1, 12))
    torch.testing.assert_close(report.loss_by_position, torch.full((96,), math.log(256)))
    for row in report.rows:
        assert row.loss == row.depth_loss == pytest.approx(math.log(256))
        assert row.perplexity == pytest.approx(256)
        assert row.bits_per_byte == pytest.approx(8)
        assert row.state_bytes == 0 and row.tokens_per_second > 0
    assert all(point.loss == pytest.approx(math.log(256)) for point in report.curve())


def test_means_and_standard_errors_are_those_of_known_losses():
    # The loss after token t is levels[t]: one window loses 1 3 3 3 nats, the other 5 3 3 3.
    net = Certain([1.0, 5.0] + [3.0] * 254)
    documents = [torch.tensor([first, 255, 255, 255, 255], dtype=torch.uint8) for first in (0, 1)]
    report = measure_lengths(net, documents, train_length=2, multiples=(1, 2))
    torch.testing.assert_close(report.losses, torch.tensor([[1.0, 3, 3, 3], [5, 3, 3, 3]]))
    torch.testing.assert_close(report.loss_by_position, torch.full((4,), 3.0))
    torch.testing.assert_close(report.standard_error, torch.tensor([2.0, 0, 0, 0]))
    first, second = report.rows
    assert (first.loss, first.loss_error) == (pytest.approx(3), pytest.approx(1))
    assert (second.loss, second.loss_error) == (pytest.approx(3), pytest.approx(0.5))
    assert (second.depth_loss, second.depth_loss_error) == (pytest.approx(3), pytest.approx(0, abs=1e-6))


def test_one_window_has_no_standard_error():
    report = measure_lengths(Uniform(256), make_documents(9), train_length=TRAIN_LENGTH, multiples=(1,))
    assert report.standard_error.isnan().all() and math.isnan(report.rows[0].loss_error)


def test_bins_take_windows_as_the_sample():
    # Two windows that differ by 2 everywhere: averaging over a window's positions must not shrink the error.
    losses = torch.stack([torch.ones(40), torch.full((40,), 3.0)])
    points = LengthReport(losses, train_length=40, documents=2, rows=()).curve()
    assert [(point.loss, point.loss_error) for point in points] == [(2, pytest.approx(1))] * len(points)


@pytest.mark.parametrize("train_length", [8, 10, 100])
def test_one_bin_ends_at_the_training_length(train_length):
    losses = torch.zeros(1, 4 * train_length)
    losses[:, train_length:] = 1
    report = LengthReport(losses, train_length=train_length, documents=1, rows=())
    assert {point.loss for point in report.curve()} == {0, 1}


def test_state_is_measured():
    multiples, documents = (1, 2, 4), make_documents(33, 33)
    constant = measure_lengths(make_net(), documents, train_length=TRAIN_LENGTH, multiples=multiples)
    assert {row.state_bytes for row in constant.rows} == {make_net().state_bytes(TRAIN_LENGTH)}
    growing = measure_lengths(make_net(Attention), documents, train_length=TRAIN_LENGTH, multiples=multiples)
    sizes = [row.state_bytes for row in growing.rows]
    assert sizes == sorted(set(sizes))


def test_windows_come_from_beginnings_first_and_share_no_prediction():
    documents = [torch.arange(begin, begin + size, dtype=torch.uint8) for begin, size in ((0, 41), (100, 9), (200, 17))]
    seen = []

    class Spy(Uniform):
        def forward(self, tokens, state=None):
            seen.append(tokens[:, 0].tolist())
            return super().forward(tokens, state)

    report = measure_lengths(Spy(256), documents, train_length=16, multiples=(1,), windows=8)
    assert seen[-1] == [0, 200, 16]
    assert (report.windows, report.documents) == (3, 2)
    report = measure_lengths(Spy(256), documents, train_length=16, multiples=(1,), windows=2)
    assert seen[-1] == [0, 200]


def test_a_net_is_read_in_eval_mode_and_given_back_as_it_was():
    net = nn.Sequential()
    net.body, net.frozen = Uniform(256), nn.Dropout().eval()
    net.forward = lambda tokens, state=None: (modes.append(net.training), net.body(tokens))[1]
    modes = []
    report = measure_lengths(net, make_documents(20), train_length=TRAIN_LENGTH, multiples=(1, 2))
    assert set(modes) == {False}
    assert net.training and net.body.training and not net.frozen.training
    assert not report.losses.is_inference()


def test_too_short_documents_say_what_would_fit():
    with pytest.raises(ValueError, match=r"4 x train_length=8 needs a document of 33 tokens.* has 32; .* fits is 3"):
        measure_lengths(make_net(), make_documents(32, 5), train_length=8, multiples=(1, 4))
    with pytest.raises(ValueError, match="the longest of 0 has 0; not even multiple 1 fits"):
        measure_lengths(make_net(), [], train_length=8)


@pytest.mark.parametrize(
    ("setting", "value"), [("train_length", 0), ("chunk", 0), ("windows", -1), ("batch", 0), ("multiples", (0, 1))]
)
def test_settings_out_of_range_are_refused_by_name(setting, value):
    settings = {"train_length": 8, "multiples": (1,), setting: value}
    with pytest.raises(ValueError, match=f"{setting}=.*at least"):
        measure_lengths(make_net(), make_documents(33), **settings)


@pytest.fixture(scope="module")
def reports() -> dict[str, LengthReport]:
    return {
        name: measure_lengths(make_net(layer), make_documents(65, 65), train_length=8, multiples=(1, 2, 8))
        for name, layer in {"delta": GatedDeltaNet, "attention": Attention}.items()
    }


@pytest.fixture
def results() -> list[RecallResult]:
    common = {"vocab_size": 64, "num_pairs": 4, "parameters": 7000, "steps": 200, "seconds": 10.5}
    return [
        RecallResult("window", {"T32_K4": 0.25, "T64_K8": 0.15}, [(0, 0.0), (200, 0.2)], state_bytes=2048, **common),
        RecallResult("delta", {"T32_K4": 0.99}, [(0, 0.0), (100, 0.9), (200, 0.99)], state_bytes=4096, **common),
        RecallResult("mlp", {"T32_K4": 0.03}, [], state_bytes=0, **common),
    ]


def read_csv(path) -> list[dict[str, str]]:
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def test_length_files_read_back(reports, tmp_path):
    write_lengths(reports, tmp_path / "new" / "lengths.csv")
    rows = read_csv(tmp_path / "new" / "lengths.csv")
    assert [(row["model"], int(row["tokens"])) for row in rows] == [
        (name, tokens) for name in reports for tokens in (8, 16, 64)
    ]
    last = reports["attention"].rows[-1]
    assert float(rows[-1]["loss"]) == last.loss and int(rows[-1]["state_bytes"]) == last.state_bytes
    assert rows[-1]["windows"] == rows[-1]["documents"] == "2"

    write_length_curves(reports, tmp_path / "curves.csv")
    rows = read_csv(tmp_path / "curves.csv")
    assert len(rows) == sum(len(report.curve()) for report in reports.values())
    assert float(rows[0]["loss"]) == reports["delta"].curve()[0].loss


def test_recall_files_read_back_best_first(results, tmp_path):
    write_recall(results, tmp_path / "recall.csv")
    rows = read_csv(tmp_path / "recall.csv")
    assert [row["name"] for row in rows] == ["delta", "window", "mlp"]
    assert [float(row["accuracy"]) for row in rows] == pytest.approx([0.99, 0.2, 0.03])
    assert [row["accuracy_T64_K8"] for row in rows] == ["", "0.15", ""]
    assert (float(rows[0]["chance"]), float(rows[0]["floor"])) == (1 / 32, 1 / 4)

    write_recall_curves(results, tmp_path / "curves.csv")
    rows = read_csv(tmp_path / "curves.csv")
    assert [(row["name"], int(row["step"])) for row in rows] == [
        ("window", 0), ("window", 200), ("delta", 0), ("delta", 100), ("delta", 200)
    ]  # fmt: skip


def test_nothing_to_write_or_draw_is_an_error(tmp_path):
    for make in (write_lengths, plot_lengths):
        with pytest.raises(ValueError, match="nothing to"):
            make({}, tmp_path / "file")
    for make in (write_recall, write_recall_curves, plot_recall):
        with pytest.raises(ValueError, match="nothing to"):
            make([], tmp_path / "file")
    assert not list(tmp_path.iterdir())


def test_two_results_of_one_name_are_not_drawn(results, tmp_path):
    with pytest.raises(ValueError, match="named window, delta, mlp, delta: every name may stand once"):
        plot_recall([*results, results[1]], tmp_path / "recall.png")


def test_tables_fit_eighty_columns_and_name_everything(reports, results):
    for table, words in (
        (length_table(reports), ["delta", "attention", "8x", "64", "KiB", "2 windows of 2 documents"]),
        (recall_table(results), ["delta", "0.990", "4 KiB", "1/32", "1/4", "7,000", "-"]),
    ):
        console = Console(width=80, record=True, file=io.StringIO())
        console.print(table)
        text = console.export_text()
        assert all(word in text for word in words), text
        assert "…" not in text


def test_pictures_are_written(reports, results, tmp_path):
    plot_lengths(reports, tmp_path / "new" / "lengths.png")
    plot_recall(results, tmp_path / "recall.png")
    for path in (tmp_path / "new" / "lengths.png", tmp_path / "recall.png"):
        content = path.read_bytes()
        assert content.startswith(b"\x89PNG") and len(content) > 10_000
        assert int.from_bytes(content[16:20], "big") == 1500  # pixels wide


def test_a_loss_that_is_not_finite_can_be_drawn(tmp_path):
    sound = measure_lengths(Uniform(256), make_documents(65, 65), train_length=8, multiples=(1, 8))
    late = sound.losses.index_fill(1, torch.arange(32, 64), math.nan)
    broken = {"late": replace(sound, losses=late), "all": replace(sound, losses=late * math.nan)}
    plot_lengths(broken, tmp_path / "lengths.png")
    assert (tmp_path / "lengths.png").stat().st_size > 10_000


@pytest.mark.parametrize("wanted", [[], [0.5], [1.0] * 5, [0.0, 0.01, 0.5, 0.51, 1.0], [0.9, 0.1, 0.95, 0.12]])
def test_spread_keeps_order_gaps_and_bounds(wanted):
    places = show.spread(wanted, 0.1, 0.0, 1.0)
    for one, place in zip(wanted, places, strict=True):
        assert -1e-9 <= place <= 1 + 1e-9
        for other, other_place in zip(wanted, places, strict=True):
            assert one >= other or place < other_place
    ordered = sorted(places)
    assert all(high - low > 0.1 - 1e-9 for low, high in pairwise(ordered))


def test_spread_moves_nothing_that_has_room():
    assert show.spread([0.7, 0.1, 0.4], 0.1, 0.0, 1.0) == pytest.approx([0.7, 0.1, 0.4])
    assert show.spread([0.5, 0.5], 0.1, 0.0, 1.0) == pytest.approx([0.45, 0.55])


def test_names_of_points_cover_neither_names_nor_points():
    figure, (_, axes) = show.two_panels("title", "note", left_width=1.25)
    points = {f"model number {index}": (index % 3, 1.0, "black") for index in range(7)}
    axes.set(xlim=(-1, 3), ylim=(0, 1.1))
    show.label_points(figure, axes, points)
    figure.draw_without_rendering()
    boxes = [Text.get_window_extent(text) for text in axes.texts]  # an annotation's own extent holds its lead too
    assert len(boxes) == len(points)
    for index, box in enumerate(boxes):
        assert axes.bbox.containsx(box.x0) and axes.bbox.containsx(box.x1)
        assert not any(box.overlaps(other) for other in boxes[:index])
        assert not any(box.contains(*axes.transData.transform(point[:2])) for point in points.values())


def test_byte_sizes_are_worded_in_binary_units():
    assert [show.bytes_text(size) for size in (0, 1000, 1536, 3 << 20, 5 << 40)] == [
        "0 B", "1000 B", "1.5 KiB", "3 MiB", "5 TiB"
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"accuracy": {}}, "at least one segment"),
        ({"num_pairs": 0}, "num_pairs=0"),
        ({"vocab_size": 6}, "vocab_size=6"),
    ],
)
def test_impossible_recall_results_are_refused(changes, message):
    settings = {"accuracy": {"T32_K4": 1.0}, "history": [], "vocab_size": 64, "num_pairs": 4} | changes
    with pytest.raises(ValueError, match=message):
        RecallResult("delta", parameters=1, state_bytes=1, steps=1, seconds=1.0, **settings)


LABELS = torch.tensor([[5, -100, 6, 7, 8], [-100, 5, -100, -100, 6], [-100] * 5])


@pytest.mark.parametrize(
    ("predictions", "fraction", "whole"),
    [
        ([5, 6, 7, 8, 5, 6], 1, 1),
        ([5, 6, 7, 0, 5, 6], 0.875, 0.5),
        ([5, 0, 0, 0, 5, 6], 0.625, 0.5),
        ([0, 0, 0, 0, 0, 6], 0.25, 0),
    ],
)
def test_recall_accuracy_weighs_rows_alike(predictions, fraction, whole):
    for metric, expected in ((RecallAccuracy(), fraction), (RecallAccuracy(whole_rows=True), whole)):
        metric.update(torch.tensor(predictions), LABELS)
        assert metric.compute() == expected


def test_recall_accuracy_gathers_batches_and_forgets_on_reset():
    metric = RecallAccuracy()
    metric.update(torch.tensor([5, 6, 7, 8]), LABELS[:1])
    metric.update(torch.tensor([0, 0]), LABELS[1:])
    assert metric.compute() == 0.5
    metric.reset()
    metric.update(torch.tensor([0, 6]), LABELS[1:2])
    assert metric.compute() == 0.5
    metric.reset()
    metric.update(torch.tensor([], dtype=torch.long), LABELS[2:])
    assert metric.compute().isnan()


def test_recall_accuracy_of_two_processes_is_that_of_all_rows():
    halves = [RecallAccuracy(), RecallAccuracy()]
    halves[0].update(torch.tensor([5, 6, 7, 8]), LABELS[:1])
    halves[1].update(torch.tensor([0, 6]), LABELS[1:])
    states = [half.metric_state for half in halves]
    whole = RecallAccuracy()
    whole.right, whole.rows = (
        whole._reductions[name](torch.stack([state[name] for state in states])) for name in ("right", "rows")
    )
    whole._update_count = 1
    assert whole.compute() == 0.75


def test_recall_accuracy_refuses_predictions_that_do_not_match():
    with pytest.raises(ValueError, match="one for each of the 6 labelled positions"):
        RecallAccuracy().update(torch.tensor([5, 6]), LABELS)


def test_importing_evaluations_loads_nothing_heavy():
    program = (
        "import sys, seqzoo; before = set(sys.modules); import seqzoo.evals\n"
        "heavy = {'torchmetrics', 'matplotlib', 'rich', 'lightning'} & (set(sys.modules) - before)\n"
        "assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", program], check=True)
    assert seqzoo.evals.RecallAccuracy is RecallAccuracy


def test_a_misspelled_evaluation_is_named():
    with pytest.raises(ImportError, match="measure_length"):
        from seqzoo.evals import measure_length  # noqa: F401


def test_recall_per_byte_measured_every_mixer_and_its_page_says_so():
    command = "python scripts/recall_per_byte.py measures and writes it"
    runs = recall_per_byte.read_runs()
    mixers = {layer.__name__ for family, layers in FAMILIES.items() for layer in layers if family != "feed-forward"}
    for dim in recall_per_byte.WIDTHS:
        measured = {run["mixer"].partition(",")[0] for run in runs if run["dim"] == dim}
        assert measured == mixers - {ShortConv.__name__}, command
    assert recall_per_byte.missing(runs) == [], command
    assert recall_per_byte.PAGE.read_text() == recall_per_byte.written(runs), command
