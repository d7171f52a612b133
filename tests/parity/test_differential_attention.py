"""Differential attention against transformers' DiffLlama, which pairs heads by halves and has no scales in its norm."""

from __future__ import annotations

import pytest
import torch
from einops import rearrange
from peers import Agreement, assert_rounds_no_worse, modeling, pair
from torch import nn

from seqzoo.layers import DifferentialAttention

hf = modeling("diffllama")

# So large that the norm does not hide the share l of a single token.
EPS = 0.1


def by_pairs(name):
    """Rows of the first and second halves of heads, alternating."""
    return lambda theirs: rearrange(theirs[name], "(two h d) x -> (h two d) x", two=2, d=4)


NAMES = {
    "query.weight": by_pairs("q_proj.weight"),
    "key.weight": by_pairs("k_proj.weight"),
    "value.weight": by_pairs("v_proj.weight"),
    "out.weight": "o_proj.weight",
    "norm.weight": "groupnorm.weight",
    "lambda_query": lambda theirs: torch.stack([theirs["lambda_q1"], theirs["lambda_q2"]]),
    "lambda_key": lambda theirs: torch.stack([theirs["lambda_k1"], theirs["lambda_k2"]]),
}


@pytest.fixture(params=[(4, 0), (2, 3), (1, 1)], ids=lambda param: f"{param[0]} key heads, layer {param[1]}")
def both(request):
    kv_heads, layer = request.param
    config = hf.DiffLlamaConfig(
        hidden_size=32,
        num_attention_heads=8,
        num_key_value_heads=2 * kv_heads,
        num_hidden_layers=4,
        attn_implementation="eager",
    )
    peer = hf.DiffLlamaAttention(config, layer_idx=layer)
    peer.groupnorm = nn.RMSNorm(8, eps=EPS)  # with scales, as the authors' has

    def run(peer, x, cache):
        positions = torch.arange(x.shape[1])[None]
        mask = hf.create_causal_mask(
            config=config, inputs_embeds=x, attention_mask=None, cache=None, position_ids=positions
        )
        return peer(x, hf.DiffLlamaRotaryEmbedding(config)(x, positions), mask)[0]

    ours = DifferentialAttention(32, num_heads=4, num_kv_heads=kv_heads, layer_index=layer, norm_eps=EPS)
    return pair(ours, peer, NAMES, run)


class TestDifferentialAttention(Agreement):
    pass


def test_rounds_no_worse_in_bfloat16(both):
    assert_rounds_no_worse(both)
