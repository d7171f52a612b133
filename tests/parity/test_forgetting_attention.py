"""Forgetting attention against the official block written out around fla's plain operator."""

from __future__ import annotations

import pytest
import torch
from peers import Agreement, assert_rounds_no_worse, pair
from torch import nn

from seqzoo.layers import ForgettingAttention

naive = pytest.importorskip("fla.ops.forgetting_attn.naive").naive_forgetting_attn

HEADS = 4
# So large that a norm does not hide the size of what it divides, such as the share that one token keeps of itself.
EPS = 0.1
LINEAR = {"query": "q_proj", "key": "k_proj", "value": "v_proj", "out": "o_proj", "forget": "fgate_proj"}
PRO = {"key_shift": "k_shift", "value_shift": "v_shift", "gate": "ogate_proj", "query_norm": "q_norm"}
PRO |= {"key_norm": "k_norm", "norm": "output_norm"}


class Block(nn.Module):
    """The paper's Pro block, or its plain one."""

    def __init__(self, pro):
        super().__init__()
        for name in "qkvo":
            setattr(self, f"{name}_proj", nn.Linear(32, 32, bias=False))
        self.fgate_proj = nn.Linear(32, HEADS)
        self.pro = pro
        if pro:
            self.k_shift, self.v_shift = (nn.Linear(32, HEADS, bias=False) for _ in range(2))
            self.ogate_proj = nn.Linear(32, 32, bias=False)
            for norm in ("q_norm", "k_norm", "output_norm"):
                setattr(self, norm, Scale(32))

    def forward(self, x):
        q, k, v = self.q_proj(x), self.k_proj(x), self.v_proj(x)
        if self.pro:
            k, v = self.shift(k, self.k_shift(x)), self.shift(v, self.v_shift(x))
            q, k = self.q_norm(q, 1e-5), self.k_norm(k, 1e-5)
        q, k, v = (z.view(*x.shape[:2], HEADS, -1) for z in (q, k, v))
        o = naive(q, k, v, torch.log(torch.sigmoid(self.fgate_proj(x)))).flatten(2)
        if self.pro:
            o = self.output_norm(o, EPS) * torch.sigmoid(self.ogate_proj(x))
        return self.o_proj(o.to(x.dtype))

    def shift(self, x, share):
        share = torch.sigmoid(share).repeat_interleave(32 // HEADS, -1)
        before = torch.cat([torch.zeros_like(x[:, :1]), x[:, :-1]], 1)
        return share * before + (1 - share) * x


class Scale(nn.Module):
    """Each head's root mean square becomes 1, then each channel has its own scale."""

    def __init__(self, dim):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x, eps):
        heads = x.float().view(*x.shape[:2], HEADS, -1)
        heads = heads * torch.rsqrt(heads.square().mean(-1, keepdim=True) + eps)
        return (heads.flatten(2) * self.weight.float()).to(x.dtype)


@pytest.fixture(params=[True, False], ids=["Pro", "plain"])
def both(request):
    names = {f"{ours}.weight": f"{theirs}.weight" for ours, theirs in (LINEAR | (PRO if request.param else {})).items()}
    names["forget.bias"] = "fgate_proj.bias"
    on = dict.fromkeys(("shift", "qk_norm", "use_norm", "use_gate"), request.param)
    ours = ForgettingAttention(32, num_heads=HEADS, norm_eps=EPS, **on)
    return pair(ours, Block(request.param), names, lambda peer, x, cache: peer(x))


class TestForgettingAttention(Agreement):
    pass


def test_rounds_no_worse_in_bfloat16(both):
    assert_rounds_no_worse(both)
