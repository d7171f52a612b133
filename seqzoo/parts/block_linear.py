"""A linear map of several equal parts, each by itself."""

from __future__ import annotations

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn


class BlockLinear(nn.Module):
    """A projection from the width to itself by a block-diagonal matrix.

    Weights start normal with variance ``blocks / dim``, so that sizes are kept.

    Args:
        dim: width.
        blocks: equal parts of the width that do not see each other; must divide it.
    """

    def __init__(self, dim: int, blocks: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(blocks, dim // blocks, dim // blocks))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.normal_(self.weight, std=self.weight.shape[1] ** -0.5)

    def forward(self, x: Float[Tensor, "batch time dim"]) -> Float[Tensor, "batch time dim"]:
        parts = rearrange(x, "b t (h i) -> h (b t) i", h=len(self.weight))
        return rearrange(parts @ self.weight, "h (b t) o -> b t (h o)", t=x.shape[1])
