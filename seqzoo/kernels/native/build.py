"""Compile the native operators: `python -m seqzoo.kernels.native.build`.

Every `seqzoo/kernels/*/native.cpp` is compiled once for each instruction set into one library each; the loader takes
the best one that the CPU has. Installing the package does the same (hatch_build.py), so this file needs the standard
library only. No OpenMP runtime is linked: the one that torch loads is found at run time (interface.h).
"""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

HERE = Path(__file__).parent
LIBRARIES = HERE / "lib"

_AVX2 = ["-mavx2", "-mfma", "-mf16c"]
_AVX512 = [*_AVX2, "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl"]
# From the plainest to the best; native.cpp answers with a place in this list.
X86 = {"baseline": [], "avx2": _AVX2, "avx512": _AVX512, "avx512_bf16": [*_AVX512, "-mavx512bf16"]}
FLAGS = [
    *("-std=c++17", "-O3", "-fPIC", "-fvisibility=hidden", "-fno-math-errno", "-fno-trapping-math"),
    # An OpenMP pragma would be ignored in silence.
    *("-Wall", "-Werror=unknown-pragmas", "-Wno-psabi", "-Wno-maybe-uninitialized", "-Wno-unknown-warning-option"),
]


def instruction_sets() -> dict[str, list[str]]:
    """Compiler flags of each instruction set that is built for on this kind of machine."""
    return X86 if platform.machine().lower() in ("x86_64", "amd64") else {"baseline": []}


def find_compiler() -> list[str] | None:
    """The command of a C++ compiler: ``$CXX``, or the first of the usual names that exists."""
    if chosen := os.environ.get("CXX"):
        return chosen.split()
    return next(([path] for name in ("c++", "g++", "clang++") if (path := shutil.which(name))), None)


def compile_library(
    sources: Iterable[Path], library: Path, flags: Sequence[str] = (), objects: Path | None = None, jobs: int = 1
) -> None:
    """Compile ``sources`` into the shared ``library``.

    Args:
        sources: C++ files; the headers of ``seqzoo/kernels/native`` are found.
        library: where to write it.
        flags: added to the compiler's, for example those of an instruction set.
        objects: a folder that keeps what was compiled: sources that have not changed since are not compiled again.
        jobs: compilers that run at once.

    Raises:
        RuntimeError: there is no compiler, or it failed; the message ends with what it said.
    """
    compiler = find_compiler()
    if compiler is None:
        raise RuntimeError("no C++ compiler was found (set CXX, or install g++ or clang++)")
    # A library that is in use must not be written over: so it is made beside its place, then moved there.
    library.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=library.parent) as scratch, ThreadPoolExecutor(jobs) as pool:
        keep = objects or Path(scratch)
        keep.mkdir(parents=True, exist_ok=True)

        def compile_one(source: Path) -> Path:
            made = keep / f"{source.parent.name}_{source.stem}.o"
            headers = [*HERE.glob("*.h"), *source.parent.glob("*.h"), HERE / "build.py"]
            if not made.exists() or made.stat().st_mtime <= max(x.stat().st_mtime for x in [source, *headers]):
                _run([*compiler, *FLAGS, *flags, f"-I{HERE}", "-c", str(source), "-o", str(made)])
            return made

        made = list(pool.map(compile_one, sources))
        linked = Path(scratch) / library.name
        undefined = ["-undefined", "dynamic_lookup"] if sys.platform == "darwin" else []
        _run([*compiler, "-shared", *flags, *undefined, *map(str, made), "-o", str(linked)])
        linked.replace(library)


def build(into: Path = LIBRARIES, objects: Path | None = None) -> list[Path]:
    """Build every library into the folder ``into``, replacing those that are there.

    What cannot be built is left out, with one line on standard error that says why: the operators work without.
    ``objects`` is a folder that keeps objects from build to build.
    """
    into.mkdir(parents=True, exist_ok=True)
    for old in into.glob("*.so"):
        old.unlink()
    sources = sorted(HERE.parent.glob("*/native.cpp"))
    built, failures = [], {}
    jobs = max(1, (os.cpu_count() or 1))
    for name, flags in instruction_sets().items():
        try:
            compile_library(sources, into / f"{name}.so", flags, objects and objects / name, jobs)
            built.append(into / f"{name}.so")
        except (RuntimeError, OSError) as error:
            failures[name] = " ".join(str(error).split())
    for reason in dict.fromkeys(failures.values()):
        names = ", ".join(name for name in failures if failures[name] == reason)
        print(f"seqzoo: no native kernels for {names}, slower ones will serve: {reason[:500]}", file=sys.stderr)
    return built


def wheel_tag() -> str:
    """The tag of a wheel that holds libraries of this machine: any Python, this platform."""
    return "py3-none-" + sysconfig.get_platform().replace("-", "_").replace(".", "_")


def _run(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        errors = [line for line in done.stderr.splitlines() if "error" in line] or done.stderr.splitlines() or ["?"]
        raise RuntimeError(f"{command[0]} failed: {errors[0]}")


if __name__ == "__main__":
    for path in build(objects=LIBRARIES / "objects"):
        print(path)
