"""Projections through few numbers."""

from __future__ import annotations

from collections.abc import Callable

from jaxtyping import Float
from torch import Tensor, nn


class LowRank(nn.Module):
    """``up(activation(down(x)))``: two matrices in place of one; ``down`` has no bias.

    Args:
        dim: width of the input.
        rank: size between the two.
        out: width of the output.
        activation: applied between them; None for nothing.
        bias: whether a constant is learned for each number of the output.
    """

    def __init__(
        self,
        dim: int,
        rank: int,
        out: int,
        *,
        activation: Callable[[Tensor], Tensor] | None = None,
        bias: bool = False,
    ) -> None:
        super().__init__()
        self.down = nn.Linear(dim, rank, bias=False)
        self.up = nn.Linear(rank, out, bias=bias)
        self.activation = activation

    def forward(self, x: Float[Tensor, "... dim"]) -> Float[Tensor, "... out"]:
        low = self.down(x)
        return self.up(low if self.activation is None else self.activation(low))
