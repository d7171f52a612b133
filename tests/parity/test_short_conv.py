"""ShortConv against transformers' Lfm2ShortConv."""

from __future__ import annotations

import pytest
import torch
from peers import PRECISIONS, TIMES, assert_agree, assert_rounds_no_worse, draw, modeling, pair, run_ours, run_peer

from seqzoo import clone_state
from seqzoo.layers import ShortConv
from seqzoo.layers.short_conv import ShortConvState

hf = modeling("lfm2")

NAMES = {
    "projection.weight": "in_proj.weight",
    "conv.weight": lambda theirs: theirs["conv.weight"].squeeze(1),
    "out.weight": "out_proj.weight",
}


@pytest.fixture(params=[3, 5], ids=lambda size: f"{size} taps")
def conv(request):
    config = hf.Lfm2Config(hidden_size=32, conv_L_cache=request.param, num_hidden_layers=1, layer_types=["conv"])
    peer = hf.Lfm2ShortConv(config, layer_idx=0)
    ours = ShortConv(32, conv_size=request.param)
    return pair(ours, peer, NAMES, lambda peer, x, cache: peer(x, past_key_values=cache)), config


def state_from(cache):
    """Ours keeps one input less: the peer's oldest has no use."""
    return clone_state(ShortConvState(cache.layers[0].conv_states[0][..., 1:].mT))


@PRECISIONS
@TIMES
def test_values_and_gradients(conv, dtype, time):
    both, x = conv[0].to(dtype), draw(time, dtype)
    assert_agree(run_ours(both, x), run_peer(both, x), dtype)


@PRECISIONS
@pytest.mark.parametrize("cut", [1, 37, 99])
def test_gradients_through_the_state(conv, dtype, cut):
    both, x = conv[0].to(dtype), draw(100, dtype)
    assert_agree(run_ours(both, x, cut), run_peer(both, x), dtype)


@PRECISIONS
@pytest.mark.parametrize("first", [2, 37])
@torch.no_grad()
def test_goes_on_from_the_peers_cache(conv, dtype, first):
    both, config = conv[0].to(dtype), conv[1]
    cache, state = hf.DynamicCache(config=config), None
    for time in (first, 1, 1, 63):
        x = draw(time, dtype, seed=time)
        theirs = both.call_peer(x, cache)
        y, state = both.ours(x, state)
        expected = state_from(cache)
        assert_agree({"y": y, **state._asdict()}, {"y": theirs, **expected._asdict()}, dtype)
        state = expected


def test_rounds_no_worse_in_bfloat16(conv):
    assert_rounds_no_worse(conv[0])
