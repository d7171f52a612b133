"""Speed and memory on this machine: `python scripts/bench.py [decode] [steps] [peers] [lengths]`, all by default.

Machines are noisy: the sides of every ratio are timed in turn in this one process, and medians are compared. Before
operators are timed against other people's code (scripts/operator_peers.py), their answers are compared.
"""

from __future__ import annotations

import argparse
import functools
import importlib
import multiprocessing
import re
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import operator_peers as peers
import torch
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
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
DTYPES = (torch.float32, torch.bfloat16)
CHUNK = 64
PATIENCE = 20.0
"""Seconds that one peer may take for all its rounds: slow ones are timed fewer times, at least once."""


class Case(NamedTuple):
    """An operator at the sizes of a published layer of width 768, and the code of others that computes the same."""

    name: str
    operator: str
    sizes: dict[str, Any]
    peers: tuple[Callable[..., Tensor], ...]


DELTA = {"groups": 12, "heads": 12, "key": 128, "value": 128}
SMALL = {"groups": 12, "heads": 12, "key": 64, "value": 64}
GLA = {"groups": 4, "heads": 4, "key": 96, "value": 192}
RETNET = {"groups": 8, "heads": 8, "key": 96, "value": 192}
MAMBA2 = {"groups": 1, "heads": 24, "key": 128, "value": 64}

CASES = (
    Case(
        "short convolution",
        "short_conv",
        {"channels": 1536, "bias": False, "activation": "silu"},
        (peers.torch_conv1d,),
    ),
    Case(
        "selective scan (Mamba)",
        "selective_scan",
        {"channels": 1536, "size": 16},
        (peers.mambapy_selective_scan,),  # transformers' loop takes minutes: its backward is quadratic
    ),
    Case("RG-LRU, minGRU", "linear_scan", {"channels": 768}, (peers.mingru_scan, peers.transformers_rglru)),
    Case("Mamba-2", "gated_linear_attention", MAMBA2, (peers.transformers_mamba2, peers.fla_simple_gla)),
    Case("RetNet", "gated_linear_attention", RETNET, (peers.fla_simple_gla,)),
    Case("GLA", "gated_linear_attention", GLA | {"decay": "channel"}, (peers.fla_gla,)),
    Case("RWKV-6", "gated_linear_attention", SMALL | {"decay": "channel", "bonus": True}, (peers.fla_rwkv6,)),
    Case("mLSTM", "mlstm", {"heads": 4, "key": 96, "value": 192}, (peers.xlstm_mlstm,)),
    Case("DeltaNet", "gated_delta_rule", DELTA | {"decay": "none"}, (peers.fla_delta_rule,)),
    Case(
        "Gated DeltaNet",
        "gated_delta_rule",
        DELTA,
        (peers.transformers_gated_delta_rule, peers.fla_gated_delta_rule),
    ),
    Case("KDA", "gated_delta_rule", DELTA | {"decay": "channel"}, (peers.fla_kda,)),
    Case("RWKV-7", "dplr_delta_rule", {"heads": 12, "key": 64, "value": 64}, (peers.fla_dplr,)),
)


def medians(sides: Mapping[str, Callable[[], object]], rounds: int, patience: float = torch.inf) -> dict[str, float]:
    """Median seconds of each side, all sides once a round after two to warm caches up; a slow side fewer times."""
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(rounds + 2):
        for name, run in sides.items():
            if sum(seconds[name]) > patience:
                continue
            begin = time.perf_counter()
            run()
            seconds[name].append(time.perf_counter() - begin)
    return {name: statistics.median(times[2:] or times) for name, times in seconds.items()}


def draw(case: Case, length: int, dtype: torch.dtype) -> dict[str, Any]:
    """The operator's own example at the case's sizes, batch 1, without a state; minGRU's ranges in its scan."""
    example = importlib.import_module(f"seqzoo.kernels.{case.operator}.reference").example
    inputs = example(batch=1, time=length, dtype=dtype, **case.sizes)
    inputs = {name: x for name, x in inputs.items() if name != "state"}
    if case.operator == "linear_scan":
        inputs |= {"a": inputs["a"].clamp(0.01, 0.99), "b": inputs["b"].abs()}
    return inputs


