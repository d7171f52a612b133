"""Training: what the optimizer sees, what is logged, and that a resumed run is the same run."""

from __future__ import annotations

import csv
import functools
import math
import random
from pathlib import Path
from unittest.mock import Mock

import lightning as L
import numpy
import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch.callbacks import LearningRateMonitor, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from torch import nn

from seqzoo import LanguageModel, Mixer, load_model
from seqzoo.data import TextData, fixed_loader
from seqzoo.layers import LAYERS, Attention, GatedDeltaNet, Mamba2
from seqzoo.mixer import NoState, named_mixers
from seqzoo.models.language_model import IGNORED
from seqzoo.tasks import MQARData, Segment
from seqzoo.training import LanguageModeling, RandomState
from seqzoo.training.optimizer_groups import parameter_groups
from seqzoo.training.schedules import warmup_cosine

VOCAB = 32


class Noisy(Mixer):
    """Draws from every generator that a run has: torch's, Python's and NumPy's."""

    def __init__(self, dim: int):
        super().__init__()
        self.out = nn.Linear(dim, dim)

    def forward(self, x, state=None, starts=None):
        if self.training:
            x = F.dropout(x, 0.5) * (random.random() + numpy.random.rand())
        return self.out(x), NoState()

    def state_bytes(self, length, *, dtype=torch.float32):
        return 0


class Recorder(L.Callback):
    """Keeps what a run does at each step."""

    def __init__(self):
        self.losses, self.rates, self.gradient_norms, self.clipped_norms = [], [], [], []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.losses.append(float(outputs["loss"]))

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        self.rates.append(optimizer.param_groups[0]["lr"])
        self.gradient_norms.append(gradient_norm(pl_module))

    def on_before_zero_grad(self, trainer, pl_module, optimizer):
        if any(parameter.grad is not None for parameter in pl_module.parameters()):
            self.clipped_norms.append(gradient_norm(pl_module))


def gradient_norm(module: nn.Module) -> float:
    return math.sqrt(sum(float(p.grad.square().sum()) for p in module.parameters() if p.grad is not None))


class Batches(L.LightningDataModule):
    """Given batches, the first of them to train on, and given lists of batches to validate on."""

    def __init__(self, train, *validation, names=()):
        super().__init__()
        self.train, self.validation, self.validation_names = train, validation, list(names)

    def train_dataloader(self):
        return fixed_loader(self.train)

    def val_dataloader(self):
        return [fixed_loader(batches) for batches in self.validation]


def make_net(layer: type[Mixer] = GatedDeltaNet, **changes) -> LanguageModel:
    torch.manual_seed(0)
    return LanguageModel(**{"vocab_size": VOCAB, "dim": 8, "pattern": ["mix"], "layers": {"mix": layer}} | changes)


def make_batch(asked: float, *, rows: int = 3, length: int = 10, seed: int = 0):
    """Random tokens, with a label at the fraction ``asked`` of all places and at the first."""
    generator = torch.Generator().manual_seed(seed)
    tokens, labels = torch.randint(VOCAB, (2, rows, length), generator=generator)
    hidden = torch.rand(rows, length, generator=generator) >= asked
    hidden[0, 0] = False
    return {"tokens": tokens, "labels": labels.masked_fill(hidden, IGNORED)}


def make_mqar(**changes) -> MQARData:
    settings = {"train_segments": [Segment(16, 2), Segment(24, 3)], "validation_rows": 6, "batch_size": 4}
    return MQARData(vocab_size=VOCAB, **settings | changes)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("corpus")
    for index in range(4):
        words = random.Random(index).choices(["state", "space", "memory", "delta", "rule"], k=60)
        (folder / f"{index}.txt").write_text(" ".join(words))
    return folder


