"""Compile every Triton kernel for real chips, on a machine without one, and fail on what would be slow there.

    python scripts/compile_kernels.py --target sm_80 sm_90 sm_100 gfx942 --operator gated_delta_rule

The operators run, forward and backward, at sizes of published models, on tensors of the CPU whose values nobody looks
at; each kernel that they launch is compiled instead, in all the configurations that these calls ask for. A row for
each: registers, spilled bytes, stack and shared memory as the assembler counts them; matmuls; and instructions of
tensor cores in the machine code, those inside loops and all. A spill, more shared memory than the chip has, a matmul
that did not become an instruction of tensor cores, and a kernel that does not compile are failures.

With --compare-fla the kernels of flash-linear-attention are compiled for the same calls, and a row for each call sets
both side by side. Its kernels are tuned by timing them, which takes a GPU; here each counts as the first of its pruned
configurations that neither spills nor lacks shared memory, or as the one that spills least.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import inspect
import io
import multiprocessing
import os
import re
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from torch.utils._pytree import tree_leaves, tree_map_only

from seqzoo.kernels import EVERY_OPERATOR, OPERATORS, TOKENWISE, adapters, triton_support


class Chip(NamedTuple):
    """What Triton calls a chip, and the shared memory that one program may have, in bytes."""

    target: tuple[str, int | str, int]
    shared: int


CHIPS = {
    "sm_80": Chip(("cuda", 80, 32), 163 * 1024),
    "sm_86": Chip(("cuda", 86, 32), 99 * 1024),
    "sm_89": Chip(("cuda", 89, 32), 99 * 1024),
    "sm_90": Chip(("cuda", 90, 32), 227 * 1024),
    "sm_100": Chip(("cuda", 100, 32), 227 * 1024),
    "gfx942": Chip(("hip", "gfx942", 64), 64 * 1024),
}

HEADS = [{"groups": 2, "heads": 2, "key": size, "value": size} for size in (64, 128, 256)]
SIZES: dict[str, list[dict[str, int]]] = {
    "short_conv": [{"channels": 2048}],
    "linear_scan": [{"channels": 2048}],
    "selective_scan": [{"channels": 1536, "size": size} for size in (16, 64, 128)],
    # Mamba-2 shares keys of 64 or 128 among heads of 64; RetNet and Gated DeltaNet have wide values.
    "gated_linear_attention": [
        *HEADS,
        {"groups": 1, "heads": 4, "key": 64, "value": 64},
        {"groups": 1, "heads": 4, "key": 128, "value": 64},
        {"groups": 2, "heads": 2, "key": 16, "value": 64},
    ],
    "gated_delta_rule": [*HEADS, {"groups": 2, "heads": 4, "key": 128, "value": 128}],
    "gated_delta_product": HEADS[:2],
    "dplr_delta_rule": [{"heads": 2, "key": 64, "value": 64}, {"heads": 2, "key": 128, "value": 128}],
    "mlstm": HEADS,
    "attention": [sizes | {"heads": 4} for sizes in HEADS],
    # Heads of 64 or 128 as of Mamba-2 and delta rules, groups as wide as a layer, and one that fills many registers.
    "gated_norm": [{"groups": groups, "size": size} for groups, size in ((32, 64), (16, 128), (1, 2048), (1, 8192))],
}
TIMES = {"train": 1024, "packed": 1024, "decode": 1}

TENSOR_CORES = {"cuda": re.compile(r"\b(?:HMMA|IMMA|DMMA|HGMMA|UTC\w*MMA)\b"), "hip": re.compile(r"\bv_s?mfmac?_\w+")}


class Job(NamedTuple):
    chip: str
    operator: str
    variant: str
    sizes: tuple[tuple[str, int], ...]
    mode: str
    backend: str = "triton"

    def __str__(self) -> str:
        sizes = " ".join(f"{name}={size}" for name, size in self.sizes)
        return f"{self.operator} ({self.variant}; {sizes}; {self.mode})"


class Kernel(NamedTuple):
    """One compiled kernel, or what stood in the way of one."""

    chip: str
    job: Job
    name: str
    identity: str
    config: str = ""
    registers: int = 0
    spilled: int = 0
    stack: int = 0
    shared: int = 0
    matmuls: int = 0
    missed: int = 0
    in_loops: int = 0
    instructions: int = 0
    error: str = ""

    def failures(self) -> list[str]:
        limit = CHIPS[self.chip].shared
        checks = {
            self.error: bool(self.error),
            f"spills {self.spilled} bytes": self.spilled > 0,
            f"{self.shared} bytes of shared memory; the chip has {limit}": self.shared > limit,
            f"{self.missed} of {self.matmuls} matmuls are not on tensor cores": self.missed > 0,
            "matmuls, but no instruction of tensor cores": self.matmuls > 0 and not self.instructions,
        }
        return [reason for reason, failed in checks.items() if failed]


class Driver:
    """All that Triton asks of a driver while it compiles."""

    def __init__(self, chip: str) -> None:
        self.chip = chip

    def get_current_target(self):
        from triton.backends.compiler import GPUTarget

        return GPUTarget(*CHIPS[self.chip].target)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    @property
    def utils(self) -> SimpleNamespace:
        # Of these, kernels of others choose their blocks by the shared memory; the count is an H100's.
        properties = {"max_shared_mem": CHIPS[self.chip].shared, "multiprocessor_count": 132}
        return SimpleNamespace(get_device_properties=lambda device: properties)


def pretend(chip: str) -> None:
    """Triton, PyTorch and the operators believe from now on that ``chip`` is here. A process knows one chip."""
    from triton.runtime.driver import driver

    kind, architecture, _ = CHIPS[chip].target
    capability = divmod(int(architecture), 10) if kind == "cuda" else (9, 4)
    driver.set_active(Driver(chip))  # pyright: ignore[reportArgumentType]
    triton_support.missing = lambda device: None
    adapters.missing = lambda package, device, dtype: None
    torch.version.hip = "compiling" if kind == "hip" else None
    torch.cuda.get_device_capability = lambda device=None: capability
    torch.cuda.get_device_name = lambda device=None: chip
    torch.cuda.device_count = lambda: 1


@contextlib.contextmanager
def compiling(job: Job) -> Iterator[list[Kernel]]:
    """Kernels that are launched inside are compiled instead, and fill the list."""
    from triton import knobs
    from triton.runtime.autotuner import Autotuner
    from triton.runtime.jit import JITFunction

    compiled, fresh = [], []
    launch, tune = JITFunction.run, Autotuner.run

    def run(self, *args, grid, warmup, **kwargs):
        # An assembler's report is printed by Triton; there is no other way to it.
        said = io.StringIO()
        fresh.clear()
        with contextlib.redirect_stdout(said):
            kernel = launch(self, *args, grid=grid, warmup=True, **kwargs)
        compiled.append(measure(job, kernel, said.getvalue() if fresh else None))
        return kernel

    def choose(self, *args, **kwargs):
        self.nargs = dict(zip(self.arg_names, args, strict=False))
        tried = []
        for config in self.prune_configs(kwargs):
            self.fn.run(*args, **kwargs, **config.all_kwargs())
            tried.append(compiled.pop())
            if not tried[-1].spilled and tried[-1].shared <= CHIPS[job.chip].shared:
                break
        compiled.append(min(tried, key=lambda x: (x.shared > CHIPS[job.chip].shared, x.spilled)))

    knobs.nvidia.dump_ptxas_log = True
    knobs.compilation.listener = lambda *, cache_hit, **_: None if cache_hit else fresh.append(True)
    JITFunction.run, Autotuner.run = run, choose
    try:
        yield compiled
    finally:
        JITFunction.run, Autotuner.run = launch, tune


def first_number(pattern: str, text: str) -> int:
    found = re.search(pattern, text)
    return int(found.group(1)) if found else 0


def count_in_loops(code: list[tuple[str, str]], pattern: re.Pattern[str]) -> tuple[int, int]:
    """Instructions that match ``pattern`` between a label and a later jump to it, and all of them.

    Args:
        code: instructions, each with its address or with the label that stands in front of it.
    """
    places: dict[str, int] = {}
    for index, (label, _) in enumerate(code):
        places.setdefault(label, index)
    looped = [False] * len(code)
    for index, (_, instruction) in enumerate(code):
        jump = re.search(r"\b(?:BRA|s_c?branch\w*)\b.*?(0x[0-9a-f]+|\.LBB\w+)", instruction)
        start = places.get(jump.group(1)) if jump else None
        if start is not None and start < index:
            looped[start : index + 1] = [True] * (index + 1 - start)
    matches = [bool(pattern.search(instruction)) for _, instruction in code]
    return sum(a and b for a, b in zip(looped, matches, strict=True)), sum(matches)


def disassemble(binary: bytes) -> list[tuple[str, str]]:
    import triton

    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(binary)
        file.flush()
        tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
        text = subprocess.run([tool, "-sass", file.name], check=True, capture_output=True, text=True).stdout
    return [(f"0x{int(at, 16):x}", rest) for at, rest in re.findall(r"/\*([0-9a-f]{4,})\*/ +([^;]+);", text)]


def split_assembly(text: str) -> list[tuple[str, str]]:
    label, code = "", []
    for line in text.splitlines():
        if found := re.match(r"(\.LBB\w+):", line):
            label = found.group(1)
        elif line.startswith("\t") and not line.startswith("\t."):
            code.append((label, line))
    return code


def matmuls(text: str) -> tuple[int, int]:
    """Matmuls in Triton's code for the chip, and those that were left to plain multiply-add instructions."""
    layouts = dict(re.findall(r"^#(\w+) = #(.+)$", text, re.MULTILINE))
    products = re.findall(r"= (?:tt\.dot|ttng\.warp_group_dot|ttng\.tc_gen5_mma)\b.*", text)
    products += re.findall(r"^ *(?:ttng\.tc_gen5_mma)\b.*", text, re.MULTILINE)
    missed = 0
    for line in products:
        result = re.search(r"-> tensor<[^,>]+, #(\w+)", line)
        layout = layouts.get(result.group(1) if result else "", "")
        missed += "tt.dot" in line and not re.search("mf?ma", layout)
    return len(products), missed