def operator_of(case: Case, backend: str = "auto") -> Callable[..., Any]:
    operator = getattr(importlib.import_module(f"seqzoo.kernels.{case.operator}"), case.operator)
    return functools.partial(operator, backend=backend)


def forward(run: Callable[..., Any], inputs: Mapping[str, Any]) -> Callable[[], object]:
    def once() -> object:
        with torch.no_grad():
            return run(**inputs)

    return once


def forward_and_backward(run: Callable[..., Any], inputs: Mapping[str, Any]) -> Callable[[], object]:
    inputs = {name: x.detach().requires_grad_() if isinstance(x, Tensor) else x for name, x in inputs.items()}
    learned = [x for x in inputs.values() if isinstance(x, Tensor)]

    def once() -> object:
        y = run(**inputs)
        y = y if isinstance(y, Tensor) else y[0]
        return torch.autograd.grad(y, learned, torch.ones_like(y), allow_unused=True)

    return once


def work(case: Case, inputs: Mapping[str, Any]) -> tuple[float, float]:
    """Floating-point operations and bytes of forward and backward: what binds an operator however it is written.

    A matrix-state operator is counted in chunks of 64, the backward as twice the forward; each input, output and
    gradient passes through memory once.
    """
    batch, length = next(x.shape[:2] for x in inputs.values() if isinstance(x, Tensor))
    moved = 2 * sum(x.nbytes for x in inputs.values() if isinstance(x, Tensor))
    sizes = case.sizes
    if "key" in sizes:
        key, value, heads = sizes["key"], sizes["value"], sizes["heads"]
        within, across = {
            "gated_delta_rule": (3 * key + 2 * value, 6 * key * value),
            "dplr_delta_rule": (6 * key + 4 * value, 8 * key * value),
        }.get(case.operator, (key + value, 4 * key * value))
        operations = heads * (CHUNK * within + across)
        out = inputs["v"].nbytes
    else:
        taps = sizes.get("size", 4)
        operations, out = 8 * taps * sizes["channels"], next(iter(inputs.values())).nbytes
    return 3 * operations * batch * length, moved + 2 * out


def machine_rates() -> dict[str, float]:
    """What this machine reaches: operations a second of large matrix products, bytes a second of a copy."""
    rates = {}
    for dtype in DTYPES:
        a = torch.randn(2048, 2048).to(dtype)
        seconds = medians({"mm": functools.partial(torch.mm, a, a)}, 5)["mm"]
        rates[str(dtype)] = 2 * 2048**3 / seconds
    source = torch.empty(64 << 20)
    target = torch.empty_like(source)
    rates["copy"] = 2 * source.nbytes / medians({"copy": functools.partial(target.copy_, source)}, 5)["copy"]
    return rates


def compare_with_peers(console: Console, length: int = 4096, only: Sequence[str] = ()) -> None:
    """Operators against other people's PyTorch code: milliseconds, ratio of medians, and the share of the bound."""
    rates = machine_rates()
    products = ", ".join(
        f"{rates[str(dtype)] / 1e9:.0f} GFLOP/s {str(dtype).removeprefix('torch.')}" for dtype in DTYPES
    )
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
        box=SIMPLE_HEAD,
    )
    for case in CASES:
        if case.operator not in OPERATORS or (only and not any(word.lower() in case.name.lower() for word in only)):
            continue
        for dtype in DTYPES:
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
            bound = max(operations / rates[str(dtype)], moved / rates["copy"])
            for name in usable:
                ours = name == "seqzoo"
                table.add_row(
                    case.name if ours else "",
                    str(dtype).removeprefix("torch.") if ours else "",
                    name,
                    f"{ahead[name] * 1e3:.1f}",
                    f"{both[name] * 1e3:.1f}",
                    "" if ours else f"{ahead[name] / ahead['seqzoo']:.1f}",
                    "" if ours else f"{both[name] / both['seqzoo']:.1f}",
                    f"{bound / both[name]:.0%}",
                )
    console.print(table)


