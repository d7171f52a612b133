"""Attention against that of the models in transformers whose settings it has."""

from __future__ import annotations

import pytest
import torch
from peers import PRECISIONS, Agreement, assert_agree, assert_rounds_no_worse, draw, modeling, pair
from torch import nn

from seqzoo.layers import Attention
from seqzoo.parts.rotary import Rotary

cache_of = modeling("llama").DynamicCache
scaled = pytest.importorskip("transformers.modeling_rope_utils").ROPE_INIT_FUNCTIONS

NAMES = {
    "query.weight": "q_proj.weight",
    "key_value.weight": lambda theirs: torch.cat([theirs["k_proj.weight"], theirs["v_proj.weight"]]),
    "out.weight": "o_proj.weight",
}
NORMS = {"query_norm.weight": "q_norm.weight", "key_norm.weight": "k_norm.weight"}
SLIDING = {"layer_types": ["sliding_attention"]}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
LLAMA3 = YARN | {"rope_type": "llama3", "low_freq_factor": 1.0, "high_freq_factor": 4.0}
# What a model calls itself, its settings, and ours.
CASES = {
    "a key head for each query head": ("Llama", {}, {}),
    "two groups of queries": ("Llama", {}, {"num_kv_heads": 2, "rope_base": 500_000.0}),
    "one group of queries": ("Llama", {}, {"num_kv_heads": 1, "rope_base": 100.0}),
    "linear": ("Llama", {"rope_type": "linear", "factor": 3.0}, {"rope_scaling": "linear", "rope_factor": 3.0}),
    "yarn": ("Llama", YARN, {"rope_scaling": "yarn", "rope_factor": 4.0, "rope_original_length": 64}),
    "llama3": ("Llama", LLAMA3, {"rope_scaling": "llama3", "rope_factor": 4.0, "rope_original_length": 64}),
    "norms": ("Qwen3", {}, {"num_kv_heads": 2, "qk_norm": True}),
    "a cap": ("Gemma2", {"attn_logit_softcapping": 0.5, "query_pre_attn_scalar": 8}, {"soft_cap": 0.5}),
    "a window of 2": ("Mistral", {"sliding_window": 2}, {"num_kv_heads": 2, "window": 2}),
    "a window of 8": ("Mistral", {"sliding_window": 8}, {"num_kv_heads": 2, "window": 8}),
    "a window of 64": ("Mistral", {"sliding_window": 64}, {"window": 64}),
    "a learned sink": ("GptOss", SLIDING | {"sliding_window": 9}, {"window": 9, "learned_sink": True}),
    "a window, neighbours turn": (
        "Cohere2",
        SLIDING | {"sliding_window": 9},
        {"window": 9, "rope_layout": "neighbours", "num_kv_heads": 2},
    ),
    "no positions, but a temperature": (
        "Llama4Text",
        {"no_rope_layers": [0], "floor_scale": 10, "attn_scale": 0.3},
        {"positions": "none", "temperature": 0.3, "temperature_step": 10},
    ),
}
FILES = {"GptOss": "gpt_oss", "Llama4Text": "llama4"}


def build(family, theirs, ours):
    """The pair, and the peer's config. The peer gets angles and its mask from its own model's code."""
    hf = modeling(FILES.get(family, family.lower()))
    rope = {name: value for name, value in theirs.items() if name in LLAMA3}
    config = getattr(hf, f"{family}Config")(
        hidden_size=32,
        num_attention_heads=4,
        num_key_value_heads=ours.get("num_kv_heads", 4),
        head_dim=8,
        num_hidden_layers=1,
        attention_bias=False,
        rope_parameters={"rope_type": "default", "rope_theta": ours.get("rope_base", 10_000.0)} | rope,
        max_position_embeddings=256,
        attn_implementation="eager",
        **{name: value for name, value in theirs.items() if name not in LLAMA3},
    )
    mask_of = hf.create_sliding_window_causal_mask if "window" in ours else hf.create_causal_mask
    angles_of = getattr(hf, f"{family}RotaryEmbedding")

    def run(peer, x, cache):
        seen = 0 if cache is None else cache.get_seq_length()
        positions = torch.arange(seen, seen + x.shape[1])[None]
        mask = mask_of(config=config, inputs_embeds=x, attention_mask=None, cache=cache, position_ids=positions)
        return peer(x, position_embeddings=angles_of(config)(x, positions), attention_mask=mask, cache=cache)[0]

    names = NAMES | (NORMS if "qk_norm" in ours else {}) | ({"sink": "sinks"} if "learned_sink" in ours else {})
    peer = getattr(hf, f"{family}Attention")(config, layer_idx=0)
    if "learned_sink" in ours:
        nn.init.normal_(peer.sinks)
    return pair(Attention(32, num_heads=4, **ours), peer, names, run), config


@pytest.fixture(params=CASES.values(), ids=CASES)
def attention(request):
    return build(*request.param)


@pytest.fixture
def both(attention):
    return attention[0]


class TestAttention(Agreement):
    pass


@PRECISIONS
@pytest.mark.parametrize("first", [2, 37])
@torch.no_grad()
def test_goes_on_beside_the_peers_cache(attention, dtype, first):
    both, config = attention[0].to(dtype), attention[1]
    cache, state = cache_of(config=config), None
    for time in (first, 1, 1, 63):
        x = draw(time, dtype, seed=time)
        theirs = both.call_peer(x, cache)
        y, state = both.ours(x, state)
        assert_agree({"y": y}, {"y": theirs}, dtype)


def test_rounds_no_worse_in_bfloat16(both):
    assert_rounds_no_worse(both)


@pytest.mark.parametrize("factor", [1.5, 8.0])
@pytest.mark.parametrize("size", [4, 32, 128])
def test_slower_rotations_by_a_larger_base(factor, size):
    """transformers' dynamic form, at a length that is ``factor`` times its limit, is the static one."""
    rope = {"rope_type": "dynamic", "rope_theta": 10_000.0, "factor": 1.0}
    config = modeling("llama").LlamaConfig(head_dim=size, rope_parameters=rope, max_position_embeddings=64)
    theirs, _ = scaled["dynamic"](config, None, seq_len=int(64 * factor))
    ours = Rotary(size, scaling="ntk", factor=factor).frequencies(torch.device("cpu"), torch.float32)
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=0)
