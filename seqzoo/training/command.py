"""``seqzoo fit | validate | test``: Lightning's command line with this project's module, defaults and run folders."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning as L
from jsonargparse import ArgumentError
from lightning.pytorch.callbacks import Callback, LearningRateMonitor, ModelCheckpoint
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.utilities.model_helpers import is_overridden

import seqzoo.tasks  # noqa: F401 (help and short names know the data modules that are imported)
from seqzoo.cli import TRAINING
from seqzoo.models.checkpoint import check_layers, check_weights, find_checkpoint, read_checkpoint
from seqzoo.parse_errors import explain_build_error, explain_parse_error
from seqzoo.training.language_modeling import LanguageModeling, check_schedule
from seqzoo.training.progress import ProgressBar
from seqzoo.training.random_state import RandomState

RUNS = "runs"
HELP = {
    name: {
        "usage": f"seqzoo {name} --config FILE [--SETTING=VALUE ...]",
        "description": f"{line}; a setting stands in the config, or on the command line to override it",
    }
    for name, line in TRAINING.items()
}


class TrainingCommand(LightningCLI):
    """Parses a config and its overrides, builds model, data and trainer, and runs one of Lightning's commands.

    Everything a run writes goes to ``runs/NAME/version_N``: its config, ``metrics.csv`` and checkpoints.

    Args:
        args: the command line without the program's name, such as ``["fit", "--config", "hybrid.yaml"]``; without
            the command when ``run`` is False.
        run: False to build ``trainer``, ``model`` and ``datamodule`` without running them.
        callbacks: further callbacks, for callers that watch the run.
    """

    def __init__(self, args: list[str], *, run: bool = True, callbacks: tuple[Callback, ...] = ()) -> None:
        self._watchers = callbacks
        self.run = run
        super().__init__(
            LanguageModeling,
            L.LightningDataModule,
            subclass_mode_data=True,
            seed_everything_default=0,
            auto_configure_optimizers=False,
            load_from_checkpoint_support=False,
            parser_kwargs={"exit_on_error": False, "prog": "seqzoo"} | HELP,
            args=args,
            run=run,
        )

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        shown = LightningCLI.subcommands()
        return {name: shown[name] | {"weights_only"} for name in ("fit", "validate", "test")}

    def parse_arguments(self, parser: LightningArgumentParser, args: list[str]) -> None:
        try:
            self.config = parser.parse_args(args)
        except ArgumentError as error:
            chosen = self._subcommand_parsers.get(args[0], parser) if args and self.run else parser
            known = chosen.get_defaults(skip_validation=True).keys(branches=True)
            raise ValueError(explain_parse_error(str(error), known)) from error
        except UnicodeDecodeError as error:
            raise ValueError(f"config: not text in UTF-8 ({error.reason} at byte {error.start})") from error
        chosen = self.config[args[0]] if self.run else self.config
        check_layers(chosen["model"]["net"]["layers"])
        path = chosen.get("ckpt_path")
        if path is None and self.run and args[0] in ("validate", "test"):
            raise ValueError(f"missing ckpt_path: what {args[0]} scores, such as --ckpt_path=runs/NAME")
        # Always a file of ours: Lightning's own words, such as "last", look in the new run's folder and find nothing.
        self._checkpoint = None if path is None else str(find_checkpoint(Path(path)))
        if self._checkpoint is not None:
            chosen["ckpt_path"] = self._checkpoint
        self._weights = {} if self._checkpoint is None else read_checkpoint(self._checkpoint)[1]

    def instantiate_classes(self) -> None:
        try:
            super().instantiate_classes()
        except ValueError as error:
            raise ValueError(explain_build_error(str(error))) from error

    def after_instantiate_classes(self) -> None:
        # Whatever can be refused is refused here, before a run's folder exists.
        if self._checkpoint is not None:
            check_weights(self._checkpoint, self._weights, self.model.net)
        if self.subcommand == "fit":
            check_schedule(self.trainer)
        if self.subcommand == "test" and not is_overridden("test_dataloader", self.datamodule):
            raise ValueError(f"data: {type(self.datamodule).__name__} keeps no test data; use seqzoo validate")
        if self.run:
            self.datamodule.setup(self.subcommand)

    def add_core_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        # In the order in which help lists them: ours first, the trainer's hundred lines last.
        parser.add_lightning_class_args(LanguageModeling, "model")
        parser.add_lightning_class_args(L.LightningDataModule, "data", subclass_mode=True)
        parser.add_lightning_class_args(L.Trainer, "trainer")
        assert parser.groups is not None
        parser.groups["data"].title = "What to train on"
        parser.groups["trainer"].title = "Lightning's trainer"

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        parser.add_argument(
            "--name", type=str | None, default=None, help="folder of the run; the config's name by default"
        )
        parser.set_defaults(
            {
                "data": {"class_path": "seqzoo.data.TextData"},
                "trainer.default_root_dir": RUNS,
                "trainer.enable_model_summary": False,
                "trainer.gradient_clip_val": 1.0,
                "trainer.log_every_n_steps": 10,
                "trainer.max_epochs": -1,
            }
        )

    def instantiate_trainer(self, **kwargs: Any) -> L.Trainer:
        config = self.config_init if self.subcommand is None else self.config_init[self.subcommand]
        files = config.get("config") or []
        name = config["name"] or (Path(str(files[0])).stem if files else "run")
        chosen = config["trainer"]["logger"]
        if chosen is not False:
            loggers = [] if chosen in (None, True) else chosen if isinstance(chosen, list) else [chosen]
            if not any(isinstance(logger, CSVLogger) for logger in loggers):
                # The first logger names the run's folder, which not every logger of Lightning has.
                loggers = [CSVLogger(config["trainer"]["default_root_dir"], name=name), *loggers]
            kwargs["logger"] = loggers
        self.trainer_defaults = {"callbacks": self._callbacks(config["trainer"])}
        return super().instantiate_trainer(**kwargs)

    def _callbacks(self, trainer: Any) -> list[Callback]:
        callbacks: list[Callback] = [RandomState(), *self._watchers]
        if trainer["logger"] is not False:
            callbacks.append(LearningRateMonitor("step"))
        if trainer["enable_checkpointing"] is not False:
            best = "best-{step}"
            callbacks.append(
                ModelCheckpoint(filename=best, monitor="val/loss", save_last=True, enable_version_counter=False)
            )
        if trainer["enable_progress_bar"] is not False:
            callbacks.append(ProgressBar())
        return callbacks
