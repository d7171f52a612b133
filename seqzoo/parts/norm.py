"""Normalisations that PyTorch lacks."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor, nn

from seqzoo.kernels.gated_norm import Activation, gated_norm
from seqzoo.parts.settings import check_positive


def l2_normalize(
    x: Float[Tensor, "*axes head size"], eps: float = 1e-6, *, scale: float = 1.0, backend: str = "auto"
) -> Float[Tensor, "*axes head size"]:
    """``scale * x / sqrt(sum x^2 + eps)`` over the last axis; ``eps`` under the root, as in DeltaNet."""
    heads, size = x.shape[-2:]
    y = gated_norm(x.flatten(-2), groups=heads, eps=eps / size, scale=scale * size**-0.5, backend=backend)
    return y.unflatten(-1, (heads, size))


class GroupRMSNorm(nn.Module):
    """RMS normalisation over each of ``groups`` equal parts of ``dim`` channels, then one scale a channel and a gate.

    Args:
        dim: width, or that of each of several heads side by side, which share what is learned.
        groups: parts that are normalised apart; must divide ``dim``.
        eps: added to the mean square.
        learned: whether there are scales, which are learned.
        bias: whether a constant is learned for each channel.
        activation: of the gate, ``silu`` or ``sigmoid``.
        gate_first: whether the gate comes before the norm.
        backend: the layer's.

    Raises:
        ValueError: ``groups`` does not divide ``dim``, or ``eps`` is not above 0.
    """

    centered = False

    def __init__(
        self,
        dim: int,
        *,
        groups: int = 1,
        eps: float = 1e-5,
        learned: bool = True,
        bias: bool = False,
        activation: Activation = "silu",
        gate_first: bool = False,
        backend: str = "auto",
    ) -> None:
        super().__init__()
        if groups < 1 or dim % groups:
            raise ValueError(f"groups={groups} does not divide the width {dim}")
        check_positive("norm_eps", eps)
        self.dim, self.groups, self.eps = dim, groups, eps
        self.activation: Activation = activation
        self.gate_first, self.backend = gate_first, backend
        self.weight = nn.Parameter(torch.empty(dim)) if learned else None
        self.bias = nn.Parameter(torch.empty(dim)) if bias else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        if self.weight is not None:
            nn.init.ones_(self.weight)
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def forward(
        self, x: Float[Tensor, "... channel"], gate: Float[Tensor, "... channel"] | None = None
    ) -> Float[Tensor, "... channel"]:
        """Normalise each ``dim`` of the last axis, which may hold several."""
        return gated_norm(
            x,
            gate,
            self.weight,
            self.bias,
            groups=x.shape[-1] // self.dim * self.groups,
            eps=self.eps,
            centered=self.centered,
            activation=self.activation,
            gate_first=self.gate_first,
            backend=self.backend,
        )


class GroupLayerNorm(GroupRMSNorm):
    """The same after the mean of each part is subtracted: layer normalisation."""

    centered = True
    weight: nn.Parameter
