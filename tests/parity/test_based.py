"""Based against fla's operator, which holds all products of queries and keys, inside the official layer's projections."""

from __future__ import annotations

import pytest
import torch
from einops import rearrange
from peers import PRECISIONS, TIMES, assert_agree, assert_rounds_no_worse, draw, pair, run_ours, run_peer
from torch import nn

from seqzoo.layers import Based
from seqzoo.parts.feature_maps import taylor, taylor_size

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


def test_rounds_no_worse_in_bfloat16():
    assert_rounds_no_worse(build())


@pytest.mark.parametrize("size", [1, 2, 16])
def test_features_are_the_series_of_the_exponential(size):
    q, k = torch.randn(2, 7, size, dtype=torch.float64)
    assert taylor(q).shape == (7, taylor_size(size))
    s = (q * k).sum(-1) / size**0.5
    torch.testing.assert_close((taylor(q) * taylor(k)).sum(-1), 1 + s + s**2 / 2)
