"""MinGRU against minGRU_pytorch: its steps, which are exact, and its parallel form, which passes through logarithms."""

from __future__ import annotations

import pytest
import torch
from peers import PRECISIONS, TIMES, assert_agree, assert_rounds_no_worse, draw, pair, run_ours, run_peer

from seqzoo.layers import MinGRU
from seqzoo.layers.min_gru import MinGRUState

peers = pytest.importorskip("minGRU_pytorch")

NAMES = {"projection.weight": "to_hidden_and_gate.weight", "out.weight": "to_out.weight"}


def step_by_step(peer, x, cache):
    outputs, hidden = [], cache
    for token in x.split(1, 1):
        y, hidden = peer(token, hidden, return_next_prev_hidden=True)
        outputs.append(y)
    return torch.cat(outputs, 1)


@pytest.fixture
def both():
    return pair(MinGRU(32, expand=2), peers.minGRU(32, expansion_factor=2.0), NAMES, step_by_step)


@PRECISIONS
@TIMES
def test_values_and_gradients(both, dtype, time):
    both, x = both.to(dtype), draw(time, dtype)
    assert_agree(run_ours(both, x), run_peer(both, x), dtype)


@PRECISIONS
@pytest.mark.parametrize("cut", [1, 37, 99])
def test_gradients_through_the_state(both, dtype, cut):
    both, x = both.to(dtype), draw(100, dtype)
    assert_agree(run_ours(both, x, cut), run_peer(both, x), dtype)


@pytest.mark.parametrize("time", [1, 37, 100])
@torch.no_grad()
def test_goes_on_from_the_peers_state(both, time):
    x, more = draw(37, torch.float64), draw(time, torch.float64, seed=1)
    _, hidden = both.peer(x, return_next_prev_hidden=True)
    theirs, last = both.peer(more, hidden, return_next_prev_hidden=True)
    y, state = both.ours(more, MinGRUState(hidden.squeeze(1)))
    # Logarithms of a sum over many tokens: what the peer loses there, it loses in float64 as well.
    torch.testing.assert_close(y, theirs, rtol=1e-8, atol=1e-8)
    torch.testing.assert_close(state.memory, last.squeeze(1), rtol=1e-8, atol=1e-8)


def test_the_parallel_form_has_the_same_values_and_gradients(both):
    parallel, x = both._replace(run=lambda peer, x, cache: peer(x)), draw(100, torch.float64)
    ours, theirs = run_ours(both, x), run_peer(parallel, x)
    for name, tensor in ours.items():
        assert (tensor - theirs[name]).norm() < 1e-8 * tensor.norm(), name


def test_rounds_no_worse_in_bfloat16(both):
    assert_rounds_no_worse(both)


@pytest.mark.parametrize("positive", [True, False])
def test_the_papers_equations(positive):
    """With the biases of the authors' code (BorealisAI/minRNNs), which is no package."""
    torch.manual_seed(0)
    layer, x = MinGRU(32, positive=positive, use_bias=True).double(), draw(37, torch.float64)
    u, k = layer.projection(x).chunk(2, -1)
    candidate = torch.where(u >= 0, u + 0.5, u.sigmoid()) if positive else u
    h, outputs = torch.zeros_like(u[:, 0]), []
    for t in range(37):
        z = k[:, t].sigmoid()
        h = (1 - z) * h + z * candidate[:, t]
        outputs.append(layer.out(h))
    torch.testing.assert_close(layer(x)[0], torch.stack(outputs, 1), rtol=1e-10, atol=1e-10)
    assert all(linear.bias is not None for linear in (layer.projection, layer.out))