def one_step(console: Console) -> None:
    """One decoding step of every operator, 12 heads of 64 x 64 (768 channels), batch 1, float32: the median of 200."""
    table = Table("operator", "us", box=SIMPLE_HEAD)
    for case in CASES:
        if case.operator not in OPERATORS:
            continue
        heads = {"groups": 12, "heads": 12, "key": 64, "value": 64} if "key" in case.sizes else {}
        if "groups" not in case.sizes:
            heads.pop("groups", None)
        step = case._replace(sizes=case.sizes | heads)
        reference = importlib.import_module(f"seqzoo.kernels.{case.operator}.reference")
        inputs = reference.example(batch=1, time=1, dtype=torch.float32, **step.sizes)
        seconds = medians({"ours": forward(operator_of(step), inputs)}, ROUNDS)["ours"]
        table.add_row(case.name, f"{seconds * 1e6:.0f}")
    console.print(table)


def _resident(kind: str) -> int:
    """Bytes of this process in memory: now (``VmRSS``), or the most since the mark was reset (``VmHWM``)."""
    found = re.search(rf"{kind}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found
    return int(found[1]) * 1024


def _peak(case: Case, name: str, length: int, dtype: torch.dtype, threads: int, answer: Any) -> None:
    torch.set_num_threads(threads)
    run = {"seqzoo": operator_of(case)}.get(name) or getattr(peers, name)
    forward_and_backward(run, draw(case, 128, dtype))()
    once = forward_and_backward(run, draw(case, length, dtype))
    Path("/proc/self/clear_refs").write_text("5")  # resets the mark
    before, begin = _resident("VmRSS"), time.perf_counter()
    once()
    answer.put((time.perf_counter() - begin, _resident("VmHWM") - before))


def peak(case: Case, name: str, length: int, dtype: torch.dtype = torch.float32) -> tuple[float, float]:
    """Seconds and additional peak bytes of one forward and backward, in a process of its own."""
    context = multiprocessing.get_context("spawn")
    answer = context.Queue()
    child = context.Process(target=_peak, args=(case, name, length, dtype, torch.get_num_threads(), answer))
    child.start()
    result = answer.get()
    child.join()
    return result


def over_lengths(console: Console, only: Sequence[str] = ()) -> None:
    """Seconds a thousand tokens and peak memory of forward and backward, from 1k to 64k tokens, float32."""
    lengths = (1024, 4096, 16384, 65536)
    table = Table(
        "operator", "side", *(f"ms/1k at {n:,}" for n in lengths), *(f"peak at {n:,}" for n in lengths), box=SIMPLE_HEAD
    )
    for case in CASES:
        if case.operator not in OPERATORS or (only and not any(word.lower() in case.name.lower() for word in only)):
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
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", help=f"any of {', '.join(PARTS)}; all by default")
    parser.add_argument("--only", action="append", default=[], help="part of an operator's name in peers and lengths")
    arguments = parser.parse_args()
    chosen = arguments.parts or list(PARTS)
    if unknown := set(chosen) - set(PARTS):
        parser.error(f"no part {', '.join(sorted(unknown))}; there are {', '.join(PARTS)}")
    torch.set_num_threads(THREADS)
    console = Console(width=max(Console().width, 170))
    console.print(f"torch {torch.__version__}, {torch.get_num_threads()} threads")
    for part in chosen:
        console.print(f"\n[bold]{(PARTS[part].__doc__ or '').strip()}[/bold]")
        narrowed = {"only": arguments.only} if part in ("peers", "lengths") else {}
        PARTS[part](console, **narrowed)


if __name__ == "__main__":
    main()
