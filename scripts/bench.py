"""Speed and memory on this machine: `python scripts/bench.py [PART ...]`, all parts by default.

Machines are noisy: the sides of every ratio are timed in turn in this one process, and medians are compared. Before
operators are timed against other people's code (scripts/operator_peers.py), their answers are compared. The parts
`layers`, `shares` and `costs` take an hour or so and keep what they measure; with `--results docs` the documentation's
tables and picture are made of it.
"""

from __future__ import annotations

import argparse
import functools
import importlib
import inspect
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

import operator_peers as peers
import torch
from cost_bench import costs, peaks
from layer_bench import layers
from layer_cases import DTYPES
from operator_cases import CASES, Case, draw, operator_of, work
from results import RESULTS, verdict
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from share_bench import shares
from timing import PATIENCE, forward, forward_and_backward, in_own_process, medians, reset_peak, resident
from torch import Tensor
from yaml import safe_load

from seqzoo import build_model, clone_state
from seqzoo.demo import HYBRID, shipped_config
from seqzoo.evals.report import bytes_text
from seqzoo.kernels import OPERATORS
from seqzoo.mixer import measure_state

SHORT, LONG = 1024, 16384
ROUNDS = 200
THREADS = 2


def machine_rates(dtypes: Iterable[str]) -> dict[str, float]:
    """What this machine reaches: operations a second of large matrix products, bytes a second of a copy."""
    rates = {}
    for dtype in dtypes:
        a = torch.randn(2048, 2048).to(DTYPES[dtype])
        seconds = medians({"mm": functools.partial(torch.mm, a, a)}, 5)["mm"]
        rates[dtype] = 2 * 2048**3 / seconds
    source = torch.empty(64 << 20)
    target = torch.empty_like(source)
    rates["copy"] = 2 * source.nbytes / medians({"copy": functools.partial(target.copy_, source)}, 5)["copy"]
    return rates


def against_target(case: Case, dtype: str, ahead: Mapping[str, float], both: Mapping[str, float]) -> str:
    """Whether the operator is as much faster than its best peers as it must be; nothing where no peer can run."""
    fastest = [min((times[name] for name in times if name != "seqzoo"), default=None) for times in (ahead, both)]
    if None in fastest:
        return ""
    target = case.targets[list(DTYPES).index(dtype)]
    of_ahead, of_both = (peer / times["seqzoo"] for peer, times in zip(fastest, (ahead, both), strict=True))
    return verdict(target, {"forward": (of_ahead, case.ahead), "with backward": (of_both, target)})


def compare_with_peers(
    console: Console, length: int = 4096, only: Sequence[str] = (), dtypes: Sequence[str] = ()
) -> None:
    """Operators against other people's PyTorch code: milliseconds, ratio of medians, and the share of the bound."""
    dtypes = dtypes or tuple(DTYPES)
    rates = machine_rates(dtypes)
    products = ", ".join(f"{rates[name] / 1e9:.0f} GFLOP/s {name}" for name in dtypes)
    console.print(f"this machine: {products}, copies at {rates['copy'] / 1e9:.0f} GB/s; batch 1, {length:,} tokens")
    table = Table(
        "operator",
        "dtype",
        "side",
        "ms forward",
        "both",
        "peer/ours forward",
        "both",
        "share of bound",
        "target",
        box=SIMPLE_HEAD,
    )
    for case in CASES:
        if only and not any(word.lower() in case.name.lower() for word in only):
            continue
        for precision in dtypes:
            dtype = DTYPES[precision]
            inputs = draw(case, length, dtype)
            sides = {"seqzoo": operator_of(case)} | {peer.__name__: peer for peer in case.peers}
            truth = operator_of(case)(**draw(case, 256, torch.float32))[0]
            usable = {}
            for name, run in sides.items():
                try:
                    y = run(**draw(case, 256, dtype))
                except RuntimeError as error:
                    if name == "seqzoo":
                        raise
                    console.print(f"{case.name}: {name} cannot run in {dtype}: {str(error).splitlines()[0]}")
                    continue
                y = y if isinstance(y, Tensor) else y[0]
                error = ((y - truth).norm() / truth.norm()).item()
                if error > (1e-4 if dtype == torch.float32 else 5e-2):
                    raise ValueError(f"{case.name}: {name} computes something else: relative difference {error:.1e}")
                usable[name] = run
            ahead = medians({name: forward(run, inputs) for name, run in usable.items()}, 7, PATIENCE)
            both = medians({name: forward_and_backward(run, inputs) for name, run in usable.items()}, 7, PATIENCE)
            operations, moved = work(case, inputs)
            bound = max(operations / rates[precision], moved / rates["copy"])
            for name in usable:
                ours = name == "seqzoo"
                table.add_row(
                    case.name if ours else "",
                    precision if ours else "",
                    name,
                    f"{ahead[name] * 1e3:.1f}",
                    f"{both[name] * 1e3:.1f}",
                    "" if ours else f"{ahead[name] / ahead['seqzoo']:.1f}",
                    "" if ours else f"{both[name] / both['seqzoo']:.1f}",
                    f"{bound / both[name]:.0%}",
                    against_target(case, precision, ahead, both) if ours else "",
                )
    console.print(table)


