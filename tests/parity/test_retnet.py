"""RetNet against fla's layer, run with fla's naive operators, and against torchscale's two forms with its weights.

fla turns halves of a head, at other speeds: here the layer turns neighbours as Microsoft's does (torchscale).
"""

from __future__ import annotations

import pytest
import torch
from einops import rearrange
from fla_layers import fla_layers, new_cache, run_fla
from peers import PRECISIONS, TOLERANCE, CacheAgreement, assert_rounds_no_worse, draw, error, pair, widened
from torch import nn

from seqzoo import clone_state
from seqzoo.layers import RetNet
from seqzoo.layers.retnet import RetNetState

HEADS, KEY, VALUE = 2, 8, 12
NAMES = {
    "projection.weight": lambda theirs: torch.cat([theirs[f"{name}_proj.weight"] for name in "qkvg"]),
    "out.weight": "o_proj.weight",
}


def gammas(dtype):
    return 1 - 2.0 ** (-5 - torch.arange(HEADS, dtype=dtype))


def retention(q, k, v, initial_state, output_final_state, **_):
    """fla's quadratic form has no state: with one it is gated linear attention of a fixed decay."""
    from fla.ops.gla.naive import naive_recurrent_gla
    from fla.ops.retention.naive import naive_retention

    if not output_final_state:
        assert initial_state is None
        return naive_retention(*(x.transpose(1, 2) for x in (q, k, v))).transpose(1, 2), None
    log_decay = gammas(torch.float64).log().to(q.dtype)[:, None].expand_as(q)
    return naive_recurrent_gla(q, k, v, log_decay, initial_state=initial_state, output_final_state=True)


class Rotary(nn.Module):
    """torchscale's ``theta_shift``, in float32: neighbours turn, by ``10000^-linspace(0, 1)`` radians a token."""

    def __init__(self, dim):
        super().__init__()
        self.dim = dim

    def forward(self, q, k, seqlen_offset, **_):
        from fla.modules.rotary.ops import rotary_embedding_ref

        position = seqlen_offset + torch.arange(q.shape[1], dtype=torch.float32)
        angle = torch.outer(position, 10000 ** -torch.linspace(0, 1, self.dim // 2, dtype=torch.float32))
        turned = (rotary_embedding_ref(x.float(), angle.cos(), angle.sin(), interleaved=True) for x in (q, k))
        return tuple(y.to(q.dtype) for y in turned)


fla = fla_layers(
    "multiscale_retention", chunk_retention=retention, fused_recurrent_retention=retention, RotaryEmbedding=Rotary
)


def state_from(cache, state):
    """The peer scales queries, and so leaves its memory unscaled; it counts tokens for all rows at once."""
    position = torch.full_like(state.position, cache.get_seq_length())
    return clone_state(RetNetState(cache[0]["recurrent_state"] * KEY**-0.5, position))


def build(eps=1e-6):
    ours = RetNet(32, num_heads=HEADS, key_dim=KEY, value_dim=VALUE, norm_eps=eps)
    peer = fla.MultiScaleRetention(
        hidden_size=32,
        num_heads=HEADS,
        expand_k=HEADS * KEY / 32,
        expand_v=HEADS * VALUE / 32,
        elementwise_affine=False,
        norm_eps=eps,
        layer_idx=0,
    )
    return pair(ours, peer, NAMES, run_fla, new_cache=new_cache, state_from=state_from)


@pytest.fixture
def both():
    return build()


class TestRetNet(CacheAgreement):
    pass


def heads(peer, x, begin=0):
    """Queries, keys and values, turned from position ``begin`` on: ``[batch, head, time, channel]``."""
    q, k, v = peer.q_proj(x), peer.k_proj(x), peer.v_proj(x)
    q, k, v = (rearrange(z, "b t (h d) -> b t h d", h=HEADS) for z in (q, k, v))
    return (z.transpose(1, 2) for z in (*peer.rotary(q, k, seqlen_offset=begin), v))


def finish(peer, o, x):
    """The norm of heads ``[batch, time, head, channel]``, the gate and the output projection."""
    gate = rearrange(peer.g_proj(x), "b t (h d) -> b t h d", h=HEADS)
    return peer.o_proj(peer.g_norm_swish_gate(o, gate).flatten(2))


def official_step(peer, x, begin, state, scale):
    """``recurrent_forward``: what is read is divided by the root of ``scale``, the sum of what is kept."""
    (q, k, v), decay = heads(peer, x, begin), gammas(x.dtype)
    now = k.mT * KEY**-0.5 * v
    if state is None:
        state, scale = now, torch.ones_like(decay)
    else:
        before, scale = scale, scale * decay + 1
        root = scale.sqrt()[:, None, None]
        state = state * (before.sqrt() * decay)[:, None, None] / root + now / root
    return finish(peer, rearrange(q @ state, "b h t v -> b t h v"), x), state, scale


@PRECISIONS
@torch.no_grad()
def test_goes_on_from_the_official_state(dtype):
    """With nothing added under its root, the norm undoes the official divisor."""
    both, x = build(eps=1e-30).to(dtype), draw(40, dtype)
    state = scale = memory = None
    for time in range(40):
        with widened(dtype):
            theirs, state, scale = official_step(both.peer, x[:, time : time + 1], time, state, scale)
        if time >= 20:
            before = RetNetState(memory, torch.full((2,), time))
            assert error(both.ours(x[:, time : time + 1], before)[0], theirs) < TOLERANCE[dtype]
        memory = state * scale.sqrt()[:, None, None]


@torch.no_grad()
def test_the_official_parallel_form_divides_once_more():
    both, x = build(eps=1e-30), draw(100, torch.float64)
    with widened(x.dtype):
        q, k, v = heads(both.peer, x)
        gamma, order = gammas(x.dtype), torch.arange(100)
        mask = (gamma[:, None, None] ** (order[:, None] - order).clamp(min=0)).tril()
        scores = q @ k.mT * KEY**-0.5 * mask / mask.sum(-1, keepdim=True).sqrt()
        o = scores / scores.abs().sum(-1, keepdim=True).clamp(min=1, max=5e4) @ v
        theirs = finish(both.peer, o.transpose(1, 2), x)
    assert error(both.ours(x)[0], theirs) < 1e-10


def test_rounds_no_worse_in_bfloat16(both):
    assert_rounds_no_worse(both)
