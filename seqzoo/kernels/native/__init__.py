"""CPU kernels in C++: which library serves this machine, or why none does.

`build.py` compiles them, once for each instruction set; `tensors.py` says how an operator calls them.
"""

from __future__ import annotations

import ctypes
import os
import sys
from functools import cache
from pathlib import Path

import torch

from seqzoo.kernels.torch_operators import constant_in_graphs

LIBRARIES = Path(__file__).parent / "lib"
# From the plainest to the best, as in build.py, which may not be imported here: it is run as a program.
INSTRUCTION_SETS = ("baseline", "avx2", "avx512", "avx512_bf16")
FORCE = "SEQZOO_NATIVE_ISA"


def missing() -> str | None:
    """None where native kernels can run; otherwise the reason why they cannot.

    Raises:
        ValueError: the environment's SEQZOO_NATIVE_ISA names an instruction set that cannot serve.
    """
    return _load()[1]


@constant_in_graphs
def reason() -> str | None:
    """``missing()`` where torch.compile may trace: the answer becomes a constant of the graph."""
    return missing()


def library() -> ctypes.CDLL:
    """The library of the best instruction set that this CPU has, or of the one that SEQZOO_NATIVE_ISA names.

    Raises:
        ValueError: SEQZOO_NATIVE_ISA names one that is not built, or that this CPU does not have.
        RuntimeError: native kernels are missing.
    """
    loaded, why = _load()
    if loaded is None:
        raise RuntimeError(f"native kernels are missing: {why}")
    return loaded


def fitting() -> list[str]:
    """The instruction sets that were built and that this CPU has, from the plainest to the best."""
    built = [name for name in INSTRUCTION_SETS if (LIBRARIES / f"{name}.so").exists()]
    # Functions that any CPU can run are asked what this one can.
    best = _open(built[0]).native_best_instruction_set() if built else -1
    return [name for name in built if INSTRUCTION_SETS.index(name) <= best]


@cache
def _load() -> tuple[ctypes.CDLL | None, str | None]:
    if not any(LIBRARIES.glob("*.so")):
        return None, "they were not built; `python -m seqzoo.kernels.native.build` builds them, given a C++ compiler"
    _share_openmp()
    try:
        names = fitting()
        if not names:
            return None, "this CPU has none of the instruction sets that they were built for"
        chosen = os.environ.get(FORCE) or names[-1]
        if chosen not in names:
            raise ValueError(f"{FORCE}={chosen!r} cannot serve on this machine; use {', '.join(names)}")
        return _open(chosen), None
    except (OSError, AttributeError) as error:
        return None, f"they could not be loaded: {error}"


def _open(name: str) -> ctypes.CDLL:
    return ctypes.CDLL(str(LIBRARIES / f"{name}.so"))


def _share_openmp() -> None:
    """Let the libraries find the OpenMP runtime that torch has loaded, wherever its symbols are not global already."""
    if sys.platform == "win32" or hasattr(ctypes.CDLL(None), "GOMP_parallel"):
        return
    for runtime in sorted((Path(torch.__file__).parent / "lib").glob("lib*omp*")):
        try:
            ctypes.CDLL(str(runtime), os.RTLD_NOLOAD | os.RTLD_GLOBAL)
        except OSError:  # torch does not use this one
            continue
