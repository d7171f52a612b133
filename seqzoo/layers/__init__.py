"""The catalogue: every mixer, by family. A new layer is its own file and one line here."""

from __future__ import annotations

from typing import TYPE_CHECKING

from seqzoo.layers.attention import Attention
from seqzoo.layers.based import Based
from seqzoo.layers.delta_product import DeltaProduct
from seqzoo.layers.deltanet import DeltaNet
from seqzoo.layers.differential_attention import DifferentialAttention
from seqzoo.layers.forgetting_attention import ForgettingAttention
from seqzoo.layers.gated_deltanet import GatedDeltaNet
from seqzoo.layers.gated_deltanet2 import GatedDeltaNet2
from seqzoo.layers.gated_linear_attention import GatedLinearAttention
from seqzoo.layers.hgrn2 import HGRN2
from seqzoo.layers.hyena import Hyena
from seqzoo.layers.kimi_delta_attention import KimiDeltaAttention
from seqzoo.layers.landmark_attention import LandmarkAttention
from seqzoo.layers.latent_attention import LatentAttention
from seqzoo.layers.lightning_attention import LightningAttention
from seqzoo.layers.long_conv import LongConv
from seqzoo.layers.lru import LRU
from seqzoo.layers.mamba import Mamba
from seqzoo.layers.mamba2 import Mamba2
from seqzoo.layers.mamba3 import Mamba3
from seqzoo.layers.min_gru import MinGRU
from seqzoo.layers.mlstm import MLSTM
from seqzoo.layers.neural_memory import NeuralMemory
from seqzoo.layers.retnet import RetNet
from seqzoo.layers.rg_lru import RGLRU
from seqzoo.layers.rwkv6 import RWKV6
from seqzoo.layers.rwkv6_channel_mix import RWKV6ChannelMix
from seqzoo.layers.rwkv7 import RWKV7
from seqzoo.layers.rwkv7_channel_mix import RWKV7ChannelMix
from seqzoo.layers.s4d import S4D
from seqzoo.layers.s5 import S5
from seqzoo.layers.sgconv import SGConv
from seqzoo.layers.short_conv import ShortConv
from seqzoo.layers.slstm import SLSTM
from seqzoo.layers.swiglu import SwiGLU
from seqzoo.layers.titans_mac import TitansMAC
from seqzoo.layers.titans_mag import TitansMAG
from seqzoo.layers.titans_mal import TitansMAL
from seqzoo.layers.ttt_linear import TTTLinear
from seqzoo.layers.ttt_mlp import TTTMLP

FAMILIES = {
    "attention": (Attention, DifferentialAttention, ForgettingAttention, LandmarkAttention, LatentAttention),
    "state space": (LRU, Mamba, Mamba2, Mamba3, S4D, S5),
    "linear recurrence": (MinGRU, RGLRU),
    "linear attention": (Based, GatedLinearAttention, HGRN2, LightningAttention, MLSTM, RetNet, RWKV6),
    "delta rule": (DeltaNet, DeltaProduct, GatedDeltaNet, GatedDeltaNet2, KimiDeltaAttention, RWKV7),
    "nonlinear recurrence": (SLSTM,),
    "test-time training": (NeuralMemory, TTTLinear, TTTMLP, TitansMAC, TitansMAG, TitansMAL),
    "convolution": (Hyena, LongConv, SGConv, ShortConv),
    "feed-forward": (RWKV6ChannelMix, RWKV7ChannelMix, SwiGLU),
}

LAYERS = tuple(layer for family in FAMILIES.values() for layer in family)

__all__ = [
    "FAMILIES",
    "HGRN2",
    "LAYERS",
    "LRU",
    "MLSTM",
    "RGLRU",
    "RWKV6",
    "RWKV7",
    "S4D",
    "S5",
    "SLSTM",
    "TTTMLP",
    "Attention",
    "Based",
    "DeltaNet",
    "DeltaProduct",
    "DifferentialAttention",
    "ForgettingAttention",
    "GatedDeltaNet",
    "GatedDeltaNet2",
    "GatedLinearAttention",
    "Hyena",
    "KimiDeltaAttention",
    "LandmarkAttention",
    "LatentAttention",
    "LightningAttention",
    "LongConv",
    "Mamba",
    "Mamba2",
    "Mamba3",
    "MinGRU",
    "NeuralMemory",
    "RWKV6ChannelMix",
    "RWKV7ChannelMix",
    "RetNet",
    "SGConv",
    "ShortConv",
    "SwiGLU",
    "TTTLinear",
    "TitansMAC",
    "TitansMAG",
    "TitansMAL",
]

if not TYPE_CHECKING:

    def __getattr__(name: str):
        from difflib import get_close_matches

        names = [layer.__name__ for layer in LAYERS]
        near = get_close_matches(name, names, n=1, cutoff=0.5)
        hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(names)}"
        raise AttributeError(f"seqzoo.layers has no layer {name!r}; {hint}")
