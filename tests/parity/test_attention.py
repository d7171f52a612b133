"""Attention against transformers' LlamaAttention, and with a window against its MistralAttention."""

from __future__ import annotations

import pytest
import torch
from peers import PRECISIONS, TIMES, assert_agree, assert_rounds_no_worse, draw, modeling, pair, run_ours, run_peer

from seqzoo.layers import Attention

llama, mistral = modeling("llama"), modeling("mistral")

NAMES = {
    "query.weight": "q_proj.weight",
    "key_value.weight": lambda theirs: torch.cat([theirs["k_proj.weight"], theirs["v_proj.weight"]]),
    "out.weight": "o_proj.weight",
}
SETTINGS = {
    "a key head for each query head": {"num_kv_heads": 4},
    "two groups of queries": {"num_kv_heads": 2, "rope_base": 500_000.0},
    "one group of queries": {"num_kv_heads": 1, "rope_base": 100.0},
    "a window of 2": {"num_kv_heads": 2, "window": 2},
    "a window of 8": {"num_kv_heads": 2, "window": 8},
    "a window of 64": {"num_kv_heads": 4, "window": 64},
}


@pytest.fixture(params=SETTINGS.values(), ids=SETTINGS)
def attention(request):
    """The peer gets its angles and its mask from its own model's code, so the meaning of a window is the peer's."""
    window, base = request.param.get("window"), request.param.get("rope_base", 10_000.0)
    hf, settings = (llama, {}) if window is None else (mistral, {"sliding_window": window})
    family = "Llama" if window is None else "Mistral"
    config = getattr(hf, f"{family}Config")(
        hidden_size=32,
        num_attention_heads=4,
        num_key_value_heads=request.param["num_kv_heads"],
        num_hidden_layers=1,
        rope_parameters={"rope_type": "default", "rope_theta": base},
        attn_implementation="eager",
        **settings,
    )
    mask_of = hf.create_causal_mask if window is None else hf.create_sliding_window_causal_mask

    def run(peer, x, cache):
        seen = 0 if cache is None else cache.get_seq_length()
        positions = torch.arange(seen, seen + x.shape[1])[None]
        mask = mask_of(
            config=config, inputs_embeds=x, attention_mask=None, past_key_values=cache, position_ids=positions
        )
        angles = getattr(hf, f"{family}RotaryEmbedding")(config)(x, positions)
        return peer(x, angles, mask, past_key_values=cache)[0]

    ours = Attention(32, num_heads=4, **request.param)
    return pair(ours, getattr(hf, f"{family}Attention")(config, layer_idx=0), NAMES, run), config


@PRECISIONS
@TIMES
def test_values_and_gradients(attention, dtype, time):
    both, x = attention[0].to(dtype), draw(time, dtype)
    assert_agree(run_ours(both, x), run_peer(both, x), dtype)


@PRECISIONS
@pytest.mark.parametrize("cut", [1, 37, 99])
def test_gradients_through_the_state(attention, dtype, cut):
    both, x = attention[0].to(dtype), draw(100, dtype)
    assert_agree(run_ours(both, x, cut), run_peer(both, x), dtype)


@PRECISIONS
@pytest.mark.parametrize("first", [2, 37])
@torch.no_grad()
def test_goes_on_beside_the_peers_cache(attention, dtype, first):
    both, config = attention[0].to(dtype), attention[1]
    cache, state = llama.DynamicCache(config=config), None
    for time in (first, 1, 1, 63):
        x = draw(time, dtype, seed=time)
        theirs = both.call_peer(x, cache)
        y, state = both.ours(x, state)
        assert_agree({"y": y}, {"y": theirs}, dtype)


def test_rounds_no_worse_in_bfloat16(attention):
    assert_rounds_no_worse(attention[0])
