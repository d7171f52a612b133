"""LightningAttention against transformers' MiniMaxLightningAttention."""

from __future__ import annotations

import pytest
import torch
from einops import rearrange
from peers import PRECISIONS, TIMES, assert_agree, assert_rounds_no_worse, draw, modeling, pair, run_ours, run_peer

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
    return pair(ours, peer, NAMES, lambda peer, x, cache: peer(x, None, None, cache)[0])


@pytest.fixture(params=[0, 2, 4], ids=["first layer", "middle layer", "last layer"])
def both(request):
    return build(request.param)


@PRECISIONS
@TIMES
def test_values_and_gradients(both, dtype, time):
    both, x = both.to(dtype), draw(time, dtype)
    assert_agree(run_ours(both, x), run_peer(both, x), dtype)


@PRECISIONS
@pytest.mark.parametrize("cut", [1, 37, 99])
def test_gradients_through_the_state(both, dtype, cut):
    both, x = both.to(dtype), draw(100, dtype)
    assert_agree(run_ours(both, x, cut), run_peer(both, x), dtype)


@PRECISIONS
@pytest.mark.parametrize("first", [1, 37])
@torch.no_grad()
def test_goes_on_from_the_peers_cache(both, dtype, first):
    both, cache, state = both.to(dtype), hf.MiniMaxCache(), None
    for time in (first, 1, 1, 63):
        x = draw(time, dtype, seed=time)
        theirs = both.call_peer(x, cache)
        y, state = both.ours(x, state)
        expected = clone_state(LightningAttentionState(cache.get_linear_cache(both.peer.layer_idx)))
        assert_agree({"y": y, **state._asdict()}, {"y": theirs, **expected._asdict()}, dtype)
        state = expected


def test_rounds_no_worse_in_bfloat16():
    assert_rounds_no_worse(build(0))
