"""GatedLinearAttention and HGRN2 against fla's layers, run with fla's naive operator."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from fla_layers import fla_layers, new_cache, rms_norm, run_fla
from peers import CacheAgreement, assert_rounds_no_worse, pair

from seqzoo import clone_state
from seqzoo.layers import HGRN2, GatedLinearAttention
from seqzoo.layers.gated_linear_attention import GatedLinearAttentionState
from seqzoo.layers.hgrn2 import HGRN2State

HEADS, KEY, VALUE = 2, 8, 12


def fused_gla(q, k, v, gk, initial_state, state_v_first, **_):
    from fla.ops.gla.naive import naive_recurrent_gla

    assert state_v_first
    state = None if initial_state is None else initial_state.mT
    o, state = naive_recurrent_gla(q, k, v, gk, initial_state=state, output_final_state=True)
    return o, state.mT


def chunk_gla(g, **inputs):
    return fused_gla(gk=g, **inputs)


def norm_linear(x, norm_weight, norm_bias, linear_weight, linear_bias):
    """fla's ``rms_norm_linear`` with its default epsilon."""
    assert norm_bias is None and linear_bias is None
    return F.linear(rms_norm(x.float(), norm_weight, 1e-5).to(x.dtype), linear_weight)


operators = {"chunk_gla": chunk_gla, "fused_recurrent_gla": fused_gla}
fla_gla = fla_layers("gla", **operators)
fla_hgrn2 = fla_layers("hgrn2", **operators, swish=F.silu, rms_norm_linear=norm_linear)

GLA_NAMES = {
    "projection.weight": lambda theirs: torch.cat([theirs[f"{name}_proj.weight"] for name in "qkvg"]),
    "decay.0.weight": "gk_proj.0.weight",
    "decay.1.weight": "gk_proj.1.weight",
    "decay.1.bias": "gk_proj.1.bias",
    "norm.weight": "g_norm_swish_gate.weight",
    "out.weight": "o_proj.weight",
}
HGRN2_NAMES = {
    "projection.weight": lambda theirs: torch.cat([theirs[f"{name}_proj.weight"] for name in "qfi"]),
    "norm.weight": "g_norm.weight",
    "out.weight": "o_proj.weight",
}


def gla():
    ours = GatedLinearAttention(32, num_heads=HEADS, key_dim=KEY, value_dim=VALUE, decay_rank=3)
    peer = fla_gla.GatedLinearAttention(
        hidden_size=32,
        num_heads=HEADS,
        expand_k=HEADS * KEY / 32,
        expand_v=HEADS * VALUE / 32,
        gate_low_rank_dim=3,
        norm_eps=1e-6,
        layer_idx=0,
    )

    def state_from(cache, state):
        return clone_state(GatedLinearAttentionState(cache[0]["recurrent_state"].mT))

    return pair(ours, peer, GLA_NAMES, run_fla, new_cache=new_cache, state_from=state_from)


def hgrn2(lower_bound):
    """The peer's first layer takes no bound; none of its layers passes ``norm_eps`` on to the norm."""
    index = 1 if lower_bound else 0
    ours = HGRN2(32, head_dim=16, lower_bound=lower_bound, norm_eps=1e-5)
    peer = fla_hgrn2.HGRN2Attention(hidden_size=32, expand_ratio=16, norm_eps=1.0, layer_idx=index)

    def run(peer, x, cache):
        bound = torch.tensor(lower_bound, dtype=x.dtype)
        return peer(x, past_key_values=cache, use_cache=cache is not None, lower_bound=bound)[0]

    def state_from(cache, state):
        return clone_state(HGRN2State(cache[index]["recurrent_state"].mT))

    return pair(ours, peer, HGRN2_NAMES, run, new_cache=new_cache, state_from=state_from)


CASES = {"GLA": gla, "HGRN2": lambda: hgrn2(0.0), "HGRN2, lower bound": lambda: hgrn2(0.9)}


@pytest.fixture(params=CASES.values(), ids=CASES)
def both(request):
    return request.param()


class TestGatedLinearAttention(CacheAgreement):
    pass


def test_rounds_no_worse_in_bfloat16(both):
    assert_rounds_no_worse(both)
