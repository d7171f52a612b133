"""How benchmarks measure: medians of sides timed in turn, and peak memory in a process of its own."""

from __future__ import annotations

import ctypes
import gc
import multiprocessing
import re
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map_only

Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")

PATIENCE = 20.0
"""Seconds that one side may take for all its rounds: slow ones are timed fewer times, at least once."""


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


def forward(run: Callable[..., Any], inputs: Mapping[str, Any]) -> Callable[[], object]:
    def once() -> object:
        with torch.no_grad():
            return run(**inputs)

    return once


def forward_and_backward(run: Callable[..., Any], inputs: Mapping[str, Any]) -> Callable[[], object]:
    inputs = tree_map_only(Tensor, lambda x: x.detach().requires_grad_(), dict(inputs))
    learned = [x for x in tree_leaves(inputs) if isinstance(x, Tensor)]

    def once() -> object:
        y = run(**inputs)
        y = y if isinstance(y, Tensor) else y[0]
        return torch.autograd.grad(y, learned, torch.ones_like(y), allow_unused=True)

    return once


def resident(kind: str) -> int:
    """Bytes of this process in memory: now (``VmRSS``), or the most since the mark was reset (``VmHWM``)."""
    found = re.search(rf"{kind}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found
    return int(found[1]) * 1024


def reset_peak() -> int:
    """Begin a new peak, which ``resident("VmHWM")`` reads; the bytes in memory now."""
    gc.collect()
    if sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "malloc_trim"):
        libc.malloc_trim(0)  # memory that is free, but still held, would be used again unseen
    Path("/proc/self/clear_refs").write_text("5")
    return resident("VmRSS")


def in_own_process(
    function: Callable[Arguments, Result], *arguments: Arguments.args, **settings: Arguments.kwargs
) -> Result:
    """``function``'s answer from a new process, whose memory holds nothing else.

    Raises:
        BrokenProcessPool: the process died, for want of memory for example.
    """
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(function, *arguments, **settings).result()