def remember(kernel: Any, said: str | None) -> str:
    """What the assembler said when a kernel was compiled: now, or before, maybe by another worker."""
    file = Path(os.environ["TRITON_CACHE_DIR"]) / f"{kernel.hash}.said"
    if said is not None:
        unfinished = file.with_suffix(f".{os.getpid()}")
        unfinished.write_text(said)
        unfinished.rename(file)
    for _ in range(100):
        if file.exists():
            return file.read_text()
        time.sleep(0.1)  # another worker compiled it just now, and is about to write
    raise RuntimeError("a kernel comes from the cache, and nobody kept what the assembler said")


_measured: dict[str, Kernel] = {}


def measure(job: Job, kernel: Any, said: str | None) -> Kernel:
    said = remember(kernel, said)
    if kernel.hash not in _measured:
        _measured[kernel.hash] = read_machine_code(job, kernel, said)
    return _measured[kernel.hash]._replace(job=job)


def read_machine_code(job: Job, kernel: Any, said: str) -> Kernel:
    module = kernel.src.fn.module.removeprefix("seqzoo.kernels.").removesuffix(".triton_kernels")
    kind, asm, names = CHIPS[job.chip].target[0], kernel.asm, kernel.src.fn.arg_names
    constants = {names[path[0]]: value for path, value in kernel.src.constants.items()}
    config = [f"{name}={value}" for name, value in constants.items() if name.isupper()]
    config += [f"no {name}" for name, value in constants.items() if value is None and not name.isupper()]
    config += [f"{kernel.metadata.num_warps} warps", f"{kernel.metadata.num_stages} stages"]
    if kind == "cuda":
        registers = first_number(r"Used (\d+) registers", said)
        stack = first_number(r"(\d+) bytes stack frame", said)
        spilled = first_number(r"(\d+) bytes spill stores", said) + first_number(r"(\d+) bytes spill loads", said)
        if not registers:
            raise RuntimeError(f"the assembler's report is not understood: {said!r}")
        code = disassemble(asm["cubin"])
    else:
        registers = first_number(r"\.vgpr_count: +(\d+)", asm["amdgcn"])
        stack = first_number(r"\.private_segment_fixed_size: +(\d+)", asm["amdgcn"])
        spilled = 4 * first_number(r"\.vgpr_spill_count: +(\d+)", asm["amdgcn"])
        code = split_assembly(asm["amdgcn"])
    return Kernel(
        job.chip, job, f"{module}.{kernel.metadata.name}", kernel.hash, " ".join(config), registers, spilled, stack,
        kernel.metadata.shared, *matmuls(asm["ttgir"]), *count_in_loops(code, TENSOR_CORES[kind]),
    )  # fmt: skip


