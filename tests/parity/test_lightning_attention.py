"""LightningAttention against transformers' MiniMaxLightningAttention."""

from __future__ import annotations

import pytest
import torch
from einops import rearrange
from peers import CacheAgreement, assert_rounds_no_worse, modeling, pair

from seqzoo import clone_state
from seqzoo.layers import LightningAttention
from seqzoo.layers.lightning_attention import LightningAttentionState

hf = modeling("minimax")

HEADS, HEAD, LAYERS = 4, 6, 5
NAMES = {
    "projection.weight": lambda theirs: rearrange(
        theirs["qkv_proj.weight"], "(h three d) w -> (three h d) w", three=3, h=HEADS
    ),
    "gate.weight": "output_gate.weight",
    "norm.weight": "norm.weight",
    "out.weight": "out_proj.weight",
}


def build(index):
    config = hf.MiniMaxConfig(
        hidden_size=32, num_attention_heads=HEADS, head_dim=HEAD, num_hidden_layers=LAYERS, block_size=16
    )
    torch.set_default_dtype(torch.float64)  # the peer rounds its decays where it is made
    peer = hf.MiniMaxLightningAttention(config, layer_idx=index)
    torch.set_default_dtype(torch.float32)
    ours = LightningAttention(32, num_heads=HEADS, head_dim=HEAD, layer_index=index, num_layers=LAYERS)

    def state_from(cache, state):
        return clone_state(LightningAttentionState(cache.get_linear_cache(index)))

    return pair(
        ours,
        peer,
        NAMES,
        lambda peer, x, cache: peer(x, None, None, cache)[0],
        new_cache=hf.MiniMaxCache,
        state_from=state_from,
    )


@pytest.fixture(params=[0, 2, 4], ids=["first layer", "middle layer", "last layer"])
def both(request):
    return build(request.param)


class TestLightningAttention(CacheAgreement):
    pass


def test_rounds_no_worse_in_bfloat16():
    assert_rounds_no_worse(build(0))
