"""The equation in plain PyTorch, for any device, with everything inside in float32 or better."""

from __future__ import annotations

from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

ACTIVATIONS = {"silu": F.silu, "sigmoid": torch.sigmoid}
VARIANTS = {
    "rms, silu": {},
    "rms, silu first": {"gate_first": True},
    "rms, no gate": {"gated": False},
    "nothing learned": {"gated": False, "learned": "nothing"},
    "layer, sigmoid": {"centered": True, "activation": "sigmoid", "learned": "for one group"},
    "layer, sigmoid first": {"centered": True, "activation": "sigmoid", "gate_first": True, "learned": "for one group"},
    "layer, no gate": {"centered": True, "gated": False},
}


def gated_norm(x, gate, weight, bias, groups, eps, scale, centered, activation, gate_first):
    wide = torch.promote_types(x.dtype, torch.float32)
    factor = None if gate is None else ACTIVATIONS[activation](gate.to(wide))
    y = x.to(wide)
    if factor is not None and gate_first:
        y = y * factor
    parts = y.unflatten(-1, (groups, -1))
    shape = parts.shape[-1:]
    parts = F.layer_norm(parts, shape, eps=eps) if centered else F.rms_norm(parts, shape, eps=eps)
    if scale != 1:
        parts = parts * scale
    # What is learned is for all channels, or the same for each group.
    for learned, apply in ((weight, torch.mul), (bias, torch.add)):
        if learned is not None:
            parts = apply(parts, learned.to(wide).view(-1, parts.shape[-1]))
    y = parts.flatten(-2)
    if factor is not None and not gate_first:
        y = y * factor
    return y.to(x.dtype)


def example(
    batch: int = 2,
    time: int = 37,
    groups: int = 2,
    size: int = 8,
    gated: bool = True,
    learned: Literal["nothing", "for one group", "for all"] = "for all",
    centered: bool = False,
    activation: str = "silu",
    gate_first: bool = False,
    dtype: torch.dtype = torch.float64,
    seed: int = 0,
) -> dict[str, Any]:
    """Random inputs in legal ranges, as keyword arguments of the operator."""
    random = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=random, dtype=torch.float64).to(dtype)

    inputs: dict[str, Any] = {"x": draw(batch, time, groups * size)}
    if gated:
        inputs |= {"gate": draw(batch, time, groups * size)}
    if learned != "nothing":
        count = size if learned == "for one group" else groups * size
        inputs |= {"weight": draw(count), "bias": draw(count)}
    return inputs | {"groups": groups, "centered": centered, "activation": activation, "gate_first": gate_first}