def run_operator(job: Job) -> None:
    """Forward and, unless it decodes, backward of an operator: values do not matter, launches do."""
    equation = importlib.import_module(f"seqzoo.kernels.{job.operator}.reference")
    sizes = {"batch": 1, "time": TIMES[job.mode], "dtype": torch.bfloat16, **dict(job.sizes)}
    known = inspect.signature(equation.example).parameters
    settings = equation.VARIANTS[job.variant]
    inputs = equation.example(**{name: size for name, size in sizes.items() if name in known} | settings)
    starts = None
    if job.mode == "train" and "state" in inputs:
        inputs["state"] = None
    elif job.mode == "packed":
        starts = torch.rand(1, TIMES[job.mode]) < 0.01
    if job.mode != "decode":
        inputs = tree_map_only(
            torch.Tensor, lambda x: x.requires_grad_(x.is_floating_point() or x.is_complex()), inputs
        )
    operator = getattr(importlib.import_module(f"seqzoo.kernels.{job.operator}"), job.operator)
    if job.operator in OPERATORS:
        inputs["starts"] = starts
    outputs = tree_leaves(operator(**inputs, backend=job.backend))
    if job.mode != "decode":
        torch.autograd.backward(outputs, [torch.zeros_like(y) for y in outputs])


def compile_job(job: Job) -> list[Kernel]:
    pretend(job.chip)
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    error = ""
    with compiling(job) as kernels:
        try:
            run_operator(job)
        except Exception as problem:
            error = f"{type(problem).__name__}: {problem}"
    if not error and not kernels:
        error = "no kernel was launched"
    return kernels + [Kernel(job.chip, job, "-", str(job), error=error)] * bool(error)


