"""One command for the day a GPU is there: `python scripts/gpu_check.py`, ten minutes, one Markdown page.

First what the Triton kernels compute on the device: every operator, variant and dtype, with a state and documents,
forward and backward, at most twice as wrong as plain PyTorch in the same dtype, both against float64. Then time and
peak memory at the sizes of published layers, next to whatever of fla, mamba_ssm, causal_conv1d and FlashAttention is
installed. Without a GPU it says so and exits with 2; a wrong kernel exits with 1.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from operator_cases import CASES, Case, draw, operator_of, work
from timing import forward, forward_and_backward
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map_only

from seqzoo.kernels import EVERY_OPERATOR, OPERATORS, TOKENWISE
from seqzoo.kernels.backends import why_not

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
TIMES = (1, 16, 200)
FLOOR = 3 * torch.finfo(torch.float32).eps
"""Relative error that counts as none: the order of float32 sums decides it."""
BATCH, TIME = 8, 4096
ROUNDS = 20
BACKENDS = ("triton", "chunked", "fla", "mamba_ssm", "causal_conv1d")
ATTENTION_HEADS, ATTENTION_DIM = 12, 64


class Wrong(NamedTuple):
    """How far one call is from float64, as a share of what is allowed, and the tensor that is furthest."""

    share: float
    tensor: str


def equation(operator: str) -> Any:
    return importlib.import_module(f"seqzoo.kernels.{operator}.reference")


def to(inputs: Any, device: str, dtype: torch.dtype | None = None) -> Any:
    def move(x: Tensor) -> Tensor:
        if dtype is None or not (x.is_floating_point() or x.is_complex()):
            return x.to(device)
        # There are no complex numbers of half precision to speak of.
        return x.to(device, torch.promote_types(dtype, torch.float32).to_complex() if x.is_complex() else dtype)

    return tree_map_only(torch.Tensor, move, inputs)


def differentiate(run: Callable[..., Any], inputs: dict[str, Any], starts: Tensor | None) -> dict[str, Tensor]:
    """Outputs, last state and gradients, by name, when all outputs are weighted at random."""
    inputs = tree_map_only(
        torch.Tensor, lambda x: x.detach().requires_grad_(x.is_floating_point() or x.is_complex()), inputs
    )
    outputs = tree_leaves(run(**inputs) if starts is None else run(**inputs, starts=starts))
    learned = [x for x in tree_leaves(inputs) if isinstance(x, Tensor) and x.requires_grad]
    random = torch.Generator().manual_seed(1)
    weights = [torch.randn(y.shape, generator=random).bfloat16().to(y.device, y.dtype) for y in outputs]
    gradients = torch.autograd.grad(outputs, learned, weights, allow_unused=True, materialize_grads=True)
    results = [*(y.detach() for y in outputs), *gradients]
    names = [*(f"output {n}" for n in range(len(outputs))), *(f"gradient {n}" for n in range(len(learned)))]
    return dict(zip(names, results, strict=True))


@contextlib.contextmanager
def plain(operator: str) -> Iterator[Callable[..., Any]]:
    """The reference with every sum in the dtype of its inputs, as plain PyTorch runs it."""
    module = equation(operator)
    widen = getattr(module, "accumulation_dtype", None)
    if widen is not None:
        module.accumulation_dtype = lambda x: x.dtype
    try:
        yield operator_of(Case(operator, operator, {}, ()), "reference")
    finally:
        if widen is not None:
            module.accumulation_dtype = widen


def compare(operator: str, variant: str, dtype: torch.dtype, length: int, device: str, seeds: int = 3) -> Wrong:
    """The Triton kernels against the reference in float64, on the same numbers."""
    run = operator_of(Case(operator, operator, {}, ()), "triton")
    exact = operator_of(Case(operator, operator, {}, ()), "reference")
    errors: list[dict[str, tuple[float, float]]] = []
    for seed in range(seeds):
        inputs = equation(operator).example(time=length, dtype=dtype, seed=seed, **equation(operator).VARIANTS[variant])
        starts = None
        if operator in OPERATORS:
            starts = (torch.rand(2, length, generator=torch.Generator().manual_seed(seed)) < 1 / 16).to(device)
        inputs = to(inputs, device)
        truth = differentiate(exact, to(inputs, device, torch.float64), starts)
        ours = differentiate(run, inputs, starts)
        with plain(operator) as reference:
            theirs = differentiate(reference, to(inputs, device, dtype), starts)
        sizes = {name: max(x.norm().item(), 0.01 * x.numel() ** 0.5) for name, x in truth.items()}
        errors.append(
            {
                name: tuple((z[name].to(x.dtype) - x).norm().item() / sizes[name] for z in (ours, theirs))
                for name, x in truth.items()
            }
        )

    def root_mean_square(name: str, side: int) -> float:
        return statistics.fmean(error[name][side] ** 2 for error in errors) ** 0.5

    shares = {name: root_mean_square(name, 0) / max(2 * root_mean_square(name, 1), FLOOR) for name in errors[0]}
    # A NaN is further away than any number.
    shares = {name: torch.inf if share != share else share for name, share in shares.items()}
    furthest = max(shares, key=lambda name: shares[name])
    return Wrong(shares[furthest], furthest)


def check_numbers(
    device: str, deadline: float, operators: list[str], dtypes=DTYPES, times=TIMES
) -> tuple[list[str], bool]:
    """Markdown rows, and whether all is right."""
    rows = ["| operator | variant | dtype | error, of what is allowed | where |", "|---|---|---|---|---|"]
    right = True
    for operator in operators:
        for variant in equation(operator).VARIANTS:
            for dtype in dtypes:
                if time.perf_counter() > deadline:
                    rows.append(f"| {operator} | {variant} | {name_of(dtype)} | not reached in time | |")
                    continue
                try:
                    by_time = {length: compare(operator, variant, dtype, length, device) for length in times}
                except Exception as problem:
                    right = False
                    what = f"{type(problem).__name__}: {problem}".splitlines()[0].replace("|", "/")
                    rows.append(f"| {operator} | {variant} | {name_of(dtype)} | **fails** | {what[:200]} |")
                    continue
                length, worst = max(by_time.items(), key=lambda pair: pair[1].share)
                right &= worst.share <= 1
                mark = "" if worst.share <= 1 else "**wrong** "
                place = f"{worst.tensor}, {length} tokens"
                rows.append(f"| {operator} | {variant} | {name_of(dtype)} | {mark}{worst.share:.2f} | {place} |")
    return rows, right


def name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def measure(run: Callable[[], object], device: str, rounds: int = ROUNDS) -> tuple[float, float]:
    """Median milliseconds, and the most megabytes that a call holds beyond what was there before."""
    gpu = device == "cuda"
    run()
    if gpu:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
    before, times = torch.cuda.memory_allocated() if gpu else 0, []
    for _ in range(rounds):
        begin = time.perf_counter()
        run()
        if gpu:
            torch.cuda.synchronize()
        times.append(time.perf_counter() - begin)
    peak = torch.cuda.max_memory_allocated() - before if gpu else 0
    return 1e3 * statistics.median(times), peak / 1e6


def rates(device: str, size: int = 8192) -> tuple[float, float]:
    """What the device reaches: operations a second of a bfloat16 matmul, bytes a second of a copy."""
    a = torch.randn(size, size, device=device, dtype=torch.bfloat16)
    target = torch.empty_like(a)
    operations = 2 * size**3 / measure(lambda: a @ a, device)[0] * 1e3
    return operations, 2 * a.nbytes / measure(lambda: target.copy_(a), device)[0] * 1e3


def time_case(case: Case, device: str, batch: int, length: int, dtype: torch.dtype) -> list[tuple[str, str]]:
    """Every backend that can run, and what its row says: milliseconds forward, both, and megabytes."""
    # One sequence, many times over: numbers do not change how long kernels take.
    inputs = {
        name: x.repeat(batch, *[1] * (x.ndim - 1)) if isinstance(x, Tensor) and x.ndim >= 3 else x
        for name, x in draw(case, length, dtype).items()
    }
    inputs = to(inputs, device)
    rows = []
    for backend in BACKENDS:
        if backend not in OPERATORS[case.operator] or why_not(backend, torch.device(device), dtype) is not None:
            continue
        run = operator_of(case, backend)
        try:
            ahead, _ = measure(forward(run, inputs), device)
            both, peak = measure(forward_and_backward(run, inputs), device)
            rows.append((backend, f"{ahead:.3f} | {both:.3f} | {peak:.0f}"))
        except Exception as problem:
            rows.append((backend, f"{type(problem).__name__} | | "))
    return rows


def time_attention(device: str, batch: int, length: int) -> list[tuple[str, str]]:
    """Softmax attention of the same width: what linear time is measured by."""
    shape = (batch, length, ATTENTION_HEADS, ATTENTION_DIM)
    q, k, v = (torch.randn(shape, device=device, dtype=torch.bfloat16) for _ in range(3))

    def sdpa(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        attend = torch.nn.functional.scaled_dot_product_attention
        return attend(*(x.transpose(1, 2) for x in (q, k, v)), is_causal=True).transpose(1, 2)

    sides: dict[str, Callable[..., Tensor]] = {"torch SDPA": sdpa}
    with contextlib.suppress(ImportError):
        flash = importlib.import_module("flash_attn").flash_attn_func
        sides["FlashAttention"] = lambda q, k, v: flash(q, k, v, causal=True)
    rows = []
    for name, run in sides.items():
        inputs = {"q": q, "k": k, "v": v}
        ahead, _ = measure(forward(run, inputs), device)
        both, peak = measure(forward_and_backward(run, inputs), device)
        rows.append((name, f"{ahead:.3f} | {both:.3f} | {peak:.0f}"))
    return rows


def check_speed(device: str, deadline: float, batch: int = BATCH, length: int = TIME, cases=CASES) -> list[str]:
    """Markdown rows."""
    operations, bandwidth = rates(device, 8192 if device == "cuda" else 256)
    rows = [
        f"bfloat16, batch {batch} of {length:,} tokens; a matmul reaches {operations / 1e12:.0f} TFLOP/s here, a copy "
        f"{bandwidth / 1e9:.0f} GB/s, which give the bound of forward and backward.",
        "",
        "| operator | side | ms forward | both | peak MB | bound, ms |",
        "|---|---|---|---|---|---|",
    ]
    for case in cases:
        if time.perf_counter() > deadline:
            rows.append(f"| {case.name} | not reached in time | | | | |")
            continue
        needed, moved = work(case, draw(case, 64, torch.bfloat16))
        bound = 1e3 * max(needed / operations, moved / bandwidth) * batch * length / 64
        for side, numbers in time_case(case, device, batch, length, torch.bfloat16):
            rows.append(f"| {case.name} | {side} | {numbers} | {bound:.3f} |")
    for side, numbers in time_attention(device, batch, length):
        rows.append(f"| softmax attention | {side} | {numbers} | |")
    return rows


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("gpu_check.md"), help="the page to write")
    parser.add_argument("--minutes", type=float, default=10, help="half of them for numbers, half for speed")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        print("gpu_check: no GPU that torch can use is here", file=sys.stderr)
        return 2
    began, seconds = time.perf_counter(), 60 * options.minutes
    known = EVERY_OPERATOR | TOKENWISE
    with_triton = [name for name, implementations in known.items() if "triton" in implementations]
    numbers, right = check_numbers("cuda", began + seconds / 2, with_triton)
    speed = check_speed("cuda", began + seconds)
    capability = ".".join(map(str, torch.cuda.get_device_capability()))
    head = f"# {torch.cuda.get_device_name()}, compute capability {capability}, torch {torch.__version__}"
    page = [head, "", "## Numbers", "", *numbers, "", "## Speed and memory", "", *speed, ""]
    options.out.write_text("\n".join(page))
    print("\n".join(page))
    return 0 if right else 1


if __name__ == "__main__":
    sys.exit(main())
