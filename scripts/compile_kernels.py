"""Compile every Triton kernel for real chips, on a machine without one, and fail on what would be slow there.

    python scripts/compile_kernels.py --target sm_80 sm_90 sm_100 gfx942 --operator gated_delta_rule

The operators run, forward and backward, at sizes of published models, on tensors of the CPU whose values nobody looks
at; each kernel that they launch is compiled instead, in all the configurations that these calls ask for. A row for
each: registers, spilled bytes, stack and shared memory as the assembler counts them; matmuls; and instructions of
tensor cores in the machine code, those inside loops and all. A spill, more shared memory than the chip has, a matmul
that did not become an instruction of tensor cores, and a kernel that does not compile are failures.
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
from typing import Any, NamedTuple

import torch
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from torch.utils._pytree import tree_leaves, tree_map_only

from seqzoo.kernels import OPERATORS, triton_support


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
}
TIMES = {"train": 1024, "packed": 1024, "decode": 1}

TENSOR_CORES = {"cuda": re.compile(r"\b(?:HMMA|IMMA|DMMA|HGMMA|UTC\w*MMA)\b"), "hip": re.compile(r"\bv_s?mfmac?_\w+")}


class Job(NamedTuple):
    chip: str
    operator: str
    variant: str
    sizes: tuple[tuple[str, int], ...]
    mode: str

    def __str__(self) -> str:
        sizes = " ".join(f"{name}={size}" for name, size in self.sizes)
        return f"{self.operator} ({self.variant}; {sizes}; {self.mode})"


class Kernel(NamedTuple):
    """One compiled kernel, or what stood in the way of one."""

    chip: str
    job: str
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
        return list(CHIPS).index(self.chip)  # Triton remembers the target of a device.

    def get_current_stream(self, device: int) -> int:
        return 0


@contextlib.contextmanager
def compiling_for(chip: str) -> Iterator[list[tuple[Any, str, bool]]]:
    """Kernels that are launched inside are compiled for ``chip`` instead.

    Yields:
        the list that fills with each compiled kernel, what the assembler said, and whether it had been compiled before.
    """
    from triton import knobs
    from triton.runtime.driver import driver
    from triton.runtime.jit import JITFunction

    compiled, cached = [], []
    launch = JITFunction.run

    def run(self, *args, grid, warmup, **kwargs):
        # An assembler's report is printed by Triton; there is no other way to it.
        said = io.StringIO()
        cached.clear()
        with contextlib.redirect_stdout(said):
            kernel = launch(self, *args, grid=grid, warmup=True, **kwargs)
        compiled.append((kernel, said.getvalue(), cached != [False]))
        return kernel

    knobs.nvidia.dump_ptxas_log = True
    knobs.compilation.listener = lambda *, cache_hit, **_: cached.append(cache_hit)
    driver.set_active(Driver(chip))  # pyright: ignore[reportArgumentType]
    JITFunction.run = run
    try:
        yield compiled
    finally:
        JITFunction.run = launch


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


def measure(chip: str, job: str, kernel: Any, said: str) -> Kernel:
    module = kernel.src.fn.module.removeprefix("seqzoo.kernels.").removesuffix(".triton_kernels")
    kind, asm, names = CHIPS[chip].target[0], kernel.asm, kernel.src.fn.arg_names
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
        chip, job, f"{module}.{kernel.metadata.name}", kernel.hash, " ".join(config), registers, spilled, stack,
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
    if job.mode == "train":
        inputs["state"] = None
    elif job.mode == "packed":
        starts = torch.rand(1, TIMES[job.mode]) < 0.01
    if job.mode != "decode":
        inputs = tree_map_only(torch.Tensor, lambda x: x.requires_grad_(), inputs)
    operator = getattr(importlib.import_module(f"seqzoo.kernels.{job.operator}"), job.operator)
    outputs = tree_leaves(operator(**inputs, starts=starts, backend="triton"))
    if job.mode != "decode":
        torch.autograd.backward(outputs, [torch.zeros_like(y) for y in outputs])


def compile_job(job: Job) -> list[Kernel]:
    # Kernels run where their launchers believe that they can, and on AMD's chips torch would be AMD's.
    triton_support.missing = lambda device: None
    torch.version.hip = "compiling" if CHIPS[job.chip].target[0] == "hip" else None
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    error = ""
    with compiling_for(job.chip) as compiled:
        try:
            run_operator(job)
        except Exception as problem:
            error = f"{type(problem).__name__}: {problem}"
    rows = [measure(job.chip, str(job), kernel, said) for kernel, said, cached in compiled if not cached]
    if error:
        rows.append(Kernel(job.chip, str(job), "-", str(job), error=error))
    elif not compiled:
        rows.append(Kernel(job.chip, str(job), "-", str(job), error="no kernel was launched"))
    return rows


def collect_jobs(chips: list[str], operators: list[str], modes: list[str]) -> list[Job]:
    jobs = []
    for operator in operators:
        variants = importlib.import_module(f"seqzoo.kernels.{operator}.reference").VARIANTS
        cases = [(sizes, variant, mode) for sizes in SIZES[operator] for variant in variants for mode in modes]
        for sizes, variant, mode in cases:
            jobs += [Job(chip, operator, variant, tuple(sizes.items()), mode) for chip in chips]
    return jobs


def print_kernels(console: Console, chip: str, kernels: list[Kernel]) -> None:
    table = Table(title=chip, box=SIMPLE_HEAD, title_justify="left")
    for name in ("kernel", "config"):
        table.add_column(name, overflow="fold")
    for name in ("registers", "spilled", "stack", "shared", "matmuls", "tensor cores: in loops", "all"):
        table.add_column(name, justify="right")
    for kernel in sorted(kernels, key=lambda x: (x.name, x.config)):
        numbers = (kernel.registers, kernel.spilled, kernel.stack, kernel.shared, kernel.matmuls, kernel.in_loops)
        table.add_row(
            kernel.name,
            kernel.config,
            *map(str, (*numbers, kernel.instructions)),
            style="red" if kernel.failures() else None,
        )
    console.print(table)


def main() -> int:
    with_triton = [name for name, implementations in OPERATORS.items() if "triton" in implementations]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target", nargs="+", choices=CHIPS, default=["sm_80", "sm_90"], help="chips")
    parser.add_argument("--operator", nargs="+", choices=with_triton, default=with_triton)
    parser.add_argument("--mode", nargs="+", choices=TIMES, default=list(TIMES), help="what is called")
    parser.add_argument("--workers", type=int, default=os.cpu_count())
    options = parser.parse_args()
    if os.environ.get("TRITON_INTERPRET"):
        parser.error("TRITON_INTERPRET is set: interpreted kernels are not compiled")

    console = Console(width=max(Console().width, 170))
    began, kernels = time.perf_counter(), {}
    jobs = collect_jobs(options.target, options.operator, options.mode)
    # A cache of this run alone: workers share what they compile, and nothing old can pass for compiled.
    with tempfile.TemporaryDirectory() as cache:
        os.environ["TRITON_CACHE_DIR"] = cache
        context = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(options.workers, mp_context=context) as pool:
            for done in as_completed([pool.submit(compile_job, job) for job in jobs]):
                kernels |= {(kernel.chip, kernel.identity): kernel for kernel in done.result()}
    for chip in options.target:
        print_kernels(
            console, chip, [kernel for kernel in kernels.values() if kernel.chip == chip and not kernel.error]
        )
    failed = 0
    for kernel in kernels.values():
        for reason in kernel.failures():
            failed += 1
            print(f"{kernel.chip}: {kernel.name} [{kernel.config}] of {kernel.job}: {reason}", file=sys.stderr)
    compiled = sum(not kernel.error for kernel in kernels.values())
    print(f"{compiled} kernels of {len(jobs)} calls in {time.perf_counter() - began:.0f} s; {failed} failures")
    return bool(failed)


if __name__ == "__main__":
    sys.exit(main())