def collect_jobs(chip: str, operators: list[str], modes: list[str], quick: bool, compare_fla: bool) -> list[Job]:
    jobs = []
    for operator in operators:
        module = importlib.import_module(f"seqzoo.kernels.{operator}")
        variants = importlib.import_module(f"seqzoo.kernels.{operator}.reference").VARIANTS
        backends = ["triton"] + ["fla"] * (compare_fla and "fla" in module.IMPLEMENTATIONS)
        for index, sizes in enumerate(SIZES[operator]):
            # Without documents there is less to compile, and steps hardly depend on sizes.
            few = [mode for mode in modes if mode == "packed" or (mode == "decode" and not index)]
            cases = [(variant, mode) for variant in variants for mode in (few if quick else modes)]
            jobs += [
                Job(chip, operator, variant, tuple(sizes.items()), mode, backend)
                for variant, mode in cases
                for backend in backends
            ]
    return jobs


NUMBERS = ("registers", "spilled", "stack", "shared", "matmuls", "tensor cores: in loops", "all")


def table_of(title: str, *columns: str) -> Table:
    table = Table(title=title, box=SIMPLE_HEAD, title_justify="left")
    for name in columns:
        number = name in NUMBERS or name == "kernels"
        table.add_column(name, overflow="fold", justify="right" if number else "left")
    return table


def show_kernels(chip: str, kernels: list[Kernel]) -> Table:
    table = table_of(chip, "kernel", "config", *NUMBERS)
    for kernel in sorted(kernels, key=lambda x: (x.name, x.config)):
        numbers = (kernel.registers, kernel.spilled, kernel.stack, kernel.shared, kernel.matmuls, kernel.in_loops)
        style = "red" if kernel.failures() else None
        table.add_row(kernel.name, kernel.config, *map(str, (*numbers, kernel.instructions)), style=style)
    return table


def summary(kernels: list[Kernel]) -> list[str]:
    """How many, the most registers and shared memory of one, and the sums of the rest."""
    numbers = [
        len(kernels), max(x.registers for x in kernels), sum(x.spilled for x in kernels),
        sum(x.stack for x in kernels), max(x.shared for x in kernels), sum(x.matmuls for x in kernels),
        sum(x.in_loops for x in kernels), sum(x.instructions for x in kernels),
    ]  # fmt: skip
    return [str(number) for number in numbers]


