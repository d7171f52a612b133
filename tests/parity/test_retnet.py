"""RetNet against fla's retention inside Microsoft's layer (torchscale), and against that layer's own step."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
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

from seqzoo.layers import RetNet
from seqzoo.layers.retnet import RetNetState

naive = pytest.importorskip("fla.ops.retention.naive")

HEADS, KEY, VALUE = 2, 8, 12
NAMES = {
    "projection.weight": lambda theirs: torch.cat([theirs[f"{name}_proj.weight"] for name in "qkvg"]),
    "out.weight": "out_proj.weight",
}


class MultiScaleRetention(nn.Module):
    """torchscale's layer, its equations written out, around fla's quadratic retention, which scales queries."""

    def __init__(self, eps):
        super().__init__()
        self.eps = eps
        for name, width in {"q": HEADS * KEY, "k": HEADS * KEY, "v": HEADS * VALUE, "g": HEADS * VALUE}.items():
            setattr(self, f"{name}_proj", nn.Linear(32, width, bias=False))
        self.out_proj = nn.Linear(HEADS * VALUE, 32, bias=False)

    def heads(self, x, begin=0):
        """Queries and keys after ``theta_shift``, and values: ``[batch, head, time, channel]``."""
        q, k, v = self.q_proj(x), self.k_proj(x), self.v_proj(x)
        q, k, v = (rearrange(z, "b t (h d) -> b h t d", h=HEADS) for z in (q, k, v))
        angle = (1.0 / 10000 ** torch.linspace(0, 1, KEY // 2, dtype=torch.float64)).repeat_interleave(2)
        angle = (begin + torch.arange(x.shape[1], dtype=torch.float64))[:, None] * angle
        sin, cos = angle.sin().to(x.dtype), angle.cos().to(x.dtype)

        def rotate_every_two(z):
            return torch.stack([-z[..., 1::2], z[..., ::2]], -1).flatten(-2)

        return q * cos + rotate_every_two(q) * sin, k * cos + rotate_every_two(k) * sin, v

    def finish(self, o, x):
        """The norm of heads ``[batch, time, head, channel]``, the gate and the output projection."""
        o = o * torch.rsqrt(o.square().mean(-1, keepdim=True) + self.eps)
        return self.out_proj(F.silu(self.g_proj(x)) * o.flatten(2))

    def forward(self, x):
        return self.finish(naive.naive_retention(*self.heads(x)).transpose(1, 2), x)

    def step(self, x, begin, state, scale):
        """``recurrent_forward``: what is read is divided by the root of ``scale``, the sum of what is kept."""
        (q, k, v), decay = self.heads(x, begin), 1 - 2.0 ** (-5 - torch.arange(HEADS, dtype=x.dtype))
        now = k.mT * KEY**-0.5 * v
        if state is None:
            state, scale = now, torch.ones_like(decay)
        else:
            before, scale = scale, scale * decay + 1
            root = scale.sqrt()[:, None, None]
            state = state * (before.sqrt() * decay)[:, None, None] / root + now / root
        return self.finish(rearrange(q @ state, "b h t v -> b t h v"), x), state, scale


def build(eps=1e-6):
    ours = RetNet(32, num_heads=HEADS, key_dim=KEY, value_dim=VALUE, norm_eps=eps)
    return pair(ours, MultiScaleRetention(eps), NAMES, lambda peer, x, cache: peer(x))


@PRECISIONS
@TIMES
def test_values_and_gradients(dtype, time):
    both, x = build().to(dtype), draw(time, dtype)
    assert_agree(run_ours(both, x), run_peer(both, x), dtype)


@PRECISIONS
@pytest.mark.parametrize("cut", [1, 37, 99])
def test_gradients_through_the_state(dtype, cut):
    both, x = build().to(dtype), draw(100, dtype)
    assert_agree(run_ours(both, x, cut), run_peer(both, x), dtype)


@PRECISIONS
@torch.no_grad()
def test_goes_on_from_the_official_state(dtype):
    """With nothing added under its root, the norm undoes the official divisor."""
    both, x = build(eps=0.0).to(dtype), draw(40, dtype)
    state = scale = memory = None
    for time in range(40):
        theirs, state, scale = both.peer.step(x[:, time : time + 1], time, state, scale)
        if time >= 20:
            before = RetNetState(memory, torch.full((2,), time))
            assert error(both.ours(x[:, time : time + 1], before)[0], theirs) < TOLERANCE[dtype]
        memory = state * scale.sqrt()[:, None, None]


@torch.no_grad()
def test_the_official_parallel_form_divides_once_more():
    both, x = build(eps=0.0), draw(100, torch.float64)
    q, k, v = both.peer.heads(x)
    gamma, order = 1 - 2.0 ** (-5 - torch.arange(HEADS, dtype=x.dtype)), torch.arange(100)
    mask = (gamma[:, None, None] ** (order[:, None] - order).clamp(min=0)).tril()
    scores = q @ k.mT * KEY**-0.5 * mask / mask.sum(-1, keepdim=True).sqrt()
    o = scores / scores.abs().sum(-1, keepdim=True).clamp(min=1, max=5e4) @ v
    assert error(both.ours(x)[0], both.peer.finish(o.transpose(1, 2), x)) < 1e-10


def test_rounds_no_worse_in_bfloat16():
    assert_rounds_no_worse(build())