def fit(module, data, folder, *, callbacks=(), checkpoint=None, **settings) -> L.Trainer:
    saves = any(isinstance(callback, ModelCheckpoint) for callback in callbacks)
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    settings = quiet | {"max_steps": 1, "enable_checkpointing": saves} | settings
    trainer = L.Trainer(accelerator="cpu", default_root_dir=folder, max_epochs=-1, callbacks=[*callbacks], **settings)
    trainer.fit(module, datamodule=data, ckpt_path=checkpoint)
    return trainer


# Optimizer


def test_matrices_decay_unless_their_mixer_says_no_and_all_else_does_not():
    layers = {layer.__name__: layer for layer in LAYERS}
    net = LanguageModel(pattern=list(layers), layers=layers, dim=128)
    decay, keep = ({id(p) for p in group["params"]} for group in parameter_groups(net, 0.1))
    seen = {"Linear": 0, "norm": 0, "A_log": 0, "dt_bias": 0, "skip": 0, "bias": 0}
    exempt = {
        id(p) for _, mixer in named_mixers(net) for name, p in mixer.named_parameters() if name in mixer.no_weight_decay
    }
    for module in net.modules():
        if isinstance(module, (nn.Linear, nn.Embedding)):
            assert id(module.weight) in (keep if id(module.weight) in exempt else decay)
            seen["Linear"] += 1
    for name, parameter in net.named_parameters():
        kinds = [kind for kind in seen if name.rpartition(".")[2] == kind or ("norm" in name and kind == "norm")]
        for kind in kinds:
            assert id(parameter) in keep, name
            seen[kind] += 1
    assert all(seen.values()), seen


@pytest.mark.parametrize("tied", [False, True])
def test_every_parameter_is_optimized_once(tied):
    net = make_net(tie_embeddings=tied, repeats=2)
    net.norm.weight.requires_grad_(False)
    grouped = [id(p) for group in parameter_groups(net, 0.1) for p in group["params"]]
    assert sorted(grouped) == sorted(id(p) for p in net.parameters() if p is not net.norm.weight)
    assert [group["weight_decay"] for group in parameter_groups(net, 0.1)] == [0.1, 0.0]


def test_a_mixer_names_matrices_that_do_not_decay():
    class Tabled(Noisy):
        no_weight_decay = frozenset({"table"})

        def __init__(self, dim):
            super().__init__(dim)
            self.table, self.other = (nn.Parameter(torch.zeros(dim, dim)) for _ in range(2))

    class Outer(Tabled):
        no_weight_decay = frozenset({"other"})

        def __init__(self, dim):
            super().__init__(dim)
            self.inner = Tabled(dim)

    net = make_net(Outer)
    outer = net.mixers[0]
    keep = {id(p) for p in parameter_groups(net, 0.1)[1]["params"]}
    assert [id(p) in keep for p in (outer.other, outer.inner.table)] == [True, True]
    assert [id(p) in keep for p in (outer.table, outer.inner.other, outer.out.weight)] == [False, False, False]


def test_warms_up_and_follows_a_cosine():
    rate = functools.partial(warmup_cosine, warmup_steps=4, total_steps=24, final_ratio=0.1)
    assert [rate(step) for step in range(4)] == pytest.approx([0.2, 0.4, 0.6, 0.8])
    assert [rate(4), rate(14), rate(24), rate(99)] == pytest.approx([1.0, 0.55, 0.1, 0.1])
    assert rate(9) == pytest.approx(0.1 + 0.9 * (1 + math.sqrt(0.5)) / 2)
    assert warmup_cosine(0, warmup_steps=0, total_steps=10, final_ratio=0.0) == 1.0
    assert warmup_cosine(5, warmup_steps=5, total_steps=5, final_ratio=0.0) == 1.0


