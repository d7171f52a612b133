"""minGRU: a GRU whose gate sees only the input, so that it runs in parallel over time (Feng et al. 2024, https://arxiv.org/abs/2410.01201).

The paper multiplies in logarithms to be exact in parallel; our operator is so without them. By default no projection
has a bias, as in minGRU-pytorch, from which the authors' code is made; theirs all have one (``use_bias``). Left out: a
learned initial state. The authors' block puts a short convolution and an MLP around the layer: those are sublayers of
their own here.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from seqzoo.kernels.linear_scan import linear_scan
from seqzoo.mixer import Mixer


class MinGRUState(NamedTuple):
    """What a sequence leaves behind: the memory, float32 or better."""

    memory: Float[Tensor, "batch channel"]


class MinGRU(Mixer):
    """One gated number a channel: the least that a recurrent layer can remember.

        z_t = sigmoid(W_z x_t),  h_t = (1 - z_t) h_{t-1} + z_t g(W_h x_t),  y_t = W_out h_t
        g(u) = u + 1/2 where u >= 0, sigmoid(u) elsewhere

    Args:
        dim: width of the input and output.
        expand: inner width as a multiple of ``dim``.
        positive: whether g stands in the equation, which keeps h above 0; without it the candidate is ``W_h x`` itself.
        use_bias: whether constants are added to ``W_z x``, ``W_h x`` and ``W_out h``.
        backend: ``auto``, or an implementation that all its operators have (see ``seqzoo layers``).

    Raises:
        ValueError: ``expand`` is below 1.
    """

    state_formula = "expand·dim"
    operators = ("linear_scan",)

    def __init__(
        self, dim: int, *, expand: int = 2, positive: bool = True, use_bias: bool = False, backend: str = "auto"
    ) -> None:
        super().__init__(dim)
        if expand < 1:
            raise ValueError(f"expand={expand}: use 1 or more")
        self.inner, self.positive, self.backend = expand * dim, positive, backend
        self.projection = nn.Linear(dim, 2 * self.inner, bias=use_bias)
        self.out = nn.Linear(self.inner, dim, bias=use_bias)

    def forward(
        self,
        x: Float[Tensor, "batch time dim"],
        state: MinGRUState | None = None,
        starts: Bool[Tensor, "batch time"] | None = None,
    ) -> tuple[Float[Tensor, "batch time dim"], MinGRUState]:
        candidate, gate = self.projection(x).chunk(2, -1)
        if self.positive:
            candidate = torch.where(candidate >= 0, candidate + 0.5, candidate.sigmoid())
        # Kept in float32: rounded to bfloat16, a gate close to 1 would forget 0.4 % a token or nothing.
        keep = torch.sigmoid(-gate.to(torch.promote_types(gate.dtype, torch.float32)))
        h, memory = linear_scan(keep, gate.sigmoid() * candidate, state and state.memory, starts, backend=self.backend)
        return self.out(h), MinGRUState(memory)

    def state_bytes(self, length: int, *, dtype: torch.dtype = torch.float32) -> int:
        return self.inner * torch.promote_types(dtype, torch.float32).itemsize
