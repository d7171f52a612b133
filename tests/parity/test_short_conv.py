"""ShortConv against transformers' Lfm2ShortConv."""

from __future__ import annotations

import pytest
from peers import CacheAgreement, assert_rounds_no_worse, modeling, pair

from seqzoo import clone_state
from seqzoo.layers import ShortConv
from seqzoo.layers.short_conv import ShortConvState

hf = modeling("lfm2")

NAMES = {
    "projection.weight": "in_proj.weight",
    "conv.weight": lambda theirs: theirs["conv.weight"].squeeze(1),
    "out.weight": "out_proj.weight",
}


def state_from(cache, state):
    """Ours keeps one input less: the peer's oldest has no use."""
    return clone_state(ShortConvState(cache.layers[0].conv_states[0][..., 1:].mT))


@pytest.fixture(params=[3, 5], ids=lambda size: f"{size} taps")
def both(request):
    config = hf.Lfm2Config(hidden_size=32, conv_L_cache=request.param, num_hidden_layers=1, layer_types=["conv"])
    peer = hf.Lfm2ShortConv(config, layer_idx=0)
    ours = ShortConv(32, conv_size=request.param)
    run, new_cache = lambda peer, x, cache: peer(x, past_key_values=cache), lambda: hf.DynamicCache(config=config)
    return pair(ours, peer, NAMES, run, new_cache=new_cache, state_from=state_from)


class TestShortConv(CacheAgreement):
    pass


def test_rounds_no_worse_in_bfloat16(both):
    assert_rounds_no_worse(both)
