"""Who recalls how much per byte of state: every mixer on one recall task at two widths, into docs/recall.md.

`python scripts/recall_per_byte.py` trains what docs/recall.json does not hold yet (all in 20 minutes of one thread) and
draws the page's table and picture; names, such as `Mamba2 "Attention, window"`, train only those. With ``--override``
other settings are tried and nothing is kept; with ``--check`` nothing is trained, and a stale page is an error.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import tempfile
import time
from itertools import product
from pathlib import Path
from typing import Any

import torch
import yaml

from seqzoo.evals import report as show
from seqzoo.layers import FAMILIES
from seqzoo.measurements import train_recall

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "docs" / "recall.json"
PAGE = ROOT / "docs" / "recall.md"
PICTURE = ROOT / "docs" / "recall.png"

WIDTHS = (16, 32)
ALONE = ("Mamba", "Mamba2", "RGLRU", "SLSTM", "Hyena")  # twice, as they bring a convolution; others stand behind one
LENGTH = 32
PAIRS = (2, 4, 8)
FLOOR = sum(1 / pairs for pairs in PAIRS) / len(PAIRS)  # of a model that knows a row's values, not whose they are
VALIDATION = [{"length": LENGTH, "pairs": pairs} for pairs in PAIRS]
RECIPE: dict[str, Any] = {
    "model": {
        "net": {"vocab_size": 64},
        "learning_rate": 0.01,
        "warmup_steps": 50,
        "final_learning_rate": 0.1,
    },
    "data": {
        "class_path": "seqzoo.tasks.MQARData",
        "init_args": {
            "vocab_size": 64,
            "random_non_queries": False,
            "batch_size": 64,
            "train_segments": [{"length": 16, "pairs": 2}, *VALIDATION],
            "validation_segments": VALIDATION,
            "validation_rows": 500,
        },
    },
    "trainer": {
        "max_steps": 1200,
        "val_check_interval": 200,
        "precision": "32-true",
        "accelerator": "cpu",
        "num_sanity_val_steps": 0,
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "callbacks": [
            {
                "class_path": "lightning.pytorch.callbacks.EarlyStopping",
                "init_args": {"monitor": "val/accuracy", "mode": "max", "stopping_threshold": 0.995, "patience": 1000},
            }
        ],
    },
}


def mixers(dim: int) -> dict[str, dict[str, Any]]:
    """Settings of every mixer at a width: a memory of ``dim**2 / 2`` numbers wherever its settings allow that."""
    half, quarter = dim // 2, dim // 4
    memory = {"num_heads": 2, "key_dim": half, "value_dim": half}
    erasable = memory | {"conv_size": None}
    titans = {"num_heads": 4, "expand": 1, "conv_size": None, "rope_base": None}
    return {
        "Attention": {"num_heads": 1, "positions": "none"},
        "Attention, window": {"num_heads": 1, "positions": "none", "window": quarter},
        "DifferentialAttention": {"num_heads": 1, "rope_base": None},
        "ForgettingAttention": {"num_heads": 1, "shift": False, "use_gate": False},
        "LandmarkAttention": {"num_heads": 1, "positions": "none", "block_size": 8},
        "LatentAttention": {"num_heads": 1, "latent_dim": half, "rope_dim": 2},
        "LRU": {"state_size": dim * quarter},
        "Mamba": {"state_size": quarter},
        "Mamba2": {"state_size": quarter, "head_dim": half},
        "Mamba3": {"state_size": quarter, "head_dim": half},
        "S4D": {"state_size": half},
        "S5": {"state_size": dim * half},
        "MinGRU": {"expand": half},
        "RGLRU": {"width": 4 * dim},
        "Based": {"num_heads": 2, "feature_dim": quarter // 2},
        "GatedLinearAttention": memory,
        "HGRN2": {"head_dim": half, "lower_bound": 0.9},
        "LightningAttention": {"num_heads": 2, "head_dim": half},
        "MLSTM": memory,
        "RetNet": memory,
        "RWKV6": {"head_dim": half},
        "DeltaNet": erasable,
        "DeltaProduct": erasable | {"use_gate": False},
        "GatedDeltaNet": erasable | {"use_gate": False},
        "GatedDeltaNet2": erasable | {"gate": "sigmoid"},
        "KimiDeltaAttention": erasable,
        "RWKV7": {"head_dim": half},
        "SLSTM": {"num_heads": 2},
        "NeuralMemory": {
            "num_heads": 1,
            "head_dim": half,
            "expand": 1,
            "learning_rate": 1.0,
            "conv_size": None,
            "use_gate": False,
        },
        "TitansMAC": titans | {"segment": quarter, "learning_rate": 0.5},
        "TitansMAG": titans | {"window": quarter, "learning_rate": 1.0},
        "TitansMAL": titans | {"window": quarter, "learning_rate": 1.0},
        "TTTLinear": {"num_heads": 2, "head_dim": half},
        "TTTMLP": {"num_heads": 1, "head_dim": half, "expand": 1, "learning_rate": 1.0},
        "Hyena": {"max_length": LENGTH},
        "LongConv": {"max_length": LENGTH},
        "SGConv": {"max_length": LENGTH, "kernel_dim": 8},
    }


def train(name: str, dim: int, overrides: list[str]) -> dict[str, Any]:
    """Train and score one model; what docs/recall.json keeps of it.

    Args:
        name: mixer, one of ``mixers``.
        dim: width of the residual stream.
        overrides: settings that differ from the recipe, such as ``trainer.max_steps=3000``.
    """
    settings = mixers(dim)[name]
    layers: dict[str, Any] = {
        "conv": "seqzoo.layers.ShortConv",
        "mixer": {"class_path": f"seqzoo.layers.{name.partition(',')[0]}", "init_args": settings},
    }
    pattern = ["mixer", "mixer"] if name in ALONE else ["conv", "mixer"]
    net = RECIPE["model"]["net"] | {"dim": dim, "pattern": pattern, "layers": layers}
    config = RECIPE | {"model": RECIPE["model"] | {"net": net}}
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "mixer.yaml"
        path.write_text(yaml.safe_dump(config))
        begin = time.process_time()
        result = train_recall(str(path), name, folder, overrides)
        seconds = time.process_time() - begin
    return {
        "mixer": name,
        "dim": dim,
        "pattern": pattern,
        "settings": settings,
        "state_bytes": result.state_bytes,
        "accuracy": {segment: round(value, 3) for segment, value in result.accuracy.items()},
        "steps": result.steps,
        "cpu_seconds": round(seconds),
    }


def read_runs() -> list[dict[str, Any]]:
    """The runs measured so far with today's settings.

    Raises:
        ValueError: they were trained by another recipe.
    """
    if not RESULTS.exists():
        return []
    kept = json.loads(RESULTS.read_text())
    if kept["recipe"] != RECIPE:
        raise ValueError(f"{RESULTS} was measured by another recipe than RECIPE; remove it to measure all anew")
    return [run for run in kept["runs"] if run["settings"] == mixers(run["dim"]).get(run["mixer"])]


def write_runs(runs: list[dict[str, Any]]) -> None:
    """Keep ``runs``, a line each, in the order of the catalogue."""
    names = list(mixers(WIDTHS[0]))
    runs = sorted(runs, key=lambda run: (names.index(run["mixer"]), run["dim"]))
    lines = ",\n".join(json.dumps(run) for run in runs)
    RESULTS.write_text(f'{{"recipe": {json.dumps(RECIPE)},\n"runs": [\n{lines}\n]}}\n')


def missing(runs: list[dict[str, Any]]) -> list[tuple[str, int]]:
    """Mixer and width of every run still to do."""
    done = {(run["mixer"], run["dim"]) for run in runs}
    return [(name, dim) for dim in WIDTHS for name in mixers(dim) if (name, dim) not in done]


def accuracy(run: dict[str, Any]) -> float:
    """Mean over the numbers of pairs."""
    return sum(run["accuracy"].values()) / len(run["accuracy"])


def best_first(runs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Widths in order, and within a width the best first; of equals the smaller state, then by name."""
    return sorted(runs, key=lambda run: (run["dim"], -accuracy(run), run["state_bytes"], run["mixer"]))


