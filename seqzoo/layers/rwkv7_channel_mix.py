"""RWKV-7's channel mix: an MLP that glances at the token before (Peng et al. 2025, https://arxiv.org/abs/2503.14456)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor, nn

from seqzoo.mixer import Mixer
from seqzoo.parts.depth import depth_ratios
from seqzoo.parts.token_shift import ShiftState, glance_back, ramp


class RWKV7ChannelMix(Mixer):
    """RWKV-7's MLP: squared rectified features of a token and the one before.

        y = W_out relu(W (x + (x_{t-1} - x) * mu))^2

    Args:
        dim: width of the input and output.
        hidden: inner width; None for ``4 dim``.
        layer_index: which layer of its stack this is, from 0 on: by it depends how the glances back start.
        num_layers: layers of the stack.

    Raises:
        ValueError: ``hidden`` is below 1, or ``layer_index`` is not below ``num_layers``.
    """

    state_formula = "dim"

    def __init__(self, dim: int, *, hidden: int | None = None, layer_index: int = 0, num_layers: int = 1) -> None:
        super().__init__(dim)
        hidden = 4 * dim if hidden is None else hidden
        if hidden < 1:
            raise ValueError(f"hidden={hidden}: the inner width is at least 1")
        _, self.shallow = depth_ratios(layer_index, num_layers)
        self.mix = nn.Parameter(torch.empty(dim))
        self.key = nn.Linear(dim, hidden, bias=False)
        self.out = nn.Linear(hidden, dim, bias=False)
        self._draw()

    @torch.no_grad()
    def _draw(self) -> None:
        self.mix.copy_(ramp(self.mix, self.shallow**4))
        width = 0.5 * len(self.mix) ** -0.5
        nn.init.uniform_(self.key.weight, -width, width)
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
        (seen,), last = glance_back(x, self.mix[None], state and state.last, starts)
        return self.out(F.relu(self.key(seen)).square()), ShiftState(last)

    def state_bytes(self, length: int, *, dtype: torch.dtype = torch.float32) -> int:
        return len(self.mix) * dtype.itemsize
