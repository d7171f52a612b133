"""GatedLinearAttention and HGRN2 against fla's recurrence of GLA, inside the equations of fla's layers."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from einops import rearrange
from peers import CacheAgreement, assert_rounds_no_worse, pair
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


def run(peer, x, cache):
    y, last = peer(x, *(cache or [None]))
    if cache is not None:
        cache[:] = [last]
    return y


@pytest.fixture(params=CASES.values(), ids=CASES)
def both(request):
    ours, peer, names, kind = request.param()
    return pair(ours, peer, names, run, new_cache=list, state_from=lambda cache, state: kind(cache[0].clone()))


class TestGatedLinearAttention(CacheAgreement):
    pass


def test_rounds_no_worse_in_bfloat16(both):
    assert_rounds_no_worse(both)
