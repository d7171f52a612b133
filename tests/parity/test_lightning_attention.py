"""LightningAttention against transformers' MiniMaxLightningAttention."""

from __future__ import annotations

import pytest
import torch
from einops import rearrange
from peers import CacheAgreement, assert_rounds_no_worse, draw, error, modeling, pair

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


@torch.no_grad()
def test_the_peers_memory_drifts_in_bfloat16():
    """It is kept in the activations' dtype, ours in float32: the last layer, which hardly forgets, shows it."""
    both, x = build(LAYERS - 1).to(torch.bfloat16), draw(200, torch.bfloat16)
    cache, state = hf.MiniMaxCache(), None
    for token in x.split(1, 1):
        both.call_peer(token, cache)
        _, state = both.ours(token, state)
    theirs, truth = cache.get_linear_cache(LAYERS - 1), both.to(torch.float64).ours(x.double())[1].memory
    assert theirs.dtype == torch.bfloat16 and state.memory.dtype == torch.float32
    assert error(theirs, truth) > 3 * error(state.memory, truth)


def test_rounds_no_worse_in_bfloat16():
    assert_rounds_no_worse(build(0))
