"""RWKV-6's channel mix: an MLP that glances at the token before, behind a gate (Peng et al. 2024, https://arxiv.org/abs/2404.05892)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor, nn

from seqzoo.mixer import Mixer
from seqzoo.parts.depth import depth_ratios
from seqzoo.parts.token_shift import ShiftState, glance_back, ramp


class RWKV6ChannelMix(Mixer):
    """RWKV-6's MLP: squared rectified features of a token and the one before, behind a gate.

        x_z = x + (x_{t-1} - x) * mu_z   for z of k, r,   y = sigmoid(W x_r) * W_out relu(W x_k)^2

    Args:
        dim: width of the input and output.
        hidden: inner width; None for ``3.5 dim``, rounded down to a multiple of 32 where it is that large.
        layer_index: which layer of its stack this is, from 0 on: by it depends how the glances back start.
        num_layers: layers of the stack.

    Raises:
        ValueError: ``hidden`` is below 1, or ``layer_index`` is not below ``num_layers``.
    """

    state_formula = "dim"
    no_weight_decay = frozenset({"mix"})

    def __init__(self, dim: int, *, hidden: int | None = None, layer_index: int = 0, num_layers: int = 1) -> None:
        super().__init__(dim)
        if hidden is None:
            hidden = 7 * dim // 2
            hidden -= hidden % 32 if hidden >= 32 else 0
        if hidden < 1:
            raise ValueError(f"hidden={hidden}: the inner width is at least 1")
        _, self.shallow = depth_ratios(layer_index, num_layers)
        self.mix = nn.Parameter(torch.empty(2, dim))
        self.key = nn.Linear(dim, hidden, bias=False)
        self.receptance = nn.Linear(dim, dim, bias=False)
        self.out = nn.Linear(hidden, dim, bias=False)
        self._draw()

    @torch.no_grad()
    def _draw(self) -> None:
        self.mix.copy_(ramp(self.mix, self.shallow**3).expand_as(self.mix))
        nn.init.orthogonal_(self.key.weight)
        nn.init.zeros_(self.receptance.weight)
        nn.init.zeros_(self.out.weight)

    def reset_parameters(self) -> None:
        super().reset_parameters()
        self._draw()

    def forward(
        self,
        x: Float[Tensor, "batch time dim"],
        state: ShiftState | None = None,
        starts: Bool[Tensor, "batch time"] | None = None,
    ) -> tuple[Float[Tensor, "batch time dim"], ShiftState]:
        (xk, xr), last = glance_back(x, self.mix, state and state.last, starts)
        return torch.sigmoid(self.receptance(xr)) * self.out(F.relu(self.key(xk)).square()), ShiftState(last)

    def state_bytes(self, length: int, *, dtype: torch.dtype = torch.float32) -> int:
        return self.mix.shape[1] * dtype.itemsize
