"""Other people's whole layers at width 768, official sizes: what `bench.py layers` times ours against.

Every function builds one peer, a module called as ``y = module(x)``. tests/parity gives the peers our weights and
compares all outputs and gradients; here only times are compared, and each side draws its own weights. Left out:
transformers' other copies of the same code (Bamba, Falcon-H1, Zamba2, Nemotron-H and Granite of Mamba-2, Jamba and
Falcon-Mamba of Mamba, Qwen3.5 of Qwen3-Next), its xLSTM, which calls the package xlstm, and fla's layers, which need a
GPU: of those the naive operator alone stands in, without any of the layer around it.

torchmamba asks for a newer PyTorch and Python than the constraints have, so that the extra `peers` leaves it out; it
runs all the same: `pip install --no-deps --ignore-requires-python torchmamba`. titans-pytorch brings a dozen packages
of its own, and is left out too: `pip install titans-pytorch`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import operator_peers
import torch
import torch.nn.functional as F
from torch import Tensor, nn

WIDTH = 768
HEADS = 12

modeling = operator_peers.transformers_file


class Called(nn.Module):
    """A peer's module behind ``y = module(x)``."""

    def __init__(self, inner: nn.Module, call: Callable[[Any, Tensor], Any] = lambda inner, x: inner(x)) -> None:
        super().__init__()
        self.inner, self.call = inner, call

    def forward(self, x: Tensor) -> Tensor:
        y = self.call(self.inner, x)
        return y if isinstance(y, Tensor) else y[0]


def drawn(module: nn.Module) -> nn.Module:
    """With small numbers in all parameters: some peers' are drawn only by the whole model."""
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.02)
    return module


