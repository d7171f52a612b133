"""RWKV7 and its channel mix against fla's, run with fla's naive operators; the equations are the official code's."""

from __future__ import annotations

import importlib
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from fla_layers import fla_layers, new_cache, run_fla
from peers import CacheAgreement, assert_rounds_no_worse, pair

from seqzoo import clone_state
from seqzoo.layers import RWKV7, RWKV7ChannelMix
from seqzoo.layers.rwkv7 import RWKV7State
from seqzoo.parts.token_shift import ShiftState


def rwkv7(r, w, k, v, a, b, scale, initial_state, **_):
    from fla.ops.generalized_delta_rule.dplr.naive import dplr_recurrence

    assert scale == 1
    r = r * r.shape[-1] ** 0.5  # the naive operator divides by it
    r, k, v, a, b, w = (x.transpose(1, 2) for x in (r, k, v, a, b, w))
    o, state = dplr_recurrence(r, k, v, a, b, w, initial_state)
    return o.transpose(1, 2), state


def rwkv7_step(r, w, k, v, kk, a, scale, initial_state, **_):
    return rwkv7(r, w, k, v, -kk, kk * a, scale, initial_state)


def token_shift(x, cu_seqlens=None, cache=None, output_cache=False):
    from fla.modules.token_shift import token_shift_ref

    assert output_cache
    if cache is None:
        return token_shift_ref(x, cu_seqlens), x[:, -1]
    return token_shift_ref(torch.cat([cache[:, None], x], 1))[:, 1:], x[:, -1]


def plain(module, name):
    """fla's own PyTorch form of a kernel in ``fla.ops.rwkv7``."""

    def run(*inputs):
        return getattr(importlib.import_module(f"fla.ops.rwkv7.{module}"), name)(*inputs)

    return run


fla = fla_layers(
    "rwkv7",
    chunk_rwkv7=rwkv7,
    fused_mul_recurrent_rwkv7=rwkv7_step,
    token_shift=token_shift,
    fused_addcmul_rwkv7=plain("fused_addcmul", "torch_addcmul_rwkv7"),
    fused_k_rwkv7=plain("fused_k_update", "k_update_ref"),
    gate_output_correction=plain("gate_output_correction", "gate_output_correction_ref"),
)
model = fla_layers("modeling_rwkv7", "models.rwkv7", token_shift=token_shift)

NAMES = {
    "mix": lambda theirs: torch.stack([theirs[f"x_{name}"].flatten() for name in "rwkvag"]),
    "decay": "w_lora.lora.2.bias",
    "rate": "a_lora.lora.2.bias",
    "key_scale": "k_k",
    "key_rate": "k_a",
    "bonus": "r_k",
    "receptance.weight": "r_proj.weight",
    "key.weight": "k_proj.weight",
    "value.weight": "v_proj.weight",
    "norm.weight": "g_norm.weight",
    "norm.bias": "g_norm.bias",
    "out.weight": "o_proj.weight",
}
MAPS = {"decay_map": "w_lora", "rate_map": "a_lora", "gate_map": "g_lora"}
PARTS = {"down": 0, "up": 2}
NAMES |= {
    f"{ours}.{part}.weight": f"{theirs}.lora.{index}.weight"
    for ours, theirs in MAPS.items()
    for part, index in PARTS.items()
}


VALUES = {"value_map.up.bias": "v_lora.lora.2.bias"}
VALUES |= {f"value_map.{part}.weight": f"v_lora.lora.{index}.weight" for part, index in PARTS.items()}


class Above(RWKV7):
    """A layer that is not the first, over a first whose values are known."""

    def forward(self, x, state=None, starts=None):
        return super().forward(x, state, starts, source=x.tanh())


def state_from(cache, state):
    kept = cache[len(cache) - 1]
    if kept["ffn_state"] is not None:
        return clone_state(ShiftState(kept["ffn_state"]))
    return clone_state(RWKV7State(kept["recurrent_state"], kept["conv_state"]))


def make_time_mix(ours, names, run, layer_index):
    ranks = {"decay_low_rank_dim": 4, "a_low_rank_dim": 5, "gate_low_rank_dim": 6, "v_low_rank_dim": 7}
    place = {"layer_idx": layer_index, "num_hidden_layers": 2}
    eps = 1e-2 / 8  # the peer multiplies it by the size of a head
    peer = fla.RWKV7Attention(hidden_size=32, head_dim=8, norm_eps=eps, **place, **ranks)
    layer = ours(32, head_dim=8, norm_eps=1e-2, decay_rank=4, rate_rank=5, gate_rank=6)
    return pair(layer, peer, names, run, new_cache=new_cache, state_from=state_from)


@pytest.fixture
def first_time_mix():
    return make_time_mix(RWKV7, NAMES, run_fla, 0)


def run_above(peer, x, cache):
    if cache is not None and not len(cache):
        cache.update(layer_idx=0, offset=0)  # what the first does
    return peer(x, past_key_values=cache, use_cache=cache is not None, v_first=x.tanh())[0]


@pytest.fixture
def other_time_mix():
    above = partial(Above, value_residual=True, value_rank=7)
    return make_time_mix(above, NAMES | VALUES, run_above, 1)


def run_channel_mix(peer, x, cache):
    if cache is not None and not len(cache):
        cache.update(layer_idx=0, offset=0)  # what the time mix below it does
    return peer(x, state=cache)[0]


@pytest.fixture
def channel_mix():
    peer = model.RWKV7FeedForward(32, intermediate_size=48, layer_idx=0, num_hidden_layers=2)
    peer.act_fn = lambda x: F.relu(x).square()
    names = {"mix": "x_k", "key.weight": "key.weight", "out.weight": "value.weight"}
    ours = RWKV7ChannelMix(32, hidden=48)
    return pair(ours, peer, names, run_channel_mix, new_cache=new_cache, state_from=state_from)


@pytest.fixture(params=["first time mix", "other time mix", "channel mix"])
def both(request):
    return request.getfixturevalue(request.param.replace(" ", "_"))


class TestRWKV7(CacheAgreement):
    pass


def test_rounds_no_worse_in_bfloat16(both):
    assert_rounds_no_worse(both)
