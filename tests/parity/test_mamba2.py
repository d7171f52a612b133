"""Mamba2 against transformers' Mamba2Mixer."""

from __future__ import annotations

import pytest
import torch
from peers import PRECISIONS, TIMES, assert_agree, assert_rounds_no_worse, draw, modeling, pair, run_ours, run_peer

from seqzoo import clone_state
from seqzoo.layers import Mamba2
from seqzoo.layers.mamba2 import Mamba2State

hf = modeling("mamba2")

NAMES = {
    "projection.weight": "in_proj.weight",
    "conv.weight": lambda theirs: theirs["conv1d.weight"].squeeze(1),
    "conv.bias": "conv1d.bias",
    "decay.A_log": "A_log",
    "decay.dt_bias": "dt_bias",
    "skip": "D",
    "norm.weight": "norm.weight",
    "out.weight": "out_proj.weight",
}


@pytest.fixture(params=[1, 2, 4], ids=lambda groups: f"{groups} groups")
def mamba2(request):
    """Eight heads in groups; each group has its own B and C, and is normalised apart."""
    groups = request.param
    config = hf.Mamba2Config(
        hidden_size=32, num_heads=8, head_dim=8, state_size=8, n_groups=groups, chunk_size=16, num_hidden_layers=1
    )
    peer = hf.Mamba2Mixer(config, layer_idx=0)
    torch.nn.init.uniform_(peer.dt_bias, -2, 1)  # Longer steps than at the start of training: so the memory weighs in.
    ours = Mamba2(32, state_size=8, head_dim=8, num_groups=groups, norm_eps=config.layer_norm_epsilon)
    return pair(ours, peer, NAMES, lambda peer, x, cache: peer(x, cache_params=cache)), config


def state_from(cache):
    """Ours has the state's rows before the head's channels, and keeps one input less: the peer's oldest has no use."""
    layer = cache.layers[0]
    return clone_state(Mamba2State(layer.recurrent_states[0].mT, layer.conv_states[0][..., 1:].mT))


@PRECISIONS
@TIMES
def test_values_and_gradients(mamba2, dtype, time):
    both, x = mamba2[0].to(dtype), draw(time, dtype)
    assert_agree(run_ours(both, x), run_peer(both, x), dtype)


@PRECISIONS
@pytest.mark.parametrize("cut", [1, 37, 99])
def test_gradients_through_the_state(mamba2, dtype, cut):
    both, x = mamba2[0].to(dtype), draw(100, dtype)
    assert_agree(run_ours(both, x, cut), run_peer(both, x), dtype)


@PRECISIONS
@pytest.mark.parametrize("first", [2, 37])
@torch.no_grad()
def test_goes_on_from_the_peers_cache(mamba2, dtype, first):
    both, config = mamba2[0].to(dtype), mamba2[1]
    cache, state = hf.DynamicCache(config=config), None
    for time in (first, 1, 1, 63):
        x = draw(time, dtype, seed=time)
        theirs = both.call_peer(x, cache)
        y, state = both.ours(x, state)
        expected = state_from(cache)
        assert_agree({"y": y, **state._asdict()}, {"y": theirs, **expected._asdict()}, dtype)
        state = expected


def test_rounds_no_worse_in_bfloat16(mamba2):
    assert_rounds_no_worse(mamba2[0])
