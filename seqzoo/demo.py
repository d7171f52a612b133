"""``seqzoo demo``: from configs to a trained hybrid, its loss beyond the training length, and its recall."""

from __future__ import annotations

import time
from pathlib import Path

from seqzoo import commands, measurements

HYBRID = "lm/hybrid.yaml"
RECALL = ("recall/small_attention.yaml", "recall/small_sliding_window.yaml", "recall/small_hybrid.yaml")


def demo(output: str = "runs/demo", text_steps: int = 100, recall_steps: int = 600) -> None:
    """Train a hybrid of gated delta rule, sliding window and Mamba-2 on real text, then measure it.

    The text is the source code of Python's standard library, which every machine has.

    Args:
        output: folder for everything that is written.
        text_steps: optimizer steps on text; the config's own 300 reach a lower loss and take longer.
        recall_steps: most optimizer steps on associative recall, of each model.
    """
    from seqzoo.training.command import TrainingCommand

    begin = time.perf_counter()
    folder = Path(output)
    _say("1/4  Train a language model from configs/lm/hybrid.yaml on Python's standard library")
    settings = {"default_root_dir": output, "max_steps": text_steps, "val_check_interval": text_steps}
    overrides = [f"--trainer.{name}={value}" for name, value in settings.items()]
    TrainingCommand(["fit", "--config", str(shipped_config(HYBRID)), *overrides])

    _say("2/4  What it writes after 'def '")
    commands.generate(str(folder / "hybrid"), max_new_tokens=200)

    _say("3/4  Its loss up to 32 times the training length, read with a carried state")
    measurements.lengths([str(folder / "hybrid")], output=str(folder / "lengths"))

    _say("4/4  Associative recall: the hybrid's mixers against attention and a sliding window alone")
    overrides = [f"trainer.max_steps={recall_steps}"]
    measurements.recall(
        [str(shipped_config(name)) for name in RECALL], output=str(folder / "recall"), overrides=overrides
    )

    _say(f"Done in {time.perf_counter() - begin:.0f} s. Pictures:")
    for picture in (folder / "lengths" / "lengths.png", folder / "recall" / "recall.png"):
        print(f"  {picture}")


def shipped_config(name: str) -> Path:
    """A config that comes with the package: beside it in an installation, above it in a checkout.

    Args:
        name: path below ``configs``, such as ``lm/hybrid.yaml``.

    Raises:
        ValueError: there is no such config.
    """
    package = Path(__file__).parent
    for folder in (package / "configs", package.parent / "configs"):
        if (folder / name).is_file():
            return folder / name
    raise ValueError(f"there is no shipped config {name!r}; see the folder configs of the source")


def _say(line: str) -> None:
    print(f"\n{line}\n", flush=True)
