"""fla's layer classes on a CPU: its Triton kernels give way to its own naive operators, and to plain PyTorch."""

from __future__ import annotations

import importlib.util
import warnings
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

pytest.importorskip("fla", reason="the peers are fla's layers")


class Convolution(nn.Conv1d):
    """In place of ``ShortConvolution``, with its parameters and its cache ``[batch, channel, size]``."""

    def __init__(self, hidden_size: int, kernel_size: int, bias: bool = False, activation: str | None = "silu") -> None:
        super().__init__(hidden_size, hidden_size, kernel_size, groups=hidden_size, bias=bias)
        self.activation = activation

    def forward(self, x: Tensor, cache: Tensor | None = None, **_: Any) -> tuple[Tensor, Tensor]:
        size = self.kernel_size[0]
        past = x.new_zeros(len(x), x.shape[-1], size) if cache is None else cache
        padded = torch.cat([past, x.mT], -1)
        y = super().forward(padded[..., 1:]).mT
        return F.silu(y) if self.activation == "silu" else y, padded[..., -size:].clone()


class Norm(nn.Module):
    """In place of ``RMSNorm`` and ``FusedRMSNormGated``: in float32, the gate after the scale."""

    bias = None

    def __init__(
        self,
        hidden_size: int,
        elementwise_affine: bool = True,
        eps: float = 1e-5,
        activation: str = "swish",
        **_: Any,
    ) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(hidden_size)) if elementwise_affine else None
        self.eps, self.gate = eps, torch.sigmoid if activation == "sigmoid" else F.silu

    def forward(self, x: Tensor, gate: Tensor | None = None) -> Tensor:
        y = rms_norm(x.float(), self.weight, self.eps)
        return (y if gate is None else y * self.gate(gate.float())).to(x.dtype)


def rms_norm(x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    y = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)
    return y if weight is None else y * weight.to(y.dtype)


class HeadNorm(nn.Module):
    """In place of ``GroupNorm``: over each group of the last axis, in float32, with a scale and a bias."""

    def __init__(self, num_groups: int, hidden_size: int, eps: float = 1e-5, **_: Any) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.ones(hidden_size)), nn.Parameter(torch.zeros(hidden_size))
        self.groups, self.eps = num_groups, eps

    def forward(self, x: Tensor) -> Tensor:
        flat = F.group_norm(x.float().flatten(0, -2), self.groups, self.weight.float(), self.bias.float(), self.eps)
        return flat.view(x.shape).to(x.dtype)


def fla_layers(family: str, folder: str = "layers", **operators: Any) -> Any:
    """A copy of the module ``fla.folder.family``, its kernels replaced by ``operators`` of the same names."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # fla says that there is no GPU
        spec = importlib.util.find_spec(f"fla.{folder}.{family}")
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    plain = {"ShortConvolution": Convolution, "RMSNorm": Norm, "FusedRMSNormGated": Norm, "GroupNorm": HeadNorm}
    for name, replacement in (plain | operators).items():
        assert name in plain or hasattr(module, name), f"{spec.name} has no {name}"
        setattr(module, name, replacement)
    return module


def new_cache() -> Any:
    """An empty cache of fla's, for a layer with ``layer_idx=0``."""
    from fla.models.utils import Cache

    return Cache()


def run_fla(peer: nn.Module, x: Tensor, cache: Any = None) -> Tensor:
    return peer(x, past_key_values=cache, use_cache=cache is not None)[0]


def l2(x: Tensor) -> Tensor:
    """fla's normalisation of queries and keys, rounded to their dtype as its kernels do."""
    wide = x.float()
    return (wide * torch.rsqrt(wide.square().sum(-1, keepdim=True) + 1e-6)).to(x.dtype)
