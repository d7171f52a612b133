"""RWKV6 and its channel mix against fla's, run with fla's naive operator; the equations are the official code's."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from fla_layers import fla_layers, new_cache, run_fla
from peers import CacheAgreement, assert_rounds_no_worse, pair

from seqzoo import clone_state
from seqzoo.layers import RWKV6, RWKV6ChannelMix
from seqzoo.layers.rwkv6 import RWKV6State
from seqzoo.parts.token_shift import ShiftState


def rwkv6(r, k, v, w, u, scale, initial_state, **_):
    from fla.ops.rwkv6.recurrent_naive import naive_recurrent_rwkv6

    r, k, v, w = (x.transpose(1, 2) for x in (r, k, v, w))
    o, state = naive_recurrent_rwkv6(r, k, v, w, u, scale, initial_state, output_final_state=True)
    # The last token's decay has no part in the outputs; its gradient is asked for all the same.
    return o.transpose(1, 2) + 0 * w.sum(), state


def token_shift(x, cu_seqlens=None):
    from fla.modules.token_shift import token_shift_ref

    return token_shift_ref(x, cu_seqlens)


fla = fla_layers("rwkv6", chunk_rwkv6=rwkv6, fused_recurrent_rwkv6=rwkv6, token_shift=token_shift)
model = fla_layers("modeling_rwkv6", "models.rwkv6", token_shift=token_shift)

RANK = 4


def ordered(parts):
    """fla's five inputs are r, w, k, v, g; the official order, and ours, is w, k, v, r, g."""
    r, w, k, v, g = parts
    return torch.stack([w, k, v, r, g])


NAMES = {
    "mix": lambda theirs: torch.cat([theirs["x_proj.0.mu"][None], ordered(theirs["x_bias"])]),
    "mix_down": lambda theirs: ordered(theirs["x_proj.0.linear.weight"].unflatten(0, (5, RANK))).flatten(0, 1).T,
    "mix_up": lambda theirs: ordered(theirs["x_proj.2.weight"].unflatten(1, (5, RANK)).unbind(1)).mT,
    "decay": "w_proj.linear.lora.2.bias",
    "decay_map.down.weight": "w_proj.linear.lora.0.weight",
    "decay_map.up.weight": "w_proj.linear.lora.2.weight",
    "bonus": "bonus",
    "receptance.weight": "r_proj.linear.weight",
    "key.weight": "k_proj.linear.weight",
    "value.weight": "v_proj.linear.weight",
    "gate.weight": "g_proj.linear.weight",
    "norm.weight": "g_norm.weight",
    "norm.bias": "g_norm.bias",
    "out.weight": "o_proj.weight",
}
CHANNEL_NAMES = {
    "mix": lambda theirs: torch.stack([theirs["key.mu"], theirs["receptance.mu"]]),
    "key.weight": "key.linear.weight",
    "receptance.weight": "receptance.linear.weight",
    "out.weight": "value.weight",
}


def state_from(cache, state):
    kept = cache[0]
    if kept["ffn_state"] is not None:
        return clone_state(ShiftState(kept["ffn_state"]))
    return clone_state(RWKV6State(kept["recurrent_state"], kept["conv_state"]))


@pytest.fixture
def time_mix():
    ranks = {"proj_low_rank_dim": RANK, "gate_low_rank_dim": 6}
    peer = fla.RWKV6Attention(hidden_size=32, expand_k=1.0, num_heads=4, norm_eps=1e-2, layer_idx=0, **ranks)
    peer.gate_fn = F.silu
    torch.nn.init.uniform_(peer.w_proj.linear.lora[2].bias, -4, 0)
    ours = RWKV6(32, head_dim=8, mix_rank=RANK, decay_rank=6, norm_eps=1e-2)
    return pair(ours, peer, NAMES, run_fla, new_cache=new_cache, state_from=state_from)


def run_channel_mix(peer, x, cache):
    if cache is not None and not len(cache):
        cache.update(layer_idx=0, offset=0)  # what the time mix below it does
    return peer(x, state=cache)[0]


@pytest.fixture
def channel_mix():
    peer = model.RWKV6FeedForward(32, intermediate_size=48, layer_idx=0)
    peer.act_fn = lambda x: F.relu(x).square()
    ours = RWKV6ChannelMix(32, hidden=48)
    return pair(ours, peer, CHANNEL_NAMES, run_channel_mix, new_cache=new_cache, state_from=state_from)


@pytest.fixture(params=["time mix", "channel mix"])
def both(request):
    return request.getfixturevalue(request.param.replace(" ", "_"))


class TestRWKV6(CacheAgreement):
    pass


def test_rounds_no_worse_in_bfloat16(both):
    assert_rounds_no_worse(both)
