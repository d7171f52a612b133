"""Language modelling byte by byte, with windows drawn from whole files (Graves 2013, https://arxiv.org/abs/1308.0850).

The paper reads one stream in order and carries the state on; here every window begins anew, so rows are independent.
"""

from __future__ import annotations

import codecs
import glob
import hashlib
import os
import sysconfig
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from pathlib import Path
from typing import ClassVar, NamedTuple, NoReturn

import lightning as L
import torch
from jaxtyping import Int, UInt8
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from seqzoo.announce import announce
from seqzoo.data.batches import Batch, TrainingLoader, fixed_loader, numbered_generator, require_at_least
from seqzoo.models.language_model import IGNORED

NOT_SOURCES = {"site-packages", "dist-packages", "__pycache__"}
BLOCK_BYTES = 1 << 20


class Document(NamedTuple):
    """A file, or the part of it that is ``size`` bytes from ``begin`` on; ``name`` is the same on every machine."""

    name: str
    path: Path
    begin: int
    size: int


@dataclass(frozen=True, eq=False)
class Corpus:
    """Documents laid end to end.

    Attributes:
        text: all bytes.
        bounds: where each document begins, and at last where the text ends.
    """

    text: UInt8[Tensor, " bytes"]
    bounds: Int[Tensor, " documents_plus_one"]

    def windows(self, offsets: Int[Tensor, " batch"], length: int) -> Batch:
        """Stretches of ``length`` bytes from each of ``offsets`` on; the last byte of a document predicts nothing."""
        positions = offsets[:, None] + torch.arange(length + 1)
        is_bound = self.bounds[torch.searchsorted(self.bounds, positions)] == positions
        window = self.text[positions.clamp_max(len(self.text) - 1)].long()
        labels = window[:, 1:].masked_fill(is_bound[:, 1:], IGNORED)
        return {"tokens": window[:, :-1], "labels": labels, "starts": is_bound[:, :-1]}

    def documents(self) -> list[UInt8[Tensor, " bytes"]]:
        """Each document by itself, as a view."""
        return [self.text[begin:end] for begin, end in self.bounds.unfold(0, 2, 1).tolist()]


class TextBatches(Dataset[Batch]):
    """Numbered batches of windows that begin anywhere in ``corpus``, evenly likely."""

    def __init__(self, corpus: Corpus, *, sequence_length: int, batch_size: int, seed: int) -> None:
        self.corpus = corpus
        self.sequence_length = sequence_length
        self.batch_size = batch_size
        self.seed = seed

    def __getitem__(self, number: int) -> Batch:
        generator = numbered_generator("training", seed=self.seed, number=number)
        places = len(self.corpus.text) - self.sequence_length + 1
        offsets = torch.randint(places, (self.batch_size,), generator=generator)
        return self.corpus.windows(offsets, self.sequence_length)


