"""GatedDeltaNet against transformers' Qwen3NextGatedDeltaNet, and OlmoHybridGatedDeltaNet for negative eigenvalues."""

from __future__ import annotations

import pytest
import torch
from einops import rearrange
from peers import PRECISIONS, TIMES, assert_agree, assert_rounds_no_worse, draw, modeling, pair, run_ours, run_peer

from seqzoo import clone_state
from seqzoo.layers import GatedDeltaNet
from seqzoo.parts.delta_rule import DeltaRuleState

qwen, olmo = modeling("qwen3_next"), modeling("olmo_hybrid")

KEY_HEADS, KEY, VALUE = 2, 8, 12


def unpack(theirs, weight, sizes, *parts):
    """The peer lays its projections out by key head: its rows of every part together. Ours go part by part."""
    by_head = theirs[weight].unflatten(0, (KEY_HEADS, -1)).split(list(sizes.values()), 1)
    found = dict(zip(sizes, by_head, strict=True))
    return torch.cat([rearrange(found[part], "h d w -> (h d) w") for part in parts])


def qwen_names(shared_by):
    """``shared_by`` memories read with one query."""
    wide = {"q": KEY, "k": KEY, "v": shared_by * VALUE, "z": shared_by * VALUE}
    thin = {"b": shared_by, "a": shared_by}
    return COMMON | {
        "qkv.projection.weight": lambda theirs: unpack(theirs, "in_proj_qkvz.weight", wide, "q", "k", "v"),
        "gate.weight": lambda theirs: unpack(theirs, "in_proj_qkvz.weight", wide, "z"),
        "write.weight": lambda theirs: unpack(theirs, "in_proj_ba.weight", thin, "b"),
        "step.weight": lambda theirs: unpack(theirs, "in_proj_ba.weight", thin, "a"),
        "norm.weight": "norm.weight",
        "out.weight": "out_proj.weight",
    }


COMMON = {
    "qkv.conv.weight": lambda theirs: theirs["conv1d.weight"].squeeze(1),
    "decay.A_log": "A_log",
    "decay.dt_bias": "dt_bias",
}
OLMO_NAMES = COMMON | {
    "qkv.projection.weight": lambda theirs: torch.cat([theirs[f"{name}_proj.weight"] for name in "qkv"]),
    "gate.weight": "g_proj.weight",
    "write.weight": "b_proj.weight",
    "step.weight": "a_proj.weight",
    "norm.weight": "o_norm.weight",
    "out.weight": "o_proj.weight",
}


def sizes(heads):
    return {
        "hidden_size": 32,
        "linear_num_key_heads": KEY_HEADS,
        "linear_num_value_heads": heads,
        "linear_key_head_dim": KEY,
        "linear_value_head_dim": VALUE,
        "layer_types": ["linear_attention", "full_attention"],  # OLMo's config wants one of each
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
    }


def build(shared_by):
    heads = KEY_HEADS * (shared_by or 1)
    settings = {"num_heads": heads, "num_key_heads": KEY_HEADS, "key_dim": KEY, "value_dim": VALUE}
    # With less, the norm undoes how strongly a first token is written: its gradient is rounding.
    eps = 1e-2
    if shared_by:
        config = qwen.Qwen3NextConfig(**sizes(heads), rms_norm_eps=eps)
        peer, names = qwen.Qwen3NextGatedDeltaNet(config, layer_idx=0), qwen_names(shared_by)
    else:
        settings["negative_eigenvalues"] = True
        config = olmo.OlmoHybridConfig(**sizes(heads), linear_allow_neg_eigval=True)
        peer, names = olmo.OlmoHybridGatedDeltaNet(config, layer_idx=0), OLMO_NAMES
        peer.o_norm.variance_epsilon = eps
    # The peers start at decays of e^-10 a token, which leave no memory to test.
    torch.nn.init.uniform_(peer.A_log, -3, 0)
    ours = GatedDeltaNet(32, norm_eps=eps, **settings)
    return pair(ours, peer, names, lambda peer, x, cache: peer(x, cache)), config


@pytest.fixture(
    params=[1, 3, None], ids=["as many heads", "keys shared by three memories", "negative eigenvalues (OLMo-Hybrid)"]
)
def delta(request):
    return build(request.param)


def state_from(cache):
    """Ours keeps one input less: the peer's oldest has no use."""
    layer = cache.layers[0]
    return clone_state(DeltaRuleState(layer.recurrent_states[0], layer.conv_states[0][..., 1:].mT))


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
    cache, state = qwen.DynamicCache(config=config), None
    for time in (first, 1, 1, 63):
        x = draw(time, dtype, seed=time)
        theirs = both.call_peer(x, cache)
        y, state = both.ours(x, state)
        expected = state_from(cache)
        assert_agree({"y": y, **state._asdict()}, {"y": theirs, **expected._asdict()}, dtype)
        state = expected


def test_rounds_no_worse_in_bfloat16(delta):
    assert_rounds_no_worse(delta[0])
