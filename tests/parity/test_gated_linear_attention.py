"""GatedLinearAttention and HGRN2 against fla's recurrence of GLA, inside the equations of fla's layers."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from einops import rearrange
from peers import PRECISIONS, TIMES, assert_agree, assert_rounds_no_worse, draw, pair, run_ours, run_peer
from torch import nn

from seqzoo.layers import HGRN2, GatedLinearAttention
from seqzoo.layers.gated_linear_attention import GatedLinearAttentionState
from seqzoo.layers.hgrn2 import HGRN2State

naive = pytest.importorskip("fla.ops.gla.naive")

HEADS, KEY, VALUE = 2, 8, 12
GLA_NAMES = {
    "projection.weight": lambda theirs: torch.cat([theirs[f"{name}_proj.weight"] for name in "qkvg"]),
    "decay.0.weight": "gk_proj.0.weight",
    "decay.1.weight": "gk_proj.1.weight",
    "decay.1.bias": "gk_proj.1.bias",
    "norm.weight": "g_norm.weight",
    "out.weight": "o_proj.weight",
}
HGRN2_NAMES = {
    "projection.weight": lambda theirs: torch.cat([theirs[f"{name}_proj.weight"] for name in "qfi"]),
    "norm.weight": "g_norm.weight",
    "out.weight": "o_proj.weight",
}


class PeerGLA(nn.Module):
    """``GatedLinearAttention`` of fla: the operator scales queries; a gate comes after the norm of each head."""

    def __init__(self):
        super().__init__()
        for name, width in {"q": KEY, "k": KEY, "v": VALUE, "g": VALUE}.items():
            setattr(self, f"{name}_proj", nn.Linear(32, HEADS * width, bias=False))
        self.gk_proj = nn.Sequential(nn.Linear(32, 3, bias=False), nn.Linear(3, HEADS * KEY))
        self.g_norm = nn.RMSNorm(VALUE, eps=1e-6)
        self.o_proj = nn.Linear(HEADS * VALUE, 32, bias=False)

    def forward(self, x, past):
        """Outputs and the state, from the state ``past`` or None."""
        q, k, v, g, gk = self.q_proj(x), self.k_proj(x), self.v_proj(x), self.g_proj(x), self.gk_proj(x)
        q, k, v, g, gk = (rearrange(z, "b t (h d) -> b t h d", h=HEADS) for z in (q, k, v, g, gk))
        gk = F.logsigmoid(gk.float()) / 16
        o, last = naive.naive_recurrent_gla(q, k, v, gk, initial_state=past, output_final_state=True)
        return self.o_proj((self.g_norm(o) * F.silu(g)).flatten(2)), last


class PeerHGRN2(nn.Module):
    """``HGRN2Attention`` of fla: keys are what the gates do not keep, and a norm over all heads is last."""

    def __init__(self, lower_bound):
        super().__init__()
        for name in "qfio":
            setattr(self, f"{name}_proj", nn.Linear(32, 32, bias=False))
        self.g_norm = nn.RMSNorm(32, eps=1e-6)
        self.lower_bound = lower_bound

    def forward(self, x, past):
        q, f, i = F.silu(self.q_proj(x)), self.f_proj(x).float(), self.i_proj(x)
        g = F.logsigmoid(f)
        if self.lower_bound:  # the first layer has none
            bound = torch.tensor(self.lower_bound, dtype=g.dtype)
            g = torch.logaddexp(bound.log(), torch.log1p(-bound) + g)
        k = (1 - g.exp()).to(i)
        q, k, g, i = (rearrange(z, "b t (h d) -> b t h d", h=HEADS) for z in (q, k, g, i))
        o, last = naive.naive_recurrent_gla(q, k, i, g, initial_state=past, output_final_state=True)
        return self.o_proj(self.g_norm(o.flatten(2))), last


def gla():
    ours = GatedLinearAttention(32, num_heads=HEADS, key_dim=KEY, value_dim=VALUE, decay_rank=3)
    return ours, PeerGLA(), GLA_NAMES, GatedLinearAttentionState


def hgrn2(lower_bound):
    return HGRN2(32, head_dim=16, lower_bound=lower_bound), PeerHGRN2(lower_bound), HGRN2_NAMES, HGRN2State


CASES = {"GLA": gla, "HGRN2": lambda: hgrn2(0.0), "HGRN2, lower bound": lambda: hgrn2(0.9)}


@pytest.fixture(params=CASES.values(), ids=CASES)
def case(request):
    ours, peer, names, state = request.param()
    return pair(ours, peer, names, lambda peer, x, cache: peer(x, cache)[0]), state


@PRECISIONS
@TIMES
def test_values_and_gradients(case, dtype, time):
    both, x = case[0].to(dtype), draw(time, dtype)
    assert_agree(run_ours(both, x), run_peer(both, x), dtype)


@PRECISIONS
@pytest.mark.parametrize("cut", [1, 37, 99])
def test_gradients_through_the_state(case, dtype, cut):
    both, x = case[0].to(dtype), draw(100, dtype)
    assert_agree(run_ours(both, x, cut), run_peer(both, x), dtype)


@PRECISIONS
@pytest.mark.parametrize("first", [1, 37])
@torch.no_grad()
def test_goes_on_from_the_peers_state(case, dtype, first):
    both, kind = case[0].to(dtype)._replace(run=lambda peer, x, cache: peer(x, cache)), case[1]
    state = past = None
    for time in (first, 1, 1, 63):
        x = draw(time, dtype, seed=time)
        theirs, past = both.call_peer(x, past)
        y, state = both.ours(x, state)
        assert_agree({"y": y, "memory": state.memory}, {"y": theirs, "memory": past}, dtype)
        state = kind(past.clone())


def test_rounds_no_worse_in_bfloat16(case):
    assert_rounds_no_worse(case[0])
