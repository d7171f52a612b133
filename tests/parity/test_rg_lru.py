"""RGLRU against transformers' RecurrentGemmaRecurrentBlock, which computes what Griffin's official code does."""

from __future__ import annotations

import functools

import pytest
import torch
from peers import PRECISIONS, Agreement, assert_agree, assert_rounds_no_worse, draw, modeling, pair

from seqzoo import clone_state
from seqzoo.layers import RGLRU
from seqzoo.layers.rg_lru import RGLRUState

hf = modeling("recurrent_gemma")

HEADS = 2
NAMES = {
    "projection.weight": lambda theirs: torch.cat([theirs["linear_x.weight"], theirs["linear_y.weight"]]),
    "projection.bias": lambda theirs: torch.cat([theirs["linear_x.bias"], theirs["linear_y.bias"]]),
    "conv.weight": lambda theirs: theirs["conv_1d.weight"].squeeze(1),
    "conv.bias": "conv_1d.bias",
    "input_gate.weight": "rg_lru.input_gate_weight",
    "input_bias": lambda theirs: theirs["rg_lru.input_gate_bias"].flatten(),
    "decay_gate.weight": "rg_lru.recurrent_gate_weight",
    "decay_bias": lambda theirs: theirs["rg_lru.recurrent_gate_bias"].flatten(),
    "decay_rate": "rg_lru.recurrent_param",
    "out.weight": "linear_out.weight",
    "out.bias": "linear_out.bias",
}


def call(peer, x, cache):
    """The whole block; ``cache`` is the position of the first token where the peer's own state goes on, else None."""
    lru = peer.rg_lru
    wide = torch.promote_types(x.dtype, torch.float32)  # its default was bound to float32 when it was imported
    lru._rnn_scan = functools.partial(type(lru)._rnn_scan, lru, acc_dtype=wide)
    positions = torch.arange(x.shape[1]) + (cache or 0)
    y, _ = peer(x, positions.expand(len(x), -1), None, use_cache=cache is not None)
    return y


def build(conv_size=4):
    config = hf.RecurrentGemmaConfig(
        hidden_size=32, num_attention_heads=HEADS, conv1d_width=conv_size, num_hidden_layers=1
    )
    peer = hf.RecurrentGemmaRecurrentBlock(config, layer_idx=0)
    generator = torch.Generator().manual_seed(0)
    for parameter in peer.parameters():
        torch.nn.init.normal_(parameter, std=0.3, generator=generator)
    return pair(RGLRU(32, num_heads=HEADS, conv_size=conv_size), peer, NAMES, call)


@pytest.fixture
def both():
    return build()


class TestRGLRU(Agreement):
    pass


@PRECISIONS
@pytest.mark.parametrize("first", [5, 37])
@torch.no_grad()
def test_goes_on_from_the_peers_state(both, dtype, first):
    """The peer keeps its state to itself, and goes on from it one token at a time only."""
    both, state, position = both.to(dtype), None, 0
    for time in (first, 1, 1, 1):
        x = draw(time, dtype, seed=time)
        theirs = both.call_peer(x, position)
        y, state = both.ours(x, state)
        expected = clone_state(RGLRUState(both.peer.rg_lru.recurrent_states, both.peer.conv1d_state.mT))
        assert_agree({"y": y, **state._asdict()}, {"y": theirs, **expected._asdict()}, dtype)
        state, position = expected, position + time


@torch.no_grad()
def test_a_document_starts_like_a_sequence():
    """At position 0 the peer drops the state and lets the input in whole; its convolution sees over it."""
    both, x = build(conv_size=1), draw(100, torch.float64)
    starts = torch.zeros(2, 100, dtype=torch.bool)
    starts[0, [0, 30, 31]] = starts[1, [64]] = True
    begin = torch.where(starts, torch.arange(100), 0).cummax(1).values
    call(both.peer, x, None)  # sets the precision of its scan
    theirs, _ = both.peer(x, torch.arange(100) - begin, None, use_cache=False)
    ours, _ = both.ours(x, None, starts)
    torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10)


def test_rounds_no_worse_in_bfloat16(both):
    assert_rounds_no_worse(both)
