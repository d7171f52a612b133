"""SwiGLU: the gated MLP of most language models (Shazeer 2020, https://arxiv.org/abs/2002.05202)."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from seqzoo.kernels.gated_output import gated_output
from seqzoo.mixer import Mixer, NoState


class SwiGLU(Mixer):
    """Per-token features behind a gate: ``out(silu(gate(x)) * up(x))``; tokens do not see each other.

    Args:
        dim: width of the input and output.
        hidden: inner width; None for ``8/3 dim`` rounded up to a multiple of 8, as costly as a plain MLP of ``4 dim``.
        backend: ``auto`` or ``native`` for a gate in one pass on the CPU; any other is plain PyTorch.

    Raises:
        ValueError: ``hidden`` is below 1.
    """

    def __init__(self, dim: int, *, hidden: int | None = None, backend: str = "auto") -> None:
        super().__init__(dim)
        hidden = -(-8 * dim // 24) * 8 if hidden is None else hidden
        if hidden < 1:
            raise ValueError(f"hidden={hidden}: the inner width is at least 1")
        self.backend = backend
        self.gate_up = nn.Linear(dim, 2 * hidden, bias=False)
        self.out = nn.Linear(hidden, dim, bias=False)

    def forward(
        self,
        x: Float[Tensor, "batch time dim"],
        state: NoState | None = None,
        starts: Bool[Tensor, "batch time"] | None = None,
    ) -> tuple[Float[Tensor, "batch time dim"], NoState]:
        gate, up = self.gate_up(x).chunk(2, -1)
        return self.out(gated_output(up, gate, activation="silu", backend=self.backend)), NoState()

    def state_bytes(self, length: int, *, dtype: torch.dtype = torch.float32) -> int:
        return 0
