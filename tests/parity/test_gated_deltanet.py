"""GatedDeltaNet against transformers' Qwen3NextGatedDeltaNet, with as many value heads as key heads."""

from __future__ import annotations

import pytest
import torch
from einops import rearrange
from peers import PRECISIONS, TIMES, assert_agree, assert_rounds_no_worse, draw, modeling, pair, run_ours, run_peer

from seqzoo import clone_state
from seqzoo.layers import GatedDeltaNet
from seqzoo.layers.gated_deltanet import GatedDeltaNetState

hf = modeling("qwen3_next")

HEADS, KEY, VALUE = 2, 8, 12


def unpack(theirs, weight, *parts):
    """The peer lays its projections out head by head: a head's rows of every part together. Ours go part by part."""
    sizes = {"q": KEY, "k": KEY, "v": VALUE, "z": VALUE} if weight == "in_proj_qkvz.weight" else {"b": 1, "a": 1}
    by_head = theirs[weight].unflatten(0, (HEADS, -1)).split(list(sizes.values()), 1)
    found = dict(zip(sizes, by_head, strict=True))
    return torch.cat([rearrange(found[part], "h d w -> (h d) w") for part in parts])


NAMES = {
    "qkv.weight": lambda theirs: unpack(theirs, "in_proj_qkvz.weight", "q", "k", "v"),
    "gate.weight": lambda theirs: unpack(theirs, "in_proj_qkvz.weight", "z"),
    "write.weight": lambda theirs: unpack(theirs, "in_proj_ba.weight", "b"),
    "step.weight": lambda theirs: unpack(theirs, "in_proj_ba.weight", "a"),
    "conv.weight": lambda theirs: theirs["conv1d.weight"].squeeze(1),
    "decay.A_log": "A_log",
    "decay.dt_bias": "dt_bias",
    "norm.weight": "norm.weight",
    "out.weight": "out_proj.weight",
}


@pytest.fixture
def delta():
    config = hf.Qwen3NextConfig(
        hidden_size=32,
        linear_num_key_heads=HEADS,
        linear_num_value_heads=HEADS,
        linear_key_head_dim=KEY,
        linear_value_head_dim=VALUE,
        layer_types=["linear_attention"],
        num_hidden_layers=1,
        rms_norm_eps=1e-2,  # Less, and the norm undoes how strongly a first token is written: its gradient is rounding.
    )
    peer = hf.Qwen3NextGatedDeltaNet(config, layer_idx=0)
    torch.nn.init.uniform_(
        peer.A_log, -3, 0
    )  # The peer starts at decays of e^-10 a token, which leave no memory to test.
    ours = GatedDeltaNet(32, num_heads=HEADS, key_dim=KEY, value_dim=VALUE, norm_eps=config.rms_norm_eps)
    return pair(ours, peer, NAMES, lambda peer, x, cache: peer(x, cache_params=cache)), config


def state_from(cache):
    """Ours keeps one input less: the peer's oldest has no use."""
    layer = cache.layers[0]
    return clone_state(GatedDeltaNetState(layer.recurrent_states[0], layer.conv_states[0][..., 1:].mT))


@PRECISIONS
@TIMES
def test_values_and_gradients(delta, dtype, time):
    both, x = delta[0].to(dtype), draw(time, dtype)
    assert_agree(run_ours(both, x), run_peer(both, x), dtype)


@PRECISIONS
@pytest.mark.parametrize("cut", [1, 37, 99])
def test_gradients_through_the_state(delta, dtype, cut):
    both, x = delta[0].to(dtype), draw(100, dtype)
    assert_agree(run_ours(both, x, cut), run_peer(both, x), dtype)


@PRECISIONS
@pytest.mark.parametrize("first", [2, 37])
@torch.no_grad()
def test_goes_on_from_the_peers_cache(delta, dtype, first):
    both, config = delta[0].to(dtype), delta[1]
    cache, state = hf.DynamicCache(config=config), None
    for time in (first, 1, 1, 63):
        x = draw(time, dtype, seed=time)
        theirs = both.call_peer(x, cache)
        y, state = both.ours(x, state)
        expected = state_from(cache)
        assert_agree({"y": y, **state._asdict()}, {"y": theirs, **expected._asdict()}, dtype)
        state = expected


def test_rounds_no_worse_in_bfloat16(delta):
    assert_rounds_no_worse(delta[0])