def show_calls(chip: str, calls: dict[Job, list[Kernel]]) -> Table:
    """A row for each call and side."""
    table = table_of(f"{chip}, calls", "call", "side", "kernels", *NUMBERS)
    for job in sorted(calls, key=lambda x: (str(x), x.backend != "triton")):
        if job._replace(backend="fla") in calls:
            rows = list({kernel.identity: kernel for kernel in calls[job]}.values())
            wrong = next((x.error for x in rows if x.error), None)
            side = "seqzoo" if job.backend == "triton" else "fla"
            table.add_row(str(job), side, *([wrong] if wrong else summary(rows)))
    return table


def show_operators(kernels: list[Kernel]) -> Table:
    """A row for each operator and chip, whatever calls its kernels were compiled for."""
    table = table_of("operators", "kernels of", "chip", "kernels", *NUMBERS)
    for place in sorted({(x.name.split(".")[0], x.chip) for x in kernels if not x.error}):
        table.add_row(*place, *summary([x for x in kernels if (x.name.split(".")[0], x.chip) == place]))
    return table


def main() -> int:
    known = EVERY_OPERATOR | TOKENWISE
    with_triton = [name for name, implementations in known.items() if "triton" in implementations]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target", nargs="+", choices=CHIPS, default=["sm_80", "sm_90"], help="chips")
    parser.add_argument("--operator", nargs="+", choices=with_triton, default=with_triton)
    parser.add_argument("--mode", nargs="+", choices=TIMES, default=list(TIMES), help="what is called")
    parser.add_argument("--quick", action="store_true", help="training with documents only, one size for decoding")
    parser.add_argument("--compare-fla", action="store_true", help="fla's kernels too, which never count as failures")
    parser.add_argument("--workers", type=int, default=os.cpu_count())
    options = parser.parse_args()
    if os.environ.get("TRITON_INTERPRET"):
        parser.error("TRITON_INTERPRET is set: interpreted kernels are not compiled")

    console = Console(width=max(Console().width, 170))
    began, number, failures = time.perf_counter(), 0, []
    ours: list[Kernel] = []
    for chip in options.target:
        calls: dict[Job, list[Kernel]] = {}
        jobs = collect_jobs(chip, options.operator, options.mode, options.quick, options.compare_fla)
        # A cache of this run alone: workers share what they compile, and nothing old can pass for compiled.
        with tempfile.TemporaryDirectory() as cache:
            os.environ["TRITON_CACHE_DIR"] = cache
            context = multiprocessing.get_context("spawn")
            with ProcessPoolExecutor(options.workers, mp_context=context) as pool:
                running = {pool.submit(compile_job, job): job for job in jobs}
                for done in as_completed(running):
                    job, calls[job] = running[done], done.result()
                    bad = {f"{x.name}: {reason}" for x in calls[job] for reason in x.failures()}
                    state = f"{chip} {len(calls)}/{len(jobs)}, {time.perf_counter() - began:.0f} s"
                    side = "" if job.backend == "triton" else f"{job.backend}: "
                    print(
                        f"{state}: {side}{job}: {len(calls[job])} kernels",
                        *sorted(bad),
                        sep="\n  ",
                        file=sys.stderr,
                        flush=True,
                    )
        kernels = {kernel.identity: kernel for kernels in calls.values() for kernel in kernels}.values()
        console.print(show_kernels(chip, [kernel for kernel in kernels if not kernel.error]))
        if options.compare_fla:
            console.print(show_calls(chip, calls))
        ours += [kernel for kernel in kernels if kernel.job.backend == "triton"]
        number += sum(job.backend == "triton" for job in jobs)
    for kernel in ours:
        where = f"{kernel.chip}: {kernel.name} [{kernel.config}] of {kernel.job}"
        failures += [f"{where}: {reason}" for reason in kernel.failures()]
    compiled = sum(not kernel.error for kernel in ours)
    console.print(show_operators(ours))
    print(*failures, sep="\n", file=sys.stderr, flush=True)
    print(f"{compiled} kernels of {number} calls in {time.perf_counter() - began:.0f} s; {len(failures)} failures")
    return bool(failures)


if __name__ == "__main__":
    sys.exit(main())