def family(name: str) -> str:
    """The catalogue's family of a mixer."""
    return {layer.__name__: family for family, layers in FAMILIES.items() for layer in layers}[name.partition(",")[0]]


def table(runs: list[dict[str, Any]]) -> str:
    """A Markdown row for each mixer and width."""
    pairs = " | ".join(f"{count} pairs" for count in PAIRS)
    head = f"| mixer | family | width | state | accuracy | {pairs} | steps | CPU seconds |"
    lines = [head, "|---" * head.count(" |") + "|"]
    for run in best_first(runs):
        scores = " | ".join(f"{run['accuracy'][f'T{LENGTH}_K{count}']:.3f}" for count in PAIRS)
        lines.append(
            f"| `{run['mixer']}` | {family(run['mixer'])} | {run['dim']} | {show.bytes_text(run['state_bytes'])} "
            f"| {accuracy(run):.3f} | {scores} | {run['steps']} | {run['cpu_seconds']} |"
        )
    return "\n".join(lines)


def plot(runs: list[dict[str, Any]]) -> None:
    """Accuracy against state, a panel a width, a colour a family."""
    figure, panels = show.two_panels(
        "Associative recall per byte of state",
        f"Rows of {LENGTH} tokens; accuracy is the mean over rows of 2, 4 and 8 pairs. One seed. A colour is a family.",
        left_width=1,
    )
    figure.set_size_inches(13, 7)
    families = list(FAMILIES)
    for dim, axes in zip(WIDTHS, panels, strict=True):
        show.set_log_axis(axes, "x", show.bytes_text, 6)
        show.set_axes(axes, f"Width {dim}", "state per sequence", "accuracy")
        axes.set_ylim(-0.03, 1.03)
        names = {}
        for run in best_first(runs):
            if run["dim"] == dim:
                style = show.line_style(families.index(family(run["mixer"])))
                axes.plot(run["state_bytes"], accuracy(run), markersize=8, **style)
                names[run["mixer"]] = (run["state_bytes"], accuracy(run), style["color"])
        axes.axhline(FLOOR, color=show.FAINT, linestyle=(0, (4, 3)), linewidth=1.2, zorder=0)
        names["a guess within the row"] = (max(size for size, _, _ in names.values()), FLOOR, show.FAINT)
        show.label_ends(figure, axes, names)
    show.save_figure(figure, PICTURE)