class TextData(L.LightningDataModule):
    """Bytes of text files (256 tokens), with whole files held out for validation.

    Batches hold ``tokens``, ``labels`` (the next byte; -100 at the end of a file) and ``starts`` (the first byte of a
    file). Training windows begin anywhere; batch i depends on ``seed`` and i only. Validation windows stand evenly
    spaced over the held-out text, the same for every seed.

    Args:
        files: text files, folders and glob patterns, or one of them; nothing means the sources of Python's standard
            library. A file that is named is taken as it is. Of what a folder holds, at any depth, or a pattern
            matches, only files in UTF-8 are taken; hidden files, caches and installed packages in folders are left.
        sequence_length: bytes in a window.
        batch_size: windows in a batch.
        seed: which of the endless streams of training batches.
        validation_fraction: part of all bytes to hold out, between 0 and 1; met as nearly as whole files can. Which
            files depends on their names only. Of a single file its end is held out.
        validation_batches: fixed batches in one validation.
        num_workers: processes that prepare training batches ahead; 0 prepares them in the training process.

    Raises:
        ValueError: a setting is out of its range, ``files`` names something that is not there or cannot be read, or
            there is too little text for one window; files are looked at in ``setup``, before any training.
    """

    vocab_size: ClassVar[int] = 256

    def __init__(
        self,
        *,
        files: Sequence[str] | str = (),
        sequence_length: int = 256,
        batch_size: int = 16,
        seed: int = 0,
        validation_fraction: float = 0.05,
        validation_batches: int = 16,
        num_workers: int = 0,
    ) -> None:
        super().__init__()
        require_at_least(
            1, sequence_length=sequence_length, batch_size=batch_size, validation_batches=validation_batches
        )
        require_at_least(0, num_workers=num_workers)
        if not 0 < validation_fraction < 1:
            raise ValueError(f"validation_fraction={validation_fraction}: expected a number between 0 and 1")
        self.files = [files] if isinstance(files, str) else list(files)
        self.sequence_length = sequence_length
        self.batch_size = batch_size
        self.seed = seed
        self.validation_fraction = validation_fraction
        self.validation_batches = validation_batches
        self.num_workers = num_workers

    @cached_property
    def corpora(self) -> tuple[Corpus, Corpus]:
        """The text to train on and the held-out text, read once."""
        try:
            documents = find_documents(self.files)
            split = hold_out(documents, self.validation_fraction)
            total = sum(document.size for document in documents)
            for purpose, part in zip(("training", "held-out"), split, strict=True):
                size = sum(document.size for document in part)
                if size < self.sequence_length:
                    raise ValueError(
                        f"sequence_length={self.sequence_length}: the {purpose} text has {size:,} of the corpus' "
                        f"{total:,} bytes at validation_fraction={self.validation_fraction}; a sequence_length of at "
                        f"most {size} fits, or more text"
                    )
            training, held_out = read(split[0]), read(split[1])
        except OSError as error:
            raise ValueError(f"files: cannot read {error.filename}: {error.strerror}") from error
        sizes = (f"{len(part.text):,} bytes in {len(part.bounds) - 1:,} documents" for part in (training, held_out))
        announce("TextData: {} to train on, {} held out".format(*sizes))
        return training, held_out

    def setup(self, stage: str | None = None) -> None:
        """Read the text, once."""
        _ = self.corpora

    def held_out_documents(self) -> list[UInt8[Tensor, " bytes"]]:
        """The held-out files, whole and in order."""
        return self.corpora[1].documents()

    def train_dataloader(self) -> TrainingLoader:
        """Endless batches from where training stopped."""
        batches = TextBatches(
            self.corpora[0], sequence_length=self.sequence_length, batch_size=self.batch_size, seed=self.seed
        )
        return TrainingLoader(batches, trainer=self.trainer, num_workers=self.num_workers)

    def val_dataloader(self) -> DataLoader[Batch]:
        """``validation_batches`` batches, always the same."""
        held_out = self.corpora[1]
        windows = self.validation_batches * self.batch_size
        last = len(held_out.text) - self.sequence_length
        offsets = torch.arange(windows) * last // max(windows - 1, 1)
        return fixed_loader([held_out.windows(part, self.sequence_length) for part in offsets.split(self.batch_size)])


def find_documents(files: Sequence[str]) -> list[Document]:
    """The non-empty documents that ``files`` means: entries in their order, each by relative path, no file twice.

    Args:
        files: files, folders and glob patterns, with the rules of ``TextData``; none for the standard library.

    Raises:
        ValueError: an entry is not there or matches nothing, or there is no text at all.
        OSError: something cannot be read.
    """
    documents: dict[str, Document] = {}
    empty = not_text = 0
    for root, paths, is_named in map(_expand, files) if files else [_standard_library()]:
        named_paths = {path.relative_to(root).as_posix(): path for path in paths}
        for name, path in sorted(named_paths.items()):
            size = path.stat().st_size if is_named else _text_size(path)
            if size is None:
                not_text += 1
            elif size == 0:
                empty += 1
            else:
                documents.setdefault(os.path.realpath(path), Document(name, path, 0, size))
    if not_text:
        announce(f"TextData: skipped {not_text:,} files that are not text in UTF-8")
    if not documents:
        raise ValueError(f"files={list(files)}: there is no text (empty files: {empty}, not UTF-8: {not_text})")
    return list(documents.values())


