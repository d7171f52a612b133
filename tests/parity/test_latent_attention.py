"""Latent attention against transformers' DeepSeek-V3, going on from its cache too."""

from __future__ import annotations

import pytest
import torch
from peers import PRECISIONS, Agreement, assert_agree, assert_rounds_no_worse, draw, modeling, pair

from seqzoo.layers import LatentAttention

hf = modeling("deepseek_v3")

NAMES = {"down.weight": "kv_a_proj_with_mqa.weight", "norm.weight": "kv_a_layernorm.weight"}
NAMES |= {"out.weight": "o_proj.weight"}
QUERIES = {"query_down.weight": "q_a_proj.weight", "query_norm.weight": "q_a_layernorm.weight"}
QUERIES |= {"query.weight": "q_b_proj.weight"}
HEADS, KEY, ROPE, VALUE = 4, 6, 4, 5


@pytest.fixture(params=[(None, True), (7, True), (7, False)], ids=str)
def latent(request):
    rank, neighbours = request.param
    config = hf.DeepseekV3Config(
        hidden_size=32,
        num_attention_heads=HEADS,
        num_key_value_heads=HEADS,
        num_hidden_layers=1,
        q_lora_rank=rank,
        kv_lora_rank=12,
        qk_nope_head_dim=KEY,
        qk_rope_head_dim=ROPE,
        v_head_dim=VALUE,
        rope_interleave=neighbours,
        rope_parameters={"rope_type": "default", "rope_theta": 10_000.0},
        attn_implementation="eager",
    )

    def run(peer, x, cache):
        seen = 0 if cache is None else cache.get_seq_length()
        positions = torch.arange(seen, seen + x.shape[1])[None]
        mask = hf.create_causal_mask(
            config=config, inputs_embeds=x, attention_mask=None, cache=cache, position_ids=positions
        )
        return peer(x, hf.DeepseekV3RotaryEmbedding(config)(x, positions), mask, cache=cache)[0]

    ours = LatentAttention(
        32,
        num_heads=HEADS,
        latent_dim=12,
        query_rank=rank,
        key_dim=KEY,
        rope_dim=ROPE,
        value_dim=VALUE,
        rope_layout="neighbours" if neighbours else "halves",
    )
    names = NAMES | {"up.weight": "kv_b_proj.weight"} | ({"query.weight": "q_proj.weight"} if rank is None else QUERIES)
    return pair(ours, hf.DeepseekV3Attention(config, layer_idx=0), names, run), config


@pytest.fixture
def both(latent):
    return latent[0]


class TestLatentAttention(Agreement):
    pass


@PRECISIONS
@pytest.mark.parametrize("first", [2, 37])
@torch.no_grad()
def test_goes_on_beside_the_peers_cache(latent, dtype, first):
    both, config = latent[0].to(dtype), latent[1]
    cache, state = hf.DynamicCache(config=config), None
    for time in (first, 1, 1, 63):
        x = draw(time, dtype, seed=time)
        theirs = both.call_peer(x, cache)
        y, state = both.ours(x, state)
        assert_agree({"y": y}, {"y": theirs}, dtype)


def test_rounds_no_worse_in_bfloat16(both):
    assert_rounds_no_worse(both)
