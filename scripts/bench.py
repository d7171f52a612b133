"""Speed and memory on this machine: `python scripts/bench.py [decode] [operators]`, everything by default.

Machines are noisy: the two sides of every ratio are timed in turn in this one process, and medians are compared.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Mapping

import torch
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from yaml import safe_load

from seqzoo import build_model, clone_state
from seqzoo.demo import HYBRID, shipped_config
from seqzoo.evals.report import bytes_text
from seqzoo.kernels import OPERATORS, gated_delta_rule, gated_linear_attention, short_conv
from seqzoo.mixer import measure_state

SHORT, LONG = 1024, 16384
ROUNDS = 200


def medians(sides: Mapping[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """Median seconds of each side, all sides once a round."""
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for turn in range(rounds + 2):
        for name, run in sides.items():
            begin = time.perf_counter()
            run()
            if turn >= 2:  # the first rounds warm caches up
                seconds[name].append(time.perf_counter() - begin)
    return {name: statistics.median(times) for name, times in seconds.items()}


@torch.inference_mode()
def decode(console: Console) -> None:
    """One decoding step of each sublayer of the hybrid, after a short and after a long prompt."""
    net = build_model(safe_load(shipped_config(HYBRID).read_text())["model"]["net"]).eval()
    table = Table(
        "sublayer",
        f"us after {SHORT:,}",
        f"us after {LONG:,}",
        "ratio",
        f"state after {SHORT:,}",
        f"{LONG:,}",
        box=SIMPLE_HEAD,
    )
    token = torch.randn(1, 1, net.dim)
    done = set()
    for name, mixer in zip(net.names, net.sublayers(), strict=True):
        if name in done:
            continue
        done.add(name)
        states = {}
        for length in (SHORT, LONG):
            state = None
            for piece in torch.randn(1, length, net.dim).split(SHORT, 1):
                _, state = mixer(piece, state)
            states[length] = state
        # Decoding hands the state over; a private copy keeps the two sides from growing a buffer together.
        sides = {str(length): _stepper(mixer, token, state) for length, state in states.items()}
        times = medians(sides, ROUNDS)
        short, long = times[str(SHORT)], times[str(LONG)]
        sizes = [bytes_text(measure_state(states[length])) for length in (SHORT, LONG)]
        cells = [name, f"{short * 1e6:.0f}", f"{long * 1e6:.0f}", f"{long / short:.2f}"]
        table.add_row(*cells, *sizes)
    console.print(table)


def _stepper(mixer, token, state):
    held = [clone_state(state)]

    def step():
        _, held[0] = mixer(token, held[0])

    return step


def operators(console: Console) -> None:
    """Forward and backward of every operator: each implementation against the chunked one, 4 heads of 64, T = 1024."""
    table = Table("operator", "implementation", "ms", "over chunked", box=SIMPLE_HEAD)
    sizes = {"batch": 1, "time": 1024, "dtype": torch.float32}
    heads = {"groups": 4, "heads": 4, "key": 64, "value": 64}
    modules = {
        "short_conv": (short_conv, {"channels": 512}),
        "gated_linear_attention": (gated_linear_attention, heads),
        "gated_delta_rule": (gated_delta_rule, heads),
    }
    for name, (module, more) in modules.items():
        inputs = {key: value.requires_grad_() for key, value in module.reference.example(**sizes, **more).items()}
        operator = getattr(module, name)
        sides = {backend: _trainer(operator, inputs, backend) for backend in OPERATORS[name]}
        times = medians(sides, 7)
        for backend, seconds in times.items():
            table.add_row(name, backend, f"{seconds * 1e3:.1f}", f"{seconds / times['chunked']:.2f}")
    console.print(table)


def _trainer(operator, inputs, backend):
    def run():
        y, state = operator(**inputs, backend=backend)
        torch.autograd.grad(y.sum() + state.sum(), list(inputs.values()))

    return run


def main() -> None:
    parts = {"decode": decode, "operators": operators}
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", help=f"any of {', '.join(parts)}; all by default")
    chosen = parser.parse_args().parts or list(parts)
    if unknown := set(chosen) - set(parts):
        parser.error(f"no part {', '.join(sorted(unknown))}; there are {', '.join(parts)}")
    console = Console()
    console.print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, float32, batch 1")
    for part in chosen:
        console.print(f"\n[bold]{(parts[part].__doc__ or '').strip()}[/bold]")
        parts[part](console)


if __name__ == "__main__":
    main()