def hold_out(documents: Sequence[Document], fraction: float) -> tuple[list[Document], list[Document]]:
    """Split documents into those to train on and those held out, about ``fraction`` of all bytes.

    Files are taken in the order of a hash of their names while they fit; where none does, the smallest is taken. A
    single file is cut in two.
    """
    if len(documents) == 1:
        [whole] = documents
        cut = whole.size - max(1, round(fraction * whole.size))
        return [whole._replace(size=cut)], [whole._replace(begin=cut, size=whole.size - cut)]
    room = fraction * sum(document.size for document in documents)
    chosen = set()
    for document in sorted(documents, key=lambda document: hashlib.sha256(document.name.encode()).digest()):
        if document.size <= room:
            chosen.add(document)
            room -= document.size
    chosen = chosen or {min(documents, key=lambda document: document.size)}
    return [each for each in documents if each not in chosen], [each for each in documents if each in chosen]


def read(documents: Sequence[Document]) -> Corpus:
    """Lay documents end to end; memory is taken once, for the bytes themselves.

    Raises:
        ValueError: a file is shorter than it was when it was found.
        OSError: a file cannot be read.
    """
    ends = list(accumulate(document.size for document in documents))
    text = bytearray(ends[-1])
    for document, end in zip(documents, ends, strict=True):
        with document.path.open("rb") as file:
            file.seek(document.begin)
            if file.readinto(memoryview(text)[end - document.size : end]) != document.size:
                raise ValueError(f"files: {document.path} became shorter while it was read")
    return Corpus(torch.frombuffer(text, dtype=torch.uint8), torch.tensor([0, *ends]))


def _expand(entry: str) -> tuple[Path, Iterable[Path], bool]:
    """Root, files below it, and whether ``entry`` names a file itself."""
    path = Path(entry).expanduser()
    if path.is_dir():
        return path, _below(path), False
    if path.exists():
        return path.parent, [path], True
    fixed = [part for part in accumulate(path.parts, os.path.join) if not glob.has_magic(part)]
    if len(fixed) == len(path.parts):
        raise ValueError(f"files: {entry} does not exist")
    matches = [Path(match) for match in glob.glob(str(path), recursive=True) if os.path.isfile(match)]
    if not matches:
        raise ValueError(f"files: no file matches {entry}")
    return Path(fixed[-1] if fixed else "."), matches, False


def _standard_library() -> tuple[Path, Iterable[Path], bool]:
    root = Path(sysconfig.get_paths()["stdlib"])
    return root, (path for path in _below(root) if path.suffix == ".py"), False


def _below(root: Path) -> Iterable[Path]:
    for folder, subfolders, names in os.walk(root, onerror=_fail):
        subfolders[:] = [name for name in subfolders if not name.startswith(".") and name not in NOT_SOURCES]
        for path in (Path(folder, name) for name in names if not name.startswith(".")):
            if path.is_file():
                yield path


def _fail(error: OSError) -> NoReturn:
    raise error


def _text_size(path: Path) -> int | None:
    """Bytes in a file, or None where they are not UTF-8; a block at a time, since files can be large."""
    decoder = codecs.getincrementaldecoder("utf-8")()
    size = 0
    try:
        with path.open("rb") as file:
            while block := file.read(BLOCK_BYTES):
                decoder.decode(block)
                size += len(block)
            decoder.decode(b"", final=True)
    except UnicodeDecodeError:
        return None
    return size
