"""Every mixer at width 768 with a published model's head sizes, the peers it is timed against, and how a side is run.

Projections, convolutions, gates and norms are included, as are all gradients. In bfloat16 both sides run under the same
autocast, their weights and inputs in float32; a bare operator's inputs are in bfloat16, as in a layer.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import layer_peers
import operator_peers
import torch
from layer_peers import WIDTH
from operator_cases import FOX, GLA, RETNET, SMALL, Case, draw
from timing import forward, forward_and_backward
from torch import Tensor, nn

from seqzoo import layers
from seqzoo.mixer import Mixer

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


class Bare(NamedTuple):
    """A peer's operator without any layer around it, at the layer's sizes."""

    peer: Callable[..., Tensor]
    operator: str
    sizes: dict[str, Any]


class LayerCase(NamedTuple):
    """A layer with a published model's head sizes, at width 768.

    ``targets``: how much faster than the best peer forward and backward must be, in float32 and in bfloat16.
    """

    name: str
    settings: dict[str, Any]
    peers: tuple[Callable[[], nn.Module] | Bare, ...] = ()
    targets: tuple[float, float] = (1.0, 1.0)
    variant: str = ""

    @property
    def title(self) -> str:
        return f"{self.name}, {self.variant}" if self.variant else self.name

    def build(self, length: int) -> Mixer:
        """The layer, for sequences of ``length`` tokens."""
        settings = {name: length if value is AS_LONG else value for name, value in self.settings.items()}
        return getattr(layers, self.name)(WIDTH, **settings)


AS_LONG = object()
"""Stands for the length of the sequence."""
WIDE = {"groups": 6, "heads": 6, "key": 128, "value": 128}


def _bare_gla(sizes: dict[str, Any], peer: Callable[..., Tensor] = operator_peers.fla_gla, **more: Any) -> Bare:
    return Bare(peer, "gated_linear_attention", sizes | more)


def _bare_dplr(heads: int, size: int) -> Bare:
    return Bare(operator_peers.fla_dplr, "dplr_delta_rule", {"heads": heads, "key": size, "value": size})


CASES = (
    LayerCase("Attention", {"num_heads": 12}, (layer_peers.transformers_llama,)),
    LayerCase(
        "Attention",
        {"num_heads": 12, "window": 512},
        (layer_peers.transformers_mistral, layer_peers.local_attention),
        targets=(2.5, 4),
        variant="window of 512",
    ),
    LayerCase("DifferentialAttention", {"num_heads": 6}),
    LayerCase(
        "ForgettingAttention", {"num_heads": 12}, (Bare(operator_peers.fla_forgetting_attention, "attention", FOX),)
    ),
    LayerCase("LandmarkAttention", {"num_heads": 12}),
    LayerCase("LatentAttention", {"num_heads": 12}),
    LayerCase("LRU", {}),
    LayerCase(
        "Mamba",
        {},
        (layer_peers.torchmamba_mamba, layer_peers.mambapy_mamba, layer_peers.transformers_mamba),
        targets=(5, 12),
    ),
    LayerCase("Mamba2", {}, (layer_peers.transformers_mamba2, layer_peers.torchmamba_mamba2), targets=(1.7, 3)),
    LayerCase("Mamba3", {}, (layer_peers.torchmamba_mamba3,)),
    LayerCase("S4D", {}),
    LayerCase("S5", {}),
    LayerCase("MinGRU", {}, (layer_peers.mingru_pytorch,)),
    LayerCase("RGLRU", {"num_heads": 3}, (layer_peers.transformers_recurrent_gemma,)),
    LayerCase("Based", {"num_heads": 12}),
    LayerCase("GatedLinearAttention", {"num_heads": 4}, (_bare_gla(GLA, decay="channel"),)),
    LayerCase("HGRN2", {"head_dim": 128}, (_bare_gla(WIDE, decay="channel"),)),
    LayerCase(
        "LightningAttention",
        {"num_heads": 6, "head_dim": 128},
        (layer_peers.transformers_minimax,),
        targets=(1.2, 1.5),
    ),
    LayerCase("MLSTM", {"num_heads": 4}, (layer_peers.xlstm_mlstm,), targets=(1.2, 1.5)),
    LayerCase("RetNet", {"num_heads": 8}, (_bare_gla(RETNET, operator_peers.fla_simple_gla),)),
    LayerCase("RWKV6", {}, (_bare_gla(SMALL, operator_peers.fla_rwkv6, decay="channel", bonus=True),)),
    LayerCase(
        "DeltaNet",
        {"num_heads": 6},
        (Bare(operator_peers.fla_delta_rule, "gated_delta_rule", WIDE | {"decay": "none"}),),
    ),
    LayerCase("DeltaProduct", {"num_heads": 6, "key_dim": 128, "value_dim": 128}),
    LayerCase(
        "GatedDeltaNet",
        {"num_heads": 12, "num_key_heads": 6, "key_dim": 128, "value_dim": 128},
        (layer_peers.transformers_qwen3_next,),
        targets=(2.2, 5),
    ),
    LayerCase(
        "GatedDeltaNet",
        {"num_heads": 6, "key_dim": 128, "value_dim": 256, "negative_eigenvalues": True},
        (layer_peers.transformers_olmo_hybrid,),
        targets=(2.2, 5),
        variant="6 heads of 128 and 256",
    ),
    LayerCase("GatedDeltaNet2", {"num_heads": 6}, (_bare_dplr(6, 128),)),
    LayerCase("KimiDeltaAttention", {"num_heads": 6}, (layer_peers.transformers_kimi_linear,)),
    LayerCase("RWKV7", {}, (_bare_dplr(12, 64),), targets=(8, 8)),
    LayerCase("SLSTM", {"num_heads": 4}, (layer_peers.xlstm_slstm,)),
    LayerCase("NeuralMemory", {"num_heads": 12, "chunk": 64}, (layer_peers.titans_pytorch_memory,), targets=(1.6, 3)),
    LayerCase("TitansMAC", {"num_heads": 12}),
    LayerCase("TitansMAG", {"num_heads": 12}),
    LayerCase("TitansMAL", {"num_heads": 12}),
    LayerCase(
        "TTTLinear",
        {"num_heads": 12},
        (Bare(operator_peers.fla_ttt_linear, "fast_weights", {"heads": 12, "key": 64, "value": 64}),),
        targets=(3, 5),
    ),
    LayerCase("TTTMLP", {"num_heads": 12}),
    LayerCase("Hyena", {"max_length": AS_LONG}),
    LayerCase("LongConv", {"max_length": AS_LONG}),
    LayerCase("SGConv", {"max_length": AS_LONG}),
    LayerCase("ShortConv", {}, (layer_peers.transformers_lfm2,)),
)


def chosen(only: Sequence[str]) -> list[LayerCase]:
    """The cases that ``only`` names parts of, all without it."""
    return [case for case in CASES if not only or any(word.lower() in case.title.lower() for word in only)]


def autocast(dtype: torch.dtype) -> torch.autocast:
    return torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16)


class Side(NamedTuple):
    ahead: Callable[[], object]
    both: Callable[[], object]


def module_side(module: nn.Module, length: int, dtype: torch.dtype) -> Side:
    """A layer without gradients, and with those of its input and of all its parameters."""
    for parameter in module.parameters():  # a projection that starts at zero would make all gradients zero
        if not parameter.any():
            nn.init.normal_(parameter, std=0.02)
    x = torch.randn(1, length, WIDTH, requires_grad=True)
    learned = [x, *module.parameters()]
    upstream = functools.cache(lambda kind: torch.ones(1, length, WIDTH, dtype=kind))

    def run() -> Tensor:
        with autocast(dtype):
            y = module(x)
        return y if isinstance(y, Tensor) else y[0]

    def both() -> object:
        y = run()
        return torch.autograd.grad(y, learned, upstream(y.dtype), allow_unused=True)

    return Side(torch.no_grad()(run), both)


def bare_side(bare: Bare, length: int, dtype: torch.dtype) -> Side:
    inputs = draw(Case("", bare.operator, bare.sizes, ()), length, dtype)

    def run(**inputs: Any) -> Tensor:
        with autocast(dtype):
            return bare.peer(**inputs)

    return Side(forward(run, inputs), forward_and_backward(run, inputs))


def side_maker(peer: Callable[[], nn.Module] | Bare) -> tuple[str, Callable[[int, torch.dtype], Side]]:
    """A peer's name, and what makes its side of a length and dtype."""
    if isinstance(peer, Bare):
        return f"{peer.peer.__name__} alone", functools.partial(bare_side, peer)
    return peer.__name__, lambda length, dtype: module_side(peer(), length, dtype)


def makers(case: LayerCase) -> dict[str, Callable[[int, torch.dtype], Side]]:
    """What makes our side of a length and dtype, and each peer's, by name."""
    return {"seqzoo": lambda length, dtype: module_side(case.build(length), length, dtype)} | dict(
        map(side_maker, case.peers)
    )
