"""Normalisations that PyTorch lacks."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn


def l2_normalize(x: Float[Tensor, "... dim"], eps: float = 1e-6) -> Float[Tensor, "... dim"]:
    """``x / sqrt(sum x^2 + eps)`` over the last axis, in float32 inside; ``eps`` under the root, as in DeltaNet."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    return (wide * torch.rsqrt(wide.square().sum(-1, keepdim=True) + eps)).to(x.dtype)


class GroupRMSNorm(nn.Module):
    """RMS normalisation over each of ``groups`` equal parts of the last axis, then one scale a channel.

    Args:
        dim: width.
        groups: parts that are normalised apart; must divide ``dim``.
        eps: added to the mean square.
        learned: whether there are scales, which are learned.

    Raises:
        ValueError: ``groups`` does not divide ``dim``.
    """

    def __init__(self, dim: int, *, groups: int = 1, eps: float = 1e-5, learned: bool = True) -> None:
        super().__init__()
        if groups < 1 or dim % groups:
            raise ValueError(f"groups={groups} does not divide the width {dim}")
        self.groups, self.eps = groups, eps
        self.weight = nn.Parameter(torch.empty(dim)) if learned else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        if self.weight is not None:
            nn.init.ones_(self.weight)

    def forward(self, x: Float[Tensor, "... dim"]) -> Float[Tensor, "... dim"]:
        parts = x.unflatten(-1, (self.groups, -1))
        y = F.rms_norm(parts, parts.shape[-1:], eps=self.eps).flatten(-2)
        return y if self.weight is None else y * self.weight.to(x.dtype)


class GroupLayerNorm(nn.Module):
    """Layer normalisation over each of ``groups`` equal parts of the last axis, then one learned scale a channel.

    Args:
        dim: width.
        groups: parts that are normalised apart; must divide ``dim``.
        eps: added to the variance.
        bias: whether a constant is learned for each channel.

    Raises:
        ValueError: ``groups`` does not divide ``dim``.
    """

    def __init__(self, dim: int, *, groups: int = 1, eps: float = 1e-5, bias: bool = False) -> None:
        super().__init__()
        if groups < 1 or dim % groups:
            raise ValueError(f"groups={groups} does not divide the width {dim}")
        self.groups, self.eps = groups, eps
        self.weight = nn.Parameter(torch.empty(dim))
        self.bias = nn.Parameter(torch.empty(dim)) if bias else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.ones_(self.weight)
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def forward(self, x: Float[Tensor, "... dim"]) -> Float[Tensor, "... dim"]:
        parts = x.unflatten(-1, (self.groups, -1))
        y = F.layer_norm(parts, parts.shape[-1:], eps=self.eps).flatten(-2) * self.weight.to(x.dtype)
        return y if self.bias is None else y + self.bias.to(x.dtype)
