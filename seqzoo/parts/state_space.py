"""Continuous state spaces: where their eigenvalues start, and what one step of time makes of them."""

from __future__ import annotations

import torch
from jaxtyping import Complex, Float
from torch import Tensor


def legendre_eigenvalues(size: int) -> tuple[Complex[Tensor, " half"], Complex[Tensor, "size half"]]:
    """The eigenvalues of HiPPO-LegS made normal, and their eigenvectors, one of each conjugate pair; complex128.

    LegS plus a matrix of rank one is -1/2 plus a skew matrix. That alone is diagonalised, so that real parts are -1/2
    to the last digit, and vectors orthonormal.

    Args:
        size: rows of the matrix; even.
    """
    odd = 2 * torch.arange(size, dtype=torch.float64, device="cpu") + 1
    lower = torch.outer(odd, odd).sqrt().tril(-1)
    frequency, vectors = torch.linalg.eigh(-0.5j * (lower.T - lower))
    half = size // 2
    return torch.complex(torch.full_like(frequency[:half], -0.5), frequency[:half]), vectors[:, :half]


def hold(
    rate: Complex[Tensor, "*shape"], step: Float[Tensor, "*shape"]
) -> tuple[Complex[Tensor, "*shape"], Complex[Tensor, "*shape"]]:
    """What is kept over a step of constant input, ``e^{rate step}``, and what enters, ``(e^{rate step} - 1) / rate``.

    Neither loses digits where the step is short, nor a gradient where it is long.
    """
    growth, angle = (rate * step).real, (rate * step).imag
    kept = growth.exp()
    entered = torch.complex(torch.expm1(growth) - 2 * kept * (angle / 2).sin().square(), kept * angle.sin())
    return torch.polar(kept, angle), entered / rate