def test_each_step_is_taken_at_its_rate(tmp_path):
    recorder = Recorder()
    settings = {"learning_rate": 0.02, "warmup_steps": 2, "final_learning_rate": 0.5}
    fit(LanguageModeling(make_net(), **settings), make_mqar(), tmp_path, callbacks=[recorder], max_steps=6)
    factors = [warmup_cosine(step, warmup_steps=2, total_steps=6, final_ratio=0.5) for step in range(6)]
    assert recorder.rates == pytest.approx([0.02 * factor for factor in factors])


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("learning_rate", 0.0),
        ("weight_decay", -0.1),
        ("betas", (0.9, 1.0)),
        ("warmup_steps", -1),
        ("final_learning_rate", 1.5),
    ],
)
def test_refuses_settings_out_of_range(setting, value):
    with pytest.raises(ValueError, match=f"^{setting}=") as error:
        LanguageModeling(make_net(), **{setting: value})
    assert str(value) in str(error.value)


def test_a_run_needs_a_number_of_steps(tmp_path):
    with pytest.raises(ValueError, match=r"trainer\.max_steps=-1.*set a number"):
        fit(LanguageModeling(make_net()), make_mqar(), tmp_path, max_steps=-1)


# Loss and scores


def test_the_loss_is_that_of_the_labelled_positions_and_only_they_reach_the_head(tmp_path):
    batch = make_batch(0.3) | {"starts": torch.zeros(3, 10, dtype=torch.bool)}
    batch["starts"][1, 4] = True
    net, untrained, recorder, rows = make_net(), make_net(), Recorder(), []
    net.unembedding.register_forward_pre_hook(lambda module, inputs: rows.append(len(inputs[0])))
    fit(LanguageModeling(net), Batches([batch]), tmp_path, callbacks=[recorder])
    logits, _ = untrained(batch["tokens"], starts=batch["starts"])
    wanted = F.cross_entropy(logits.flatten(0, 1), batch["labels"].flatten(), ignore_index=IGNORED)
    assert recorder.losses == pytest.approx([wanted.item()], rel=1e-6)
    assert rows == [int((batch["labels"] != IGNORED).sum())] and rows[0] < 30


def test_validation_weighs_tokens_within_a_loader_and_loaders_alike(tmp_path):
    first = [make_batch(0.1, seed=1), make_batch(0.9, seed=2)]
    second = [make_batch(0.5, rows=6, seed=3)]
    net = make_net()
    module = LanguageModeling(net, learning_rate=1e-12)
    trainer = fit(module, Batches([make_batch(0.5)], first, second, names=["first", "second"]), tmp_path)

    def score(batches):
        labels = torch.cat([batch["labels"] for batch in batches])
        with torch.no_grad():
            logits = torch.cat([net(batch["tokens"])[0] for batch in batches])
        right = (logits.argmax(-1) == labels).sum(1) / (labels != IGNORED).sum(1).clamp_min(1)
        loss = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=IGNORED)
        return float(loss), float(right.sum() / (labels != IGNORED).any(1).sum())

    (loss, accuracy), (other_loss, other_accuracy) = score(first), score(second)
    wanted = {
        "val/loss/first": loss,
        "val/loss/second": other_loss,
        "val/loss": (loss + other_loss) / 2,
        "val/bits": (loss + other_loss) / 2 / math.log(2),
        "val/accuracy/first": accuracy,
        "val/accuracy/second": other_accuracy,
        "val/accuracy": (accuracy + other_accuracy) / 2,
    }
    logged = {name: float(value) for name, value in trainer.callback_metrics.items() if name.startswith("val")}
    assert logged == pytest.approx(wanted, rel=1e-4)


def test_recall_is_scored_by_segment_in_validation_and_test(tmp_path):
    data = make_mqar(validation_segments=[Segment(16, 2), Segment(24, 4)])
    module = LanguageModeling(make_net())
    trainer = fit(module, data, tmp_path, val_check_interval=1)
    names = {f"{measure}/{segment}" for measure in ("loss", "accuracy") for segment in ("T16_K2", "T24_K4")}
    assert {f"val/{name}" for name in names} <= set(trainer.callback_metrics)
    trainer.test(module, datamodule=data, verbose=False)
    assert {f"test/{name}" for name in [*names, "loss", "bits", "accuracy"]} == set(trainer.callback_metrics)


# Logs


