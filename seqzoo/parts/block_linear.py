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

    def forward(
        self, x: Float[Tensor, "batch time dim"], *others: BlockLinear
    ) -> Float[Tensor, "block batch time out"]:
        """What each block becomes by this map, then by each of ``others``."""
        weights: list[Tensor] = [self.weight, *(other.weight for other in others)]
        parts = rearrange(x, "b t (h i) -> h (b t) i", h=len(self.weight))
        if parts.shape[1] < parts.shape[2]:  # few tokens: their products are smaller than the weights
            products = torch.cat([parts @ weight for weight in weights], -1)
        else:
            products = parts @ torch.cat(weights, -1)
        return products.unflatten(1, x.shape[:2])
