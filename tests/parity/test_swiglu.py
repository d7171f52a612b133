"""SwiGLU against transformers' LlamaMLP."""

from __future__ import annotations

import pytest
import torch
from peers import PRECISIONS, TIMES, assert_agree, assert_rounds_no_worse, draw, modeling, pair, run_ours, run_peer

from seqzoo.layers import SwiGLU

hf = modeling("llama")

NAMES = {
    "gate_up.weight": lambda theirs: torch.cat([theirs["gate_proj.weight"], theirs["up_proj.weight"]]),
    "out.weight": "down_proj.weight",
}


@pytest.fixture
def mlp():
    peer = hf.LlamaMLP(hf.LlamaConfig(hidden_size=32, intermediate_size=88))
    return pair(SwiGLU(32, hidden=88), peer, NAMES, lambda peer, x, cache: peer(x))


@PRECISIONS
@TIMES
def test_values_and_gradients(mlp, dtype, time):
    both, x = mlp.to(dtype), draw(time, dtype)
    assert_agree(run_ours(both, x), run_peer(both, x), dtype)


def test_rounds_no_worse_in_bfloat16(mlp):
    assert_rounds_no_worse(mlp)
