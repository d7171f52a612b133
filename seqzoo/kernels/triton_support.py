"""What the Triton kernels of all operators share. Triton itself is imported only where a kernel runs.

An operator's ``triton_op.py`` defines its ops for torch, which import its ``triton_kernels.py``, the kernels and what
launches them, when they run. So ``torch.compile`` sees ops that it need not look into, and ``import seqzoo`` never
imports Triton.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import os
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from seqzoo.kernels.torch_operators import constant_in_graphs

# The first with tensor cores that multiply bfloat16; they are also what a GPU of CUDA's kind is asked to be.
OLDEST_CAPABILITY = (8, 0)
# For ``torch_operators.define``: kernels run on GPUs and, interpreted, on the CPU.
DEVICES = "CompositeExplicitAutograd"


@functools.cache
def _installed() -> bool:
    return importlib.util.find_spec("triton") is not None


@constant_in_graphs
def missing(device: torch.device) -> str | None:
    """Why Triton kernels cannot run on tensors of ``device``; None where they can."""
    if not _installed():
        return "the package triton is not installed"
    if device.type == "cpu":
        interpreted = os.environ.get("TRITON_INTERPRET") == "1"
        return None if interpreted else "the tensors are on the CPU, where Triton only has a slow interpreter for tests"
    if device.type != "cuda":
        return f"there are no Triton kernels for devices of type {device.type}"
    capability = torch.cuda.get_device_capability(device)
    if torch.version.hip is None and capability < OLDEST_CAPABILITY:
        has, needs = (".".join(map(str, version)) for version in (capability, OLDEST_CAPABILITY))
        return f"the GPU has compute capability {has}; the kernels need {needs}"
    return None


# Tokens that one program of any kernel reads at once, at most.
LONGEST_BLOCK = 256


def launcher(operator: str, name: str) -> Callable[..., Any]:
    """``name`` of the operator's ``triton_kernels.py``, which is imported where it is called."""

    def launch(*inputs: Any) -> Any:
        return getattr(importlib.import_module(f"seqzoo.kernels.{operator}.triton_kernels"), name)(*inputs)

    return launch


def last_axis_contiguous(x: Tensor) -> Tensor:
    """``x``, copied only if its last axis is strided: kernels take any strides of the axes in front of it."""
    return x if x.stride(-1) == 1 else x.contiguous()


def heads_within_reach(x: Tensor) -> Tensor:
    """``x`` ``[batch, time, head, channel]`` with a contiguous last axis; copied, too, where heads lie far apart.

    Kernels count heads, and tokens within a block, in 32 bits: all that these span must be less than 2^31 numbers.
    """
    far = max(x.stride(2) * x.shape[2], x.stride(1) * LONGEST_BLOCK) >= 1 << 31
    return x.contiguous() if far else last_axis_contiguous(x)


@functools.cache
def fits_large_tiles() -> bool:
    """Whether the GPU multiplies large tiles without spills.

    NVIDIA's chips from compute capability 9.0 on, but those of 12.0, read operands of matmuls from shared memory; those
    of AMD have twice as many registers. Others hold operands and sums in the same 255 registers a thread.
    """
    if os.environ.get("TRITON_INTERPRET") == "1":
        return False
    return bool(torch.version.hip) or (9, 0) <= torch.cuda.get_device_capability() < (12, 0)


def launch_options(num_warps: int, num_stages: int) -> dict[str, int]:
    """How a kernel is launched, given what is right for NVIDIA's chips."""
    if torch.version.hip:  # a warp has twice the threads, and a chip less shared memory
        return {"num_warps": max(num_warps // 2, 1), "num_stages": 1}
    return {"num_warps": num_warps, "num_stages": num_stages}


def segments(time: int, size: int, chunk: int) -> list[tuple[int, int, int]]:
    """Segments of at most ``size`` tokens: the first token, that after the last, and the chunks of each."""
    ends = [(begin, min(begin + size, time)) for begin in range(0, time, size)]
    return [(begin, end, -((begin - end) // chunk)) for begin, end in ends]