class SoftmaxAttention(nn.Module):
    """The shortest causal attention that PyTorch allows: two projections around its own SDPA, no positions."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH, bias=False), nn.Linear(WIDTH, WIDTH, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.out(y.transpose(1, 2).flatten(2))


def softmax_sdpa() -> nn.Module:
    return SoftmaxAttention()


def _attention(family: str, name: str, **settings: Any) -> nn.Module:
    file = modeling(family)
    config = getattr(file, f"{name}Config")(
        hidden_size=WIDTH,
        num_attention_heads=HEADS,
        num_key_value_heads=HEADS,
        num_hidden_layers=1,
        attn_implementation="sdpa",
        **settings,
    )
    rotary = getattr(file, f"{name}RotaryEmbedding")(config)
    mask_of = file.create_sliding_window_causal_mask if settings else file.create_causal_mask

    def call(peer: Any, x: Tensor) -> Tensor:
        positions = torch.arange(x.shape[1])[None]
        mask = mask_of(
            config=config, inputs_embeds=x, attention_mask=None, past_key_values=None, position_ids=positions
        )
        return peer(x, rotary(x, positions), mask)[0]

    return Called(getattr(file, f"{name}Attention")(config, layer_idx=0), call)


def transformers_llama() -> nn.Module:
    return _attention("llama", "Llama")


def transformers_mistral() -> nn.Module:
    return _attention("mistral", "Mistral", sliding_window=512)


def local_attention() -> nn.Module:
    from local_attention.transformer import LocalMHA

    return LocalMHA(
        dim=WIDTH, window_size=512, dim_head=WIDTH // HEADS, heads=HEADS, causal=True, exact_windowsize=True
    )


def titans_pytorch_memory() -> nn.Module:
    """Gradients at the weights from before 64 tokens, whose momentum and forgetting are one number."""
    from titans_pytorch import NeuralMemory

    return Called(NeuralMemory(WIDTH, chunk_size=64, batch_size=64, dim_head=WIDTH // HEADS, heads=HEADS))


def transformers_mamba() -> nn.Module:
    hf = modeling("mamba")
    return Called(hf.MambaMixer(hf.MambaConfig(hidden_size=WIDTH, num_hidden_layers=1), layer_idx=0))


def mambapy_mamba() -> nn.Module:
    from mambapy.mamba import MambaBlock, MambaConfig

    return MambaBlock(MambaConfig(d_model=WIDTH, n_layers=1))


def torchmamba_mamba() -> nn.Module:
    from torchmamba import Mamba1Block

    return Mamba1Block(WIDTH, bias=False)


def transformers_mamba2() -> nn.Module:
    """In chunks of 64, faster on a CPU than the 256 of its configs."""
    hf = modeling("mamba2")
    config = hf.Mamba2Config(
        hidden_size=WIDTH, num_heads=24, head_dim=64, state_size=128, n_groups=1, chunk_size=64, num_hidden_layers=1
    )
    return Called(hf.Mamba2Mixer(config, layer_idx=0))


def torchmamba_mamba2() -> nn.Module:
    from torchmamba import Mamba2Block

    return Mamba2Block(WIDTH, n_heads=24, d_head=64, d_state=128, bias=False)


def torchmamba_mamba3() -> nn.Module:
    from torchmamba import Mamba3SisoBlock

    return Mamba3SisoBlock(WIDTH, n_heads=24, d_head=64, d_state=128, bias=False)


DELTA = {
    "hidden_size": WIDTH,
    "linear_num_key_heads": 6,
    "linear_num_value_heads": 12,
    "linear_key_head_dim": 128,
    "linear_value_head_dim": 128,
    "num_hidden_layers": 2,
    "layer_types": ["linear_attention", "full_attention"],
}


def transformers_qwen3_next() -> nn.Module:
    hf = modeling("qwen3_next")
    return Called(hf.Qwen3NextGatedDeltaNet(hf.Qwen3NextConfig(**DELTA), layer_idx=0))


def transformers_olmo_hybrid() -> nn.Module:
    """It shares no keys among heads, so that it is as wide with six heads as ours, its values of twice the size."""
    hf = modeling("olmo_hybrid")
    sizes = DELTA | {"linear_num_value_heads": 6, "linear_value_head_dim": 256, "num_attention_heads": HEADS}
    return Called(hf.OlmoHybridGatedDeltaNet(hf.OlmoHybridConfig(**sizes), layer_idx=0))


def transformers_kimi_linear() -> nn.Module:
    hf = modeling("kimi_linear")
    config = hf.KimiLinearConfig(
        hidden_size=WIDTH,
        num_hidden_layers=2,
        linear_num_heads=6,
        linear_head_dim=128,
        layer_types=["linear_attention", "full_attention"],
    )
    return Called(drawn(hf.KimiLinearDeltaAttention(config, layer_idx=0)))


def transformers_recurrent_gemma() -> nn.Module:
    hf = modeling("recurrent_gemma")
    config = hf.RecurrentGemmaConfig(hidden_size=WIDTH, lru_width=WIDTH, num_attention_heads=3, num_hidden_layers=1)

    def call(peer: Any, x: Tensor) -> Tensor:
        return peer(x, torch.arange(x.shape[1])[None], None, use_cache=False)[0]

    return Called(drawn(hf.RecurrentGemmaRecurrentBlock(config, layer_idx=0)), call)


def transformers_minimax() -> nn.Module:
    hf = modeling("minimax")
    config = hf.MiniMaxConfig(hidden_size=WIDTH, num_attention_heads=6, head_dim=128, num_hidden_layers=2)
    return Called(hf.MiniMaxLightningAttention(config, layer_idx=0), lambda peer, x: peer(x, None, None, None)[0])


def transformers_lfm2() -> nn.Module:
    hf = modeling("lfm2")
    config = hf.Lfm2Config(hidden_size=WIDTH, conv_L_cache=3, num_hidden_layers=1, layer_types=["conv"])
    return Called(hf.Lfm2ShortConv(config, layer_idx=0))


def mingru_pytorch() -> nn.Module:
    from minGRU_pytorch import minGRU

    return minGRU(WIDTH, expansion_factor=2.0)


def xlstm_mlstm() -> nn.Module:
    from xlstm.xlstm_large.model import mLSTMLayer, mLSTMLayerConfig

    return Called(mLSTMLayer(mLSTMLayerConfig(embedding_dim=WIDTH, num_heads=4)))


def xlstm_slstm() -> nn.Module:
    from xlstm.blocks.slstm.layer import sLSTMLayer, sLSTMLayerConfig

    config = sLSTMLayerConfig(embedding_dim=WIDTH, num_heads=4, backend="vanilla", batch_size=1, dtype="float32")
    layer = sLSTMLayer(config)
    layer.reset_parameters()
    return Called(layer)
