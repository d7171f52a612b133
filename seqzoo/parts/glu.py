"""Gated projections."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn


class GatedLinear(nn.Linear):
    """A projection behind its own gate: ``a * sigmoid(b)`` with ``[a, b] = W x + bias``, the output of S4 and its kin.

    Args:
        dim: width of the input.
        out: width of the output.
    """

    def __init__(self, dim: int, out: int) -> None:
        super().__init__(dim, 2 * out)

    def forward(self, input: Float[Tensor, "... dim"]) -> Float[Tensor, "... out"]:
        return F.glu(super().forward(input), -1)

    @torch.no_grad()
    def scale_output(self, factor: float) -> None:
        """Multiply what comes out by ``factor``: the gate stays."""
        for parameter in (self.weight, self.bias):
            parameter[: self.out_features // 2].mul_(factor)
