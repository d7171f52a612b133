"""Mamba against transformers' MambaMixer, FalconMambaMixer (fixed norms) and JambaMambaMixer (learned norms)."""

from __future__ import annotations

import pytest
import torch
from peers import CacheAgreement, assert_rounds_no_worse, draw, error, modeling, pair

from seqzoo import clone_state
from seqzoo.layers import Mamba
from seqzoo.layers.mamba import MambaState

mamba, falcon, jamba = modeling("mamba"), modeling("falcon_mamba"), modeling("jamba")

STATE, RANK = 5, 3
NAMES = {
    "projection.weight": "in_proj.weight",
    "conv.weight": lambda theirs: theirs["conv1d.weight"].squeeze(1),
    "conv.bias": "conv1d.bias",
    "step_write_read.weight": "x_proj.weight",
    "step.weight": "dt_proj.weight",
    "dt_bias": "dt_proj.bias",
    "A_log": "A_log",
    "skip": "D",
    "out.weight": "out_proj.weight",
}
NORMS = {f"norms.{index}.weight": f"{name}_layernorm.weight" for index, name in enumerate(("dt", "b", "c"))}


def state_from(cache, state):
    """Ours keeps one input less: the peer's oldest has no use."""
    layer = cache.layers[0]
    return clone_state(MambaState(layer.recurrent_states[0], layer.conv_states[0][..., 1:].mT))


def build(parameter_norm):
    """Ours and the peer; the peer's norms have an epsilon that tells."""
    sizes = {"hidden_size": 32, "num_hidden_layers": 1}
    inner = {"state_size": STATE, "time_step_rank": RANK, "conv_kernel": 4, "expand": 2}
    if parameter_norm == "learned":
        config = jamba.JambaConfig(**sizes, mamba_d_state=STATE, mamba_dt_rank=RANK, rms_norm_eps=1e-2)
        peer = jamba.JambaMambaMixer(config, layer_idx=0)
    elif parameter_norm == "fixed":
        config = falcon.FalconMambaConfig(**sizes, **inner, mixer_rms_eps=1e-2)
        peer = falcon.FalconMambaMixer(config, layer_idx=0, initialize_mixer_weights=False)
        peer.init_falcon_mamba_weights()  # its constructor would do this before there are norms
    else:
        config = mamba.MambaConfig(**sizes, **inner)
        peer = mamba.MambaMixer(config, layer_idx=0)
    torch.nn.init.uniform_(peer.dt_proj.bias, -2, 1)  # Longer steps than at the start of training: memory weighs in.
    ours = Mamba(32, state_size=STATE, step_rank=RANK, parameter_norm=parameter_norm, norm_eps=1e-2)
    names = NAMES | (NORMS if parameter_norm == "learned" else {})
    run, new_cache = lambda peer, x, cache: peer(x, cache), lambda: mamba.DynamicCache(config=config)
    return pair(ours, peer, names, run, new_cache=new_cache, state_from=state_from, later=(1, 1, 1))


@pytest.fixture(params=["none", "fixed", "learned"])
def both(request):
    return build(request.param)


class TestMamba(CacheAgreement):
    pass


@torch.no_grad()
def test_the_peer_forgets_its_state_before_several_tokens(both):
    """Where a prompt comes in two pieces the peer scans the second from zero; ours is the whole prompt's answer."""
    x, cache = draw(40, torch.float64), both.new_cache()
    whole = both.call_peer(x)
    theirs = torch.cat([both.call_peer(piece, cache) for piece in x.split([30, 10], 1)], 1)
    first, state = both.ours(x[:, :30])
    ours = torch.cat([first, both.ours(x[:, 30:], state)[0]], 1)
    assert error(ours, whole) < 1e-10
    assert error(theirs[:, :30], whole[:, :30]) < 1e-10 and error(theirs[:, 30:], whole[:, 30:]) > 1e-3
    _, conv = state
    forgetful = both.ours(x[:, 30:], MambaState(torch.zeros_like(state.memory), conv))[0]
    assert error(theirs[:, 30:], forgetful) < 1e-10


def test_rounds_no_worse_in_bfloat16(both):
    assert_rounds_no_worse(both)
