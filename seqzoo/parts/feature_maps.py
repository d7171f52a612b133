"""Feature maps: what makes a product of queries and keys into another kernel than the exponential."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor


def taylor_size(dim: int) -> int:
    """Features that ``taylor`` makes of ``dim`` numbers."""
    return 1 + dim + dim * (dim + 1) // 2


def taylor(x: Float[Tensor, "... dim"]) -> Float[Tensor, "... feature"]:
    """Features whose product is ``1 + s + s^2 / 2``, the exponential's series, of ``s = q . k / sqrt(dim)``.

    The square of a sum has every product of two different numbers twice: it is kept once, times the root of two.
    """
    dim = x.shape[-1]
    x = x * dim**-0.25
    squares = x.square() * 0.5**0.5
    products = [x[..., i : i + 1] * x[..., i + 1 :] for i in range(dim - 1)]
    return torch.cat([torch.ones_like(x[..., :1]), x, squares, *products], -1)