def logged_rows(folder: Path) -> dict[str, dict[int, float]]:
    """What a CSV logger wrote: values by metric and step."""
    metrics: dict[str, dict[int, float]] = {}
    with (folder / "metrics.csv").open() as file:
        for row in csv.DictReader(file):
            for name, value in row.items():
                if value and name not in ("step", "epoch"):
                    metrics.setdefault(name, {})[int(row["step"])] = float(value)
    return metrics


def test_logs_loss_pace_gradient_norm_states_and_rate(tmp_path):
    net = make_net(pattern=["delta", "local"], layers={"delta": GatedDeltaNet, "local": Attention})
    fit(
        LanguageModeling(net),
        make_mqar(),
        tmp_path,
        logger=CSVLogger(tmp_path, name="", version=""),
        callbacks=[LearningRateMonitor("step")],
        log_every_n_steps=1,
        val_check_interval=2,
        max_steps=4,
    )
    metrics = logged_rows(tmp_path)
    wanted = {"train/loss", "train/tokens_per_second", "train/gradient_norm", "val/loss", "val/bits", "val/accuracy"}
    assert wanted | {"state_rms/00_delta", "state_rms/01_local"} <= set(metrics)
    assert any(name.startswith("lr-AdamW") for name in metrics)
    assert all(math.isfinite(value) and value >= 0 for values in metrics.values() for value in values.values())


def test_what_is_logged_at_a_step_is_of_that_step(tmp_path):
    recorder = Recorder()
    logger = CSVLogger(tmp_path, name="", version="")
    settings = {"logger": logger, "log_every_n_steps": 3, "max_steps": 9, "limit_val_batches": 0}
    fit(LanguageModeling(make_net()), make_mqar(), tmp_path, callbacks=[recorder], **settings)
    metrics = logged_rows(tmp_path)
    assert len(metrics["train/loss"]) == 3
    assert metrics["train/loss"] == pytest.approx({step: recorder.losses[step] for step in metrics["train/loss"]})
    norms = metrics["train/gradient_norm"]
    assert norms == pytest.approx({step: recorder.gradient_norms[step] for step in norms}, rel=1e-5)


def test_the_logged_state_is_the_root_mean_square_of_all_its_numbers(tmp_path):
    batch, net = make_batch(1.0), make_net(Attention)
    with torch.no_grad():
        [state] = net.hidden(batch["tokens"])[1]
    trainer = fit(LanguageModeling(net), Batches([batch]), tmp_path, log_every_n_steps=1)
    wanted = torch.cat([state.keys.flatten(), state.values.flatten()]).square().mean().sqrt()
    assert float(trainer.callback_metrics["state_rms/00_mix"]) == pytest.approx(float(wanted), rel=1e-5)


# Going on


def make_noisy() -> LanguageModel:
    return make_net(pattern=["delta", "noise"], layers={"delta": GatedDeltaNet, "noise": Noisy}, vocab_size=256)


def train(
    data, folder, *, checkpoint=None, callbacks=(), accumulate=1, validate_every=None
) -> tuple[list[float], LanguageModel]:
    """Losses of all batches, and the net, of a run of six steps from fresh objects."""
    net, recorder = make_noisy(), Recorder()
    validate_every = validate_every or 2 * accumulate
    settings = {"max_steps": 6, "accumulate_grad_batches": accumulate, "val_check_interval": validate_every}
    module = LanguageModeling(net, learning_rate=0.05, warmup_steps=2)
    callbacks = [recorder, *callbacks]
    fit(module, data, folder, callbacks=callbacks, checkpoint=checkpoint, **settings)
    return recorder.losses, net


