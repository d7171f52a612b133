"""Other people's GPU kernels behind our signatures: what the adapters of all operators share.

An adapter runs only when it is asked for by the name of its package. It promises what that package does, not our laws:
no float64, and documents only where the package knows them.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from seqzoo.kernels.torch_operators import constant_in_graphs

PACKAGES = {"fla": "flash-linear-attention", "mamba_ssm": "mamba-ssm", "causal_conv1d": "causal-conv1d"}
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@functools.cache
def _installed(package: str) -> bool:
    return importlib.util.find_spec(package) is not None


@constant_in_graphs
def missing(package: str, device: torch.device, dtype: torch.dtype) -> str | None:
    """Why the kernels of ``package`` cannot run on tensors of this kind; None where they can."""
    if not _installed(package):
        return f"the package {PACKAGES[package]} is not installed"
    if device.type != "cuda":
        return f"its kernels are for GPUs, and the tensors are on {device}"
    if dtype not in DTYPES:
        return (
            f"its kernels take float32, bfloat16 and float16, and the tensors are {str(dtype).removeprefix('torch.')}"
        )
    return None


def imported(module: str, function: str) -> Callable[..., Any]:
    """A function of a package that is heavy, or may be absent."""
    return getattr(importlib.import_module(module), function)


def by_documents(
    run: Callable[..., tuple[Tensor, Tensor]],
    inputs: tuple[Tensor, ...],
    state: Tensor | None,
    starts: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Run kernels that take documents end to end, in one row, with their bounds and a state for each.

    Args:
        run: called as ``run(*inputs, initial_state=..., cu_seqlens=...)``; returns outputs and all last states.
        inputs: ``[batch, time, ...]``; they reach ``run`` as ``[1, batch * time, ...]`` where there are starts.
        state: what enters each row.
        starts: where documents begin.

    Returns:
        the outputs, and the last state of each row.
    """
    if starts is None:
        return run(*inputs, initial_state=state, cu_seqlens=None)
    batch, time = starts.shape
    begins = starts.clone()
    begins[:, 0] = True
    # The number of each token's document, among those of all rows.
    document = begins.flatten().cumsum(0).sub(1).unflatten(0, (batch, time))
    bounds = torch.cat([begins.flatten().nonzero()[:, 0], starts.new_tensor([batch * time], dtype=torch.long)])
    initial = None
    if state is not None:
        goes_on = ~starts[:, 0].reshape(batch, *[1] * (state.ndim - 1))
        initial = state.new_zeros(len(bounds) - 1, *state.shape[1:]).index_copy(0, document[:, 0], state * goes_on)
    flat = (x.flatten(0, 1)[None] for x in inputs)
    outputs, last = run(*flat, initial_state=initial, cu_seqlens=bounds)
    return outputs[0].unflatten(0, (batch, time)), last[document[:, -1]]
