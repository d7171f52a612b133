"""Dense maps between real sequences and complex states, each one real product; parameters are pairs of real numbers."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Complex, Float
from torch import Tensor, nn


class ComplexWrite(nn.Module):
    """``B x``: a complex matrix times real inputs, complex64 or better whatever comes in.

    Args:
        dim: width of the input.
        size: complex numbers that come out.
    """

    def __init__(self, dim: int, size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(size, 2, dim))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.normal_(self.weight, std=(2 * self.weight.shape[2]) ** -0.5)

    def forward(self, x: Float[Tensor, "batch time dim"]) -> Complex[Tensor, "batch time size"]:
        pairs = F.linear(x, self.weight.flatten(0, 1)).unflatten(-1, (-1, 2))
        return torch.view_as_complex(pairs.to(torch.promote_types(pairs.dtype, torch.float32)))


class ComplexRead(nn.Module):
    """``Re(C h)``: the real part of a complex matrix times complex states.

    Args:
        size: complex numbers that come in.
        dim: width of the output.
    """

    def __init__(self, size: int, dim: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(dim, size, 2))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.normal_(self.weight, std=self.weight.shape[1] ** -0.5)

    def forward(self, h: Complex[Tensor, "batch time size"]) -> Float[Tensor, "batch time dim"]:
        real, imaginary = self.weight.unbind(-1)
        pairs = torch.view_as_real(h).flatten(-2).to(self.weight.dtype)
        return F.linear(pairs, torch.stack([real, -imaginary], -1).flatten(1))