def disturb_generators():
    torch.manual_seed(99)
    random.seed(99)
    numpy.random.seed(99)


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("kind", ["text", "mqar"])
def test_a_resumed_run_is_the_same_run(kind, accumulate, corpus, tmp_path):
    def data():
        if kind == "mqar":
            return make_mqar(batch_size=2)
        return TextData(files=str(corpus), sequence_length=12, batch_size=2, validation_batches=2)

    savers = [
        ModelCheckpoint(tmp_path, "after-{step}", every_n_train_steps=1, save_top_k=-1),
        ModelCheckpoint(tmp_path, "validated-{step}", monitor="val/loss", save_top_k=-1),
    ]
    losses, net = train(data(), tmp_path, callbacks=[RandomState(), *savers], accumulate=accumulate)
    assert len(losses) == 6 * accumulate and len(set(losses)) == len(losses)
    for name, done in {"after-step=1": 1, "validated-step=4": 4, "after-step=5": 5}.items():
        disturb_generators()
        checkpoint = tmp_path / f"{name}.ckpt"
        rest, resumed = train(data(), tmp_path, checkpoint=checkpoint, callbacks=[RandomState()], accumulate=accumulate)
        assert rest == losses[done * accumulate :], name
        for (parameter, value), other in zip(net.state_dict().items(), resumed.state_dict().values(), strict=True):
            assert torch.equal(value, other), parameter


class SaveAfterEveryBatch(L.Callback):
    """Checkpoints named by the number of batches trained on, most of them in the middle of an accumulated step."""

    def __init__(self, folder: Path):
        self.folder = folder

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        trainer.save_checkpoint(self.folder / f"batch={batch_idx + 1}.ckpt")


def test_a_run_resumed_between_two_micro_batches_is_the_same_run(tmp_path):
    settings = {"accumulate": 3, "validate_every": 4}
    savers = [SaveAfterEveryBatch(tmp_path), ModelCheckpoint(tmp_path, "{step}", monitor="val/loss", save_top_k=-1)]
    losses, net = train(make_mqar(), tmp_path, callbacks=[RandomState(), *savers], **settings)
    assert len(losses) == 18
    for name, done in {"batch=1": 1, "batch=2": 2, "batch=3": 3, "step=1": 4, "batch=5": 5, "step=2": 8}.items():
        disturb_generators()
        checkpoint = tmp_path / f"{name}.ckpt"
        assert bool(torch.load(checkpoint, weights_only=True)["accumulated_gradients"]) == (done % 3 > 0), name
        rest, resumed = train(make_mqar(), tmp_path, checkpoint=checkpoint, callbacks=[RandomState()], **settings)
        assert rest == losses[done:], name
        for (parameter, value), other in zip(net.state_dict().items(), resumed.state_dict().values(), strict=True):
            assert torch.equal(value, other), (name, parameter)


def test_random_numbers_matter_to_a_resumed_run(tmp_path):
    saver = ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=3, save_top_k=-1)
    losses, _ = train(make_mqar(), tmp_path, callbacks=[saver])
    disturb_generators()
    rest, _ = train(make_mqar(), tmp_path, checkpoint=tmp_path / "step=3.ckpt")
    assert len(rest) == 3 and rest != losses[3:]


def test_a_checkpoint_is_tensors_and_plain_data_and_loads_as_a_model(tmp_path):
    layers = {"delta": functools.partial(GatedDeltaNet, num_heads=2), "mamba": functools.partial(Mamba2, head_dim=4)}
    net = make_net(pattern=list(layers), layers=layers)
    saver = ModelCheckpoint(tmp_path, "{step}", save_last=True)
    fit(
        LanguageModeling(net),
        make_mqar(),
        tmp_path,
        callbacks=[saver, RandomState()],
        max_steps=3,
    )
    assert torch.load(tmp_path / "last.ckpt", weights_only=True)["global_step"] == 3
    tokens = make_batch(1.0)["tokens"]
    assert torch.equal(load_model(tmp_path / "last.ckpt")(tokens)[0], net(tokens)[0])


def test_refuses_the_checkpoint_of_another_model(tmp_path):
    saver = ModelCheckpoint(tmp_path, "{step}", save_last=True)
    fit(LanguageModeling(make_net()), make_mqar(), tmp_path, callbacks=[saver])
    with pytest.raises(ValueError, match="is of another model") as error:
        fit(LanguageModeling(make_net(dim=16)), make_mqar(), tmp_path, checkpoint=tmp_path / "last.ckpt", max_steps=2)
    assert "\n" not in str(error.value)