def written(runs: list[dict[str, Any]]) -> str:
    """What the page should hold."""
    begin, end = "<!-- runs: scripts/recall_per_byte.py -->", "<!-- end -->"
    text, found = re.subn(
        f"{begin}.*?{end}", lambda _: f"{begin}\n{table(runs)}\n{end}", PAGE.read_text(), flags=re.DOTALL
    )
    if found != 1:
        raise ValueError(f"{PAGE} has {found} places for the table, {begin} ... {end}; expected 1")
    return text


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="MIXER", help="train only these; all by default")
    parser.add_argument("--check", action="store_true", help="fail where the page is stale; train and write nothing")
    parser.add_argument(
        "--override", nargs="+", metavar="SETTING=VALUE", help="train MIXER so, print what it reached and keep nothing"
    )
    options = parser.parse_args()
    names = options.names or list(mixers(WIDTHS[0]))
    unknown = set(names) - set(mixers(WIDTHS[0]))
    if unknown:
        parser.error(f"no mixer {', '.join(sorted(unknown))}; there are {', '.join(mixers(WIDTHS[0]))}")
    if options.override:
        for name, dim in product(names, WIDTHS):
            print(json.dumps(train(name, dim, options.override)), flush=True)
        return 0
    runs = read_runs()
    if options.check:
        stale = PAGE.read_text() != written(runs)
        print(f"{PAGE.name}: {'stale; run python scripts/recall_per_byte.py' if stale else 'fresh'}")
        return int(stale)
    for name, dim in missing(runs):
        if name in names:
            runs.append(train(name, dim, []))
            write_runs(runs)
            print(json.dumps(runs[-1]), flush=True)
    plot(runs)
    PAGE.write_text(written(runs))
    return 0


if __name__ == "__main__":
    sys.exit(main())
