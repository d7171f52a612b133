"""Glorot's initialisation as RetNet shrank it, and after it GLA and Gated DeltaNet-2."""

from __future__ import annotations

from torch import Tensor, nn

GAIN = 2**-2.5


def draw_shrunk(*matrices: Tensor) -> None:
    """Draw each matrix from its own range, ``2^-2.5 sqrt(6 / (rows + columns))`` to either side of zero.

    The range shrinks with the number of rows: a projection that makes several things at once is split into them first.
    """
    for matrix in matrices:
        nn.init.xavier_uniform_(matrix, gain=GAIN)