# Trouble, precision, compilation


class Poison(L.Callback):
    """Makes weights or gradients NaN in the third batch."""

    def __init__(self, what: str):
        self.what = what

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if batch_idx == 2 and self.what == "weights":
            pl_module.net.embedding.weight.data.fill_(math.nan)

    def on_after_backward(self, trainer, pl_module):
        if trainer.global_step == 2 and self.what == "gradients":
            pl_module.net.embedding.weight.grad.fill_(math.nan)


@pytest.mark.parametrize("what", ["weights", "gradients"])
def test_not_a_number_stops_the_run_and_spares_the_good_checkpoint(what, tmp_path):
    saver = ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=1, save_top_k=-1, save_last=True)
    with pytest.raises(ValueError, match=r"not a number by step \d, .*=0\.002.*--ckpt_path") as error:
        fit(
            LanguageModeling(make_net()),
            make_mqar(),
            tmp_path,
            callbacks=[saver, Poison(what)],
            max_steps=6,
        )
    assert "\n" not in str(error.value)
    assert sorted(file.name for file in tmp_path.glob("*.ckpt")) == ["last.ckpt", "step=1.ckpt", "step=2.ckpt"]
    saved = torch.load(tmp_path / "last.ckpt", weights_only=True)
    assert saved["global_step"] == 2 and all(weight.isfinite().all() for weight in saved["state_dict"].values())


def test_not_a_number_stops_a_run_that_saves_nothing(tmp_path):
    with pytest.raises(ValueError, match=r"not a number by step [34],"):
        fit(
            LanguageModeling(make_net()),
            make_mqar(),
            tmp_path,
            callbacks=[Poison("weights")],
            max_steps=20,
            log_every_n_steps=4,
            limit_val_batches=0,
        )


def test_gradients_are_clipped_after_their_norm_is_logged(tmp_path):
    recorder = Recorder()
    settings = {"gradient_clip_val": 1e-3, "max_steps": 3, "log_every_n_steps": 1}
    trainer = fit(LanguageModeling(make_net()), make_mqar(), tmp_path, callbacks=[recorder], **settings)
    assert recorder.clipped_norms == pytest.approx([1e-3] * len(recorder.clipped_norms), rel=1e-2)
    assert float(trainer.callback_metrics["train/gradient_norm"]) == pytest.approx(
        recorder.gradient_norms[-1], rel=1e-5
    )
    assert min(recorder.gradient_norms) > 1e-2


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_learns(precision, corpus, tmp_path):
    recorder = Recorder()
    net = make_net(pattern=["delta", "local"], layers={"delta": GatedDeltaNet, "local": Attention}, vocab_size=256)
    module = LanguageModeling(net, learning_rate=0.03, warmup_steps=2)
    data = TextData(files=str(corpus), sequence_length=16, batch_size=8, validation_batches=1)
    settings = {"precision": precision, "gradient_clip_val": 1.0, "max_steps": 30}
    fit(module, data, tmp_path, callbacks=[recorder], **settings)
    assert recorder.losses[0] > 5.3 and recorder.losses[-1] < 2.8
    assert {parameter.dtype for parameter in net.parameters()} == {torch.float32}


@pytest.mark.slow
def test_a_compiled_model_trains_alike(tmp_path, monkeypatch):
    compiler = Mock(wraps=torch.compile)
    monkeypatch.setattr(torch, "compile", compiler)
    losses = []
    for compiled in (False, True):
        recorder = Recorder()
        module = LanguageModeling(make_net(Attention), compile=compiled, learning_rate=0.01)
        data = make_mqar(train_segments=[Segment(16, 2)])
        fit(module, data, tmp_path, callbacks=[recorder], max_steps=4, limit_val_batches=0)
        losses.append(recorder.losses)
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)
    assert compiler.call_count == 1
