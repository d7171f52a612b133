"""Based against fla's operator on all products of queries and keys, in the official projections; and its step."""

from __future__ import annotations

import pytest
import torch
from einops import rearrange
from peers import (
    PRECISIONS,
    TIMES,
    TOLERANCE,
    assert_agree,
    assert_rounds_no_worse,
    draw,
    error,
    pair,
    run_ours,
    run_peer,
)
from torch import nn

from seqzoo.layers import Based
from seqzoo.layers.based import BasedState

naive = pytest.importorskip("fla.ops.based.naive")

HEADS, FEATURES = 2, 5
NAMES = {
    "projection.weight": lambda theirs: torch.cat([theirs[f"proj_{name}.weight"] for name in "qkv"]),
    "out.weight": "out_proj.weight",
}


class LinearAttention(nn.Module):
    def __init__(self):
        super().__init__()
        self.proj_q, self.proj_k = (nn.Linear(32, HEADS * FEATURES, bias=False) for _ in range(2))
        self.proj_v, self.out_proj = (nn.Linear(32, 32, bias=False) for _ in range(2))

    def forward(self, x):
        q, k, v = (rearrange(f(x), "b t (h d) -> b h t d", h=HEADS) for f in (self.proj_q, self.proj_k, self.proj_v))
        # fla would add 1e-6 to a sum of weights that is at least a half, the official code 1e-12.
        total = naive.naive_parallel_based(q, k, torch.ones_like(v[..., :1]), use_norm=False)
        o = naive.naive_parallel_based(q, k, v, use_norm=False) / total
        return self.out_proj(rearrange(o, "b h t d -> b t (h d)"))


def build():
    return pair(
        Based(32, num_heads=HEADS, feature_dim=FEATURES), LinearAttention(), NAMES, lambda peer, x, cache: peer(x)
    )


@PRECISIONS
@TIMES
@pytest.mark.parametrize("cut", [0, 1])
def test_values_and_gradients(dtype, time, cut):
    both, x = build().to(dtype), draw(time, dtype)
    if cut < time:
        assert_agree(run_ours(both, x, cut), run_peer(both, x), dtype)


@PRECISIONS
@torch.no_grad()
def test_goes_on_from_the_official_state(dtype):
    """``recurrent_forward``, with ``TaylorExp``: it has each product of two numbers twice, and half of both is ours."""
    both = build().to(dtype)
    x, peer = draw(40, dtype), both.peer
    heads = [rearrange(map(x), "b t (h d) -> t b h d", h=HEADS) for map in (peer.proj_q, peer.proj_k, peer.proj_v)]
    memory, total, state = torch.zeros(()), torch.zeros(()), None

    def official(z):
        squares = rearrange(z[..., :, None] * z[..., None, :], "... i j -> ... (i j)") / 2**0.5
        return torch.cat([z[..., :1] ** 0, z / FEATURES**0.25, squares / FEATURES**0.5], -1)

    square = torch.arange(FEATURES**2).view(FEATURES, FEATURES)
    once, twice = square.diag(), square[*torch.triu_indices(FEATURES, FEATURES, 1)]
    order = torch.cat([torch.arange(1 + FEATURES), 1 + FEATURES + once, 1 + FEATURES + twice])
    scale = torch.ones(len(order), 1, dtype=dtype)
    scale[-len(twice) :] = 2**0.5
    for time, (q, k, v) in enumerate(zip(*heads, strict=True)):
        q, k = official(q), official(k)
        memory, total = memory + k[..., None] * v[..., None, :], total + k
        o = (q[..., None] * memory).sum(-2) / ((q * total).sum(-1, keepdim=True) + 1e-12)
        y, last = both.ours(x[:, time : time + 1], state)
        state = BasedState(torch.cat([memory, total[..., None]], -1)[..., order, :] * scale)
        for mine, theirs in ((y, peer.out_proj(o.flatten(1))[:, None]), (last.memory, state.memory)):
            assert error(mine, theirs) < TOLERANCE[dtype]


def test_rounds_no_worse_in_bfloat16():
    assert_rounds_no_worse(build())
