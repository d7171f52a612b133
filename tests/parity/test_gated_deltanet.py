"""GatedDeltaNet against transformers' Qwen3NextGatedDeltaNet, and OlmoHybridGatedDeltaNet for negative eigenvalues."""

from __future__ import annotations

import pytest
import torch
from einops import rearrange
from peers import CacheAgreement, assert_rounds_no_worse, modeling, pair

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


def state_from(cache, state):
    """Ours keeps one input less: the peer's oldest has no use."""
    layer = cache.layers[0]
    return clone_state(DeltaRuleState(layer.recurrent_states[0], layer.conv_states[0][..., 1:].mT))


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
    run, new_cache = lambda peer, x, cache: peer(x, cache), lambda: qwen.DynamicCache(config=config)
    return pair(ours, peer, names, run, new_cache=new_cache, state_from=state_from)


@pytest.fixture(
    params=[1, 3, None], ids=["as many heads", "keys shared by three memories", "negative eigenvalues (OLMo-Hybrid)"]
)
def both(request):
    return build(request.param)


class TestGatedDeltaNet(CacheAgreement):
    pass


def test_rounds_no_worse_in_bfloat16(both):
    assert_rounds_no_worse(both)
