"""Mamba2 against transformers' Mamba2Mixer and, for other places of the norm, FalconH1Mixer; and the official step."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from peers import CacheAgreement, assert_rounds_no_worse, draw, error, modeling, pair

from seqzoo import clone_state
from seqzoo.layers import Mamba2
from seqzoo.layers.mamba2 import Mamba2State

hf, falcon = modeling("mamba2"), modeling("falcon_h1")

NAMES = {
    "projection.weight": "in_proj.weight",
    "conv.weight": lambda theirs: theirs["conv1d.weight"].squeeze(1),
    "conv.bias": "conv1d.bias",
    "decay.A_log": "A_log",
    "decay.dt_bias": "dt_bias",
    "skip": "D",
    "norm.weight": "norm.weight",
    "out.weight": "out_proj.weight",
}
LIMIT = (0.3, 0.9)


def state_from(cache, state):
    """Ours has the state's rows before the head's channels, and keeps one input less: the peer's oldest has no use."""
    layer = cache.layers[0]
    return clone_state(Mamba2State(layer.recurrent_states[0].mT, layer.conv_states[0][..., 1:].mT))


def build(groups, norm="after_gate", step_limit=(0.0, math.inf)):
    """Eight heads in groups; each group has its own B and C, and is normalised apart."""
    if norm == "after_gate":
        config = hf.Mamba2Config(
            hidden_size=32,
            num_heads=8,
            head_dim=8,
            state_size=8,
            n_groups=groups,
            chunk_size=16,
            num_hidden_layers=1,
            time_step_limit=step_limit,
        )
        peer = hf.Mamba2Mixer(config, layer_idx=0)
    else:
        config = falcon.FalconH1Config(
            hidden_size=32,
            num_hidden_layers=1,
            mamba_d_ssm=64,
            mamba_n_heads=8,
            mamba_d_head=8,
            mamba_d_state=8,
            mamba_n_groups=groups,
            mamba_chunk_size=16,
            mamba_rms_norm=norm != "none",
            mamba_norm_before_gate=True,
            time_step_limit=step_limit,
        )
        peer = falcon.FalconH1Mixer(config, layer_idx=0)
        peer.mup_vector = 1.0  # the model that holds the mixer would set it
    torch.nn.init.uniform_(peer.dt_bias, -2, 1)  # Longer steps than at the start of training: so the memory weighs in.
    eps = peer.norm.variance_epsilon if norm != "none" else 1.0
    ours = Mamba2(32, state_size=8, head_dim=8, num_groups=groups, norm=norm, norm_eps=eps, step_limit=step_limit)
    names = {name: source for name, source in NAMES.items() if norm != "none" or name != "norm.weight"}
    run, new_cache = lambda peer, x, cache: peer(x, cache), lambda: hf.DynamicCache(config=config)
    # At a single token the peer forgets its limits.
    later = (63,) if step_limit == LIMIT else (1, 1, 63)
    return pair(ours, peer, names, run, new_cache=new_cache, state_from=state_from, later=later)


CASES = {
    "1 group": (1,),
    "2 groups": (2,),
    "4 groups": (4,),
    "norm before gate": (2, "before_gate"),
    "no norm": (2, "none"),
    "limited steps": (2, "after_gate", LIMIT),
}


@pytest.fixture(params=CASES.values(), ids=CASES)
def both(request):
    return build(*request.param)


class TestMamba2(CacheAgreement):
    pass


@torch.no_grad()
def test_the_peer_forgets_its_limits_at_a_single_token():
    both = build(2, "after_gate", LIMIT)
    x, cache = draw(40, torch.float64), both.new_cache()
    whole = both.call_peer(x)
    theirs = torch.cat([both.call_peer(piece, cache) for piece in x.split([39, 1], 1)], 1)
    _, state = both.ours(x[:, :39])
    assert error(both.ours(x[:, 39:], state)[0], whole[:, 39:]) < 1e-10
    assert error(theirs[:, :39], whole[:, :39]) < 1e-10 and error(theirs[:, 39:], whole[:, 39:]) > 1e-3


@pytest.mark.parametrize("case", [1, 3, 4], ids=["2 groups", "norm before gate", "no norm"])
def test_rounds_no_worse_in_bfloat16(case):
    assert_rounds_no_worse(build(*list(CASES.values())[case]))


@pytest.mark.parametrize("norm", ["after_gate", "before_gate", "none"])
def test_the_official_step_with_a_skip_for_each_channel(norm):
    """``Mamba2.step`` of state-spaces/mamba, and the norms of its kernels, written out: no peer has this skip."""
    torch.manual_seed(0)
    layer = Mamba2(32, state_size=8, head_dim=8, num_groups=4, norm=norm, skip_per_channel=True).double()
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    x = draw(20, torch.float64)
    z, xbc, dt = layer.projection(x).split([64, 64 + 2 * 32, 8], -1)
    past = F.pad(xbc.mT, (3, 0))
    S, outputs = torch.zeros(2, 8, 8, 8, dtype=torch.float64), []
    for t in range(20):
        now = F.silu((past[..., t : t + 4] * layer.conv.weight).sum(-1) + layer.conv.bias)
        u, B, C = now[:, :64].unflatten(1, (8, 8)), *(p.unflatten(1, (4, 8)) for p in now[:, 64:].chunk(2, 1))
        B, C = B.repeat_interleave(2, 1), C.repeat_interleave(2, 1)
        delta = torch.log1p(torch.exp(dt[:, t] + layer.decay.dt_bias))
        decay = torch.exp(-delta * layer.decay.A_log.exp())
        S = decay[..., None, None] * S + torch.einsum("bh,bhn,bhp->bhpn", delta, B, u)
        y = torch.einsum("bhpn,bhn->bhp", S, C).flatten(1) + layer.skip * u.flatten(1)
        gate = z[:, t] * z[:, t].sigmoid()
        if norm != "none":
            y = y * gate if norm == "after_gate" else y
            y = y.unflatten(1, (4, 16))
            y = (y / (y.square().mean(-1, keepdim=True) + 1e-5).sqrt()).flatten(1) * layer.norm.weight
        outputs.append(layer.out(y if norm == "after_gate" else y * gate))
    torch.testing.assert_close(layer(x)[0], torch.stack(outputs, 1), rtol=1e-10, atol=1e-10)