def one_step(console: Console) -> None:
    """One decoding step of every operator, 12 heads of 64 x 64 (768 channels), batch 1, float32: the median of 200."""
    table = Table("operator", "us", box=SIMPLE_HEAD)
    alone = [Case(name, name, {}, ()) for name in OPERATORS if name not in {case.operator for case in CASES}]
    for case in [case for case in CASES if case.operator in OPERATORS] + alone:
        reference = importlib.import_module(f"seqzoo.kernels.{case.operator}.reference")
        known = inspect.signature(reference.example).parameters
        wanted = {"groups": 12, "heads": 12, "key": 64, "value": 64, "channels": 768}
        sizes = case.sizes | {name: size for name, size in wanted.items() if name in known}
        inputs = reference.example(batch=1, time=1, dtype=torch.float32, **sizes)
        seconds = medians({"ours": forward(operator_of(case), inputs)}, ROUNDS)["ours"]
        table.add_row(case.name, f"{seconds * 1e6:.0f}")
    console.print(table)


def _peak(case: Case, name: str, length: int, dtype: torch.dtype, threads: int) -> tuple[float, float]:
    torch.set_num_threads(threads)
    run = {"seqzoo": operator_of(case)}.get(name) or getattr(peers, name)
    forward_and_backward(run, draw(case, 128, dtype))()
    once = forward_and_backward(run, draw(case, length, dtype))
    before, begin = reset_peak(), time.perf_counter()
    once()
    return time.perf_counter() - begin, resident("VmHWM") - before


def peak(case: Case, name: str, length: int, dtype: torch.dtype = torch.float32) -> tuple[float, float]:
    """Seconds and additional peak bytes of one forward and backward, in a process of its own."""
    return in_own_process(_peak, case, name, length, dtype, torch.get_num_threads())


def over_lengths(console: Console, only: Sequence[str] = ()) -> None:
    """Seconds a thousand tokens and peak memory of forward and backward, from 1k to 64k tokens, float32."""
    lengths = (1024, 4096, 16384, 65536)
    table = Table(
        "operator", "side", *(f"ms/1k at {n:,}" for n in lengths), *(f"peak at {n:,}" for n in lengths), box=SIMPLE_HEAD
    )
    for case in CASES:
        if only and not any(word.lower() in case.name.lower() for word in only):
            continue
        for side in ("seqzoo", case.peers[0].__name__):
            measured = [peak(case, side, n) if side == "seqzoo" or n <= 4096 else None for n in lengths]
            table.add_row(
                case.name if side == "seqzoo" else "",
                side,
                *("" if m is None else f"{m[0] * 1e6 / n:.1f}" for m, n in zip(measured, lengths, strict=True)),
                *("" if m is None else bytes_text(m[1]) for m in measured),
            )
    console.print(table)


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


PARTS: dict[str, Callable[..., None]] = {
    "decode": decode,
    "steps": one_step,
    "peers": compare_with_peers,
    "lengths": over_lengths,
    "layers": layers,
    "shares": shares,
    "costs": costs,
    "peaks": peaks,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", help=f"any of {', '.join(PARTS)}; all by default")
    parser.add_argument("--only", action="append", default=[], help="part of the names of the operators or layers")
    parser.add_argument("--length", type=int, default=4096, help="tokens in peers, layers, shares and peaks")
    parser.add_argument(
        "--dtype",
        dest="dtypes",
        action="append",
        default=[],
        choices=DTYPES,
        help="of peers, layers and shares; both by default",
    )
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder that layers, shares and costs write to")
    parser.add_argument("--patience", type=float, default=PATIENCE, help="seconds that a point of costs may take")
    arguments = vars(parser.parse_args())
    chosen = arguments.pop("parts") or list(PARTS)
    if unknown := set(chosen) - set(PARTS):
        parser.error(f"no part {', '.join(sorted(unknown))}; there are {', '.join(PARTS)}")
    torch.set_num_threads(THREADS)
    console = Console(width=max(Console().width, 170))
    console.print(f"torch {torch.__version__}, {torch.get_num_threads()} threads")
    for part in chosen:
        run = PARTS[part]
        console.print(f"\n[bold]{(run.__doc__ or '').strip()}[/bold]")
        settings = arguments.keys() & inspect.signature(run).parameters
        run(console, **{name: arguments[name] for name in settings})


if __name__ == "__main__":
    main()
