"""Training data: numbered batches that any run resumes exactly, and text with whole files held out."""

import random
from itertools import islice
from pathlib import Path

import lightning as L
import pytest
import torch
from jsonargparse import ArgumentParser
from lightning.pytorch.callbacks import OnExceptionCheckpoint
from torch import nn

from seqzoo.data import TextData, batch_numbers, numbered_generator

LENGTH = 8


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Twelve different files, at three depths."""
    folder = tmp_path_factory.mktemp("corpus")
    (folder / "deep" / "er").mkdir(parents=True)
    for index in range(12):
        place = folder / ["", "deep", "deep/er"][index % 3]
        letters = random.Random(index).choices("abcdefgh \n", k=150 + 10 * index)
        (place / f"{index:02}.txt").write_text(f"<{index:02}" + "".join(letters))
    return folder


def text_data(files, **settings) -> TextData:
    settings = {"sequence_length": LENGTH, "batch_size": 4, "validation_batches": 3} | settings
    return TextData(files=str(files) if isinstance(files, Path) else files, **settings)


def tokens(batches) -> torch.Tensor:
    return torch.stack([batch["tokens"] for batch in batches])


class Recorder(L.LightningModule):
    """Trains one number, and keeps what it was shown."""

    def __init__(self, fails_at: int | None = None):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(()))
        self.fails_at = fails_at
        self.trained, self.validated = [], []

    def training_step(self, batch, batch_idx):
        if len(self.trained) == self.fails_at:
            raise RuntimeError("power cut")
        self.trained.append(batch["tokens"].clone())
        return self.weight * batch["tokens"].float().mean()

    def validation_step(self, batch, batch_idx):
        if not self.trainer.sanity_checking:
            self.validated.append(batch["tokens"].clone())

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def fit(data: TextData, work: Path, *, module=None, checkpoint: Path | None = None, **settings) -> Recorder:
    module = module or Recorder()
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    settings = quiet | {"enable_checkpointing": False} | settings
    trainer = L.Trainer(accelerator="cpu", default_root_dir=work, **settings)
    trainer.fit(module, data, ckpt_path=checkpoint, weights_only=True)
    return module


class SaveEverywhere(L.Callback):
    """Saves at every moment at which callbacks save, and remembers how much was trained by then."""

    def __init__(self, folder: Path):
        self.folder, self.trained = folder, {}

    def save(self, trainer, module, moment):
        path = self.folder / f"{len(self.trained)}-{moment}.ckpt"
        self.trained[path] = len(module.trained)
        trainer.save_checkpoint(path)

    def on_train_batch_end(self, trainer, module, *_):
        self.save(trainer, module, "batch")

    def on_validation_end(self, trainer, module):
        if not trainer.sanity_checking:
            self.save(trainer, module, "validation")

    def on_train_epoch_end(self, trainer, module):
        self.save(trainer, module, "epoch")


RUNS = {
    "one epoch": {"max_steps": 4},
    "validating": {"max_steps": 4, "val_check_interval": 2, "check_val_every_n_epoch": None},
    "accumulating": {"max_steps": 3, "accumulate_grad_batches": 2, "val_check_interval": 3},
    "short epochs": {"max_steps": 4, "limit_train_batches": 2},
    "counting epochs": {"max_epochs": 2, "max_steps": -1, "limit_train_batches": 2},
}


@pytest.mark.filterwarnings("error:.*not resumable")
@pytest.mark.parametrize("settings", RUNS.values(), ids=RUNS)
def test_goes_on_with_the_next_batch_wherever_it_was_saved(folder, tmp_path, settings):
    saver = SaveEverywhere(tmp_path)
    straight = fit(text_data(folder), tmp_path, callbacks=[saver], **settings)
    expected = torch.stack(straight.trained)
    assert expected.flatten(1).unique(dim=0).shape[0] == len(expected) > 3
    for checkpoint, trained in saver.trained.items():
        resumed = fit(text_data(folder), tmp_path, checkpoint=checkpoint, **settings)
        assert torch.equal(torch.stack([*straight.trained[:trained], *resumed.trained]), expected), checkpoint.name


@pytest.mark.parametrize("num_workers", [1, 2])
def test_workers_that_draw_ahead_change_nothing(folder, tmp_path, num_workers):
    saver = SaveEverywhere(tmp_path)
    straight = fit(text_data(folder), tmp_path, max_steps=4)
    ahead = fit(text_data(folder, num_workers=num_workers), tmp_path, callbacks=[saver], max_steps=4)
    checkpoint = list(saver.trained)[1]
    resumed = fit(text_data(folder, num_workers=num_workers), tmp_path, checkpoint=checkpoint, max_steps=4)
    assert torch.equal(torch.stack(ahead.trained), torch.stack(straight.trained))
    assert torch.equal(torch.stack(resumed.trained), torch.stack(straight.trained[2:]))


def test_a_batch_that_failed_is_trained_again(folder, tmp_path):
    straight = fit(text_data(folder), tmp_path, max_steps=4)
    rescue = OnExceptionCheckpoint(tmp_path)
    rescued = {"enable_checkpointing": True, "callbacks": [rescue], "max_steps": 4}
    with pytest.raises(RuntimeError, match="power cut"):
        fit(text_data(folder), tmp_path, module=Recorder(fails_at=2), **rescued)
    resumed = fit(text_data(folder), tmp_path, checkpoint=Path(rescue.ckpt_path), max_steps=4)
    assert torch.equal(torch.stack(resumed.trained), torch.stack(straight.trained[2:]))


def test_overfits_on_the_batches_it_is_told_to(folder, tmp_path):
    shown = torch.stack(fit(text_data(folder), tmp_path, overfit_batches=2, max_epochs=3).trained)
    assert torch.equal(shown[:2], shown[2:4]) and torch.equal(shown[:2], shown[4:]) and len(shown) == 6


def test_goes_on_with_another_number_of_processes(folder):
    loader = text_data(folder).train_dataloader()
    loader.load_state_dict({"next_batch": 3})
    assert loader.state_dict() == {"next_batch": 3}
    assert torch.equal(tokens(islice(loader, 2)), tokens(islice(text_data(folder).train_dataloader(), 3, 5)))


def test_processes_share_out_the_batches_of_one():
    shares = torch.tensor([list(islice(batch_numbers(12, rank=rank, processes=3), 4)) for rank in range(3)])
    assert shares.T.flatten().tolist() == list(islice(batch_numbers(12), 12)) == list(range(12, 24))
    repeated = [list(islice(batch_numbers(12, rank=rank, processes=3, repeated=2), 4)) for rank in range(3)]
    assert repeated == [[0, 3, 0, 3], [1, 4, 1, 4], [2, 5, 2, 5]]


def test_no_two_batches_share_randomness():
    """Over streams, seeds and numbers, by what comes out, since torch drops the upper half of a long seed."""
    streams = ("training", "validation", "test")
    numbers = [*range(100), *range(2**29, 2**29 + 100)]
    cases = [(stream, seed, number) for stream in streams for seed in (0, 1, 2**40) for number in numbers]
    draws = [torch.rand(4, generator=numbered_generator(s, seed=k, number=n)) for s, k, n in cases]
    assert len(torch.stack(draws).unique(dim=0)) == len(cases)
    again = numbered_generator("test", seed=2**40, number=numbers[-1])
    assert torch.equal(torch.rand(4, generator=again), draws[-1])


def test_drawing_data_leaves_the_global_generator_alone(folder):
    data = text_data(folder)
    before = torch.get_rng_state()
    list(islice(data.train_dataloader(), 2)), list(data.val_dataloader())
    assert torch.equal(torch.get_rng_state(), before)


def test_validation_never_changes(folder, tmp_path):
    twice = {"max_steps": 4, "val_check_interval": 2, "check_val_every_n_epoch": None}
    first = torch.stack(fit(text_data(folder), tmp_path, **twice).validated)
    other_seed = tokens(text_data(folder, seed=1).val_dataloader())
    assert torch.equal(first[:3], first[3:]) and torch.equal(first[:3], other_seed)


def test_training_batches_depend_on_seed_and_number_only(folder):
    first = tokens(islice(text_data(folder).train_dataloader(), 6))
    assert torch.equal(first, tokens(islice(text_data(folder).train_dataloader(), 6)))
    other = tokens(islice(text_data(folder, seed=1).train_dataloader(), 6))
    assert not (first == other).flatten(1).all(1).any()


def text(document: torch.Tensor) -> str:
    return bytes(document.tolist()).decode()


def test_whole_files_are_held_out(folder):
    data = text_data(folder, validation_fraction=0.3)
    files = {path.read_text() for path in folder.rglob("*.txt")}
    training, held_out = ({text(document) for document in corpus.documents()} for corpus in data.corpora)
    assert training | held_out == files and not training & held_out
    assert 0.2 < sum(map(len, held_out)) / sum(map(len, files)) <= 0.3
    assert {text(document) for document in data.held_out_documents()} == held_out


def test_what_is_held_out_depends_on_names_only(folder, tmp_path):
    moved = tmp_path / "elsewhere"
    for path in folder.rglob("*.txt"):
        copy = moved / path.relative_to(folder)
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_bytes(path.read_bytes())
    (moved / "empty.txt").touch()
    corpora = (text_data(place, validation_fraction=0.3).corpora for place in (folder, moved))
    for mine, theirs in zip(*corpora, strict=True):
        assert torch.equal(mine.text, theirs.text) and torch.equal(mine.bounds, theirs.bounds)


def test_files_are_laid_out_by_relative_path(folder):
    names = [path.relative_to(folder).as_posix() for path in folder.rglob("*.txt")]
    expected = [(folder / name).read_text() for name in sorted(names)]
    training, held_out = ([text(each) for each in corpus.documents()] for corpus in text_data(folder).corpora)
    assert training == [each for each in expected if each in training]
    assert held_out == [each for each in expected if each in held_out]


def test_windows_say_where_files_begin_and_end(folder):
    """Every position of every window, against the files themselves."""
    data = text_data(folder)
    corpus = data.corpora[0]
    documents = [each.tolist() for each in corpus.documents()]
    joined = [byte for each in documents for byte in each]
    firsts = [place == 0 for each in documents for place in range(len(each))]
    nexts = [byte for each in documents for byte in [*each[1:], -100]]
    offsets = torch.arange(len(joined) - LENGTH + 1)
    windows = corpus.windows(offsets, LENGTH)
    for offset in offsets.tolist():
        stretch = slice(offset, offset + LENGTH)
        assert windows["tokens"][offset].tolist() == joined[stretch]
        assert windows["starts"][offset].tolist() == firsts[stretch]
        assert windows["labels"][offset].tolist() == nexts[stretch]
    batch = next(iter(data.train_dataloader()))
    assert {name: (tuple(x.shape), x.dtype) for name, x in batch.items()} == {
        "tokens": ((4, LENGTH), torch.long),
        "labels": ((4, LENGTH), torch.long),
        "starts": ((4, LENGTH), torch.bool),
    }


def test_windows_begin_anywhere_in_the_training_text(tmp_path):
    (tmp_path / "one.txt").write_bytes(bytes(range(100)))
    data = text_data(tmp_path / "one.txt", validation_fraction=0.2, batch_size=64)
    firsts = tokens(islice(data.train_dataloader(), 20))[..., 0]
    assert firsts.unique().tolist() == list(range(80 - LENGTH + 1))
    assert tokens(data.val_dataloader())[..., 0].unique().tolist() == list(range(80, 100 - LENGTH + 1))


def test_of_a_single_file_the_end_is_held_out(tmp_path):
    (tmp_path / "one.txt").write_text("a" * 180 + "b" * 20)
    data = text_data(tmp_path / "one.txt", validation_fraction=0.1)
    assert [text(each) for each in data.held_out_documents()] == ["b" * 20]
    assert [text(each) for each in data.corpora[0].documents()] == ["a" * 180]


def test_files_folders_and_patterns_name_the_same_text(folder):
    whole = text_data(folder)
    named = [str(path) for path in sorted(folder.rglob("*.txt"), key=lambda path: path.relative_to(folder).as_posix())]
    pattern = text_data(str(folder / "**" / "*.txt"))
    assert torch.equal(pattern.corpora[0].text, whole.corpora[0].text)
    for files in ([*named, str(folder)], [str(folder), str(folder)]):
        again = text_data(files)
        assert sum(len(corpus.text) for corpus in again.corpora) == sum(len(corpus.text) for corpus in whole.corpora)


def test_says_how_many_files_are_not_text(folder, tmp_path, caplog):
    for index in range(2):
        (tmp_path / f"{index}.txt").write_text("é" * 20)
    (tmp_path / "image.png").write_bytes(b"\xff\xfe\x00" * 50)
    (tmp_path / "cut.txt").write_bytes("é".encode()[:1])
    (tmp_path / ".hidden").write_text("no")
    data = text_data(tmp_path)
    with caplog.at_level("INFO"):
        data.setup()
    assert sum(len(corpus.text) for corpus in data.corpora) == 80
    assert "skipped 2 files" in caplog.text
    named = text_data([str(tmp_path / "image.png")])
    assert sum(len(corpus.text) for corpus in named.corpora) == 150


def test_the_standard_library_is_there_without_a_download():
    data = TextData()
    assert sum(len(corpus.text) for corpus in data.corpora) > 10e6
    assert len(data.held_out_documents()) > 10


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"sequence_length": 0}, "sequence_length=0: expected at least 1"),
        ({"batch_size": 0}, "batch_size=0: expected at least 1"),
        ({"validation_batches": 0}, "validation_batches=0: expected at least 1"),
        ({"num_workers": -1}, "num_workers=-1: expected at least 0"),
        ({"validation_fraction": 0.0}, "validation_fraction=0.0: expected a number between 0 and 1"),
        ({"validation_fraction": 1.0}, "validation_fraction=1.0: expected a number between 0 and 1"),
    ],
)
def test_refuses_a_setting_out_of_range(settings, message):
    with pytest.raises(ValueError, match=message):
        TextData(**settings)


@pytest.mark.parametrize(
    ("files", "settings", "message"),
    [
        ("missing.txt", {}, "files: .*missing.txt does not exist"),
        ("missing/*.txt", {}, r"files: no file matches .*missing/\*.txt"),
        ("empty", {}, r"files=\['.*empty'\]: there is no text \(empty files: 1, not UTF-8: 0\)"),
        ("binary", {}, r"there is no text \(empty files: 0, not UTF-8: 1\)"),
        ("small.txt", {"sequence_length": 100}, "sequence_length=100: the training text has 81 of .* 90 bytes"),
        ("small.txt", {"sequence_length": 16}, "held-out text has 9 of .* sequence_length of at most 9 fits"),
    ],
)
def test_refuses_text_that_is_not_there(tmp_path, files, settings, message):
    for name in ("empty", "binary"):
        (tmp_path / name).mkdir()
    (tmp_path / "empty" / "nothing.txt").touch()
    (tmp_path / "binary" / "image.png").write_bytes(b"\xff")
    (tmp_path / "small.txt").write_text("a" * 90)
    with pytest.raises(ValueError, match=message):
        text_data(tmp_path / files, validation_fraction=0.1, **settings).setup()


@pytest.mark.parametrize("files", ["", "one.txt"])
def test_names_a_file_that_cannot_be_read(tmp_path, monkeypatch, files):
    (tmp_path / "one.txt").write_text("a" * 400)

    def refuse(path, *_):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(Path, "open", refuse)
    with pytest.raises(ValueError, match=r"files: cannot read .*one.txt: Permission denied"):
        text_data(tmp_path / files).setup()


def test_is_built_from_yaml_and_written_back(folder):
    parser = ArgumentParser(exit_on_error=False)
    parser.add_subclass_arguments(L.LightningDataModule, "data")
    for files in (f"[{folder}]", str(folder)):
        arguments = ["--data=seqzoo.data.TextData", f"--data.files={files}", "--data.sequence_length=8"]
        config = parser.parse_string(parser.dump(parser.parse_args(arguments)))
        assert torch.equal(parser.instantiate(config).data.corpora[0].text, text_data(folder).corpora[0].text)
