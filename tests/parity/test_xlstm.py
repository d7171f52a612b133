"""MLSTM and SLSTM against the layers of the xlstm package."""

from __future__ import annotations

import math
import sys

import pytest
import torch
from peers import CacheAgreement, assert_rounds_no_worse, draw, error, modeling, pair

from seqzoo.layers import MLSTM, SLSTM
from seqzoo.layers.mlstm import MLSTMState
from seqzoo.layers.slstm import SLSTMState

large = pytest.importorskip("xlstm.xlstm_large.model")
blocks = pytest.importorskip("xlstm.blocks.slstm.layer")

HEADS, TAPS = 2, 4
MLSTM_NAMES = {
    "projection.weight": lambda theirs: torch.cat(
        [theirs[f"{name}.weight"] for name in ("q", "k", "v", "ogate_preact")]
    ),
    "gates.weight": lambda theirs: torch.cat([theirs["igate_preact.weight"], theirs["fgate_preact.weight"]]),
    "gates.bias": lambda theirs: torch.cat([theirs["igate_preact.bias"], theirs["fgate_preact.bias"]]),
    "norm.weight": lambda theirs: theirs["multihead_norm.weight"].flatten(),
    "out.weight": "out_proj.weight",
}
# What the official layer calls its forget gate drives the cell's input gate, and the other way round.
SLSTM_NAMES = {
    "conv.weight": lambda theirs: theirs["conv1d.conv.weight"].squeeze(1),
    "conv.bias": "conv1d.conv.bias",
    "gates": lambda theirs: torch.stack([theirs[f"{name}gate.weight"].mT for name in "fizo"]),
    "recurrent": lambda theirs: theirs["slstm_cell._recurrent_kernel_"].mT,
    "bias": "slstm_cell._bias_",
    "norm.weight": "group_norm.weight",
}


def build_mlstm(eps=0.0):
    """Without what the official code adds to denominators: outputs would depend on the stabilizer."""
    config = large.mLSTMLayerConfig(embedding_dim=32, num_heads=HEADS, norm_eps=1e-2)
    peer = large.mLSTMLayer(config)
    # At the start of training nothing would be written; where much is, the normalizer takes all of a first query.
    torch.nn.init.uniform_(peer.igate_preact.bias, -2, 0)
    ours = MLSTM(32, num_heads=HEADS, norm_eps=config.norm_eps)

    def run(peer, x, cache):
        # It binds the type of its states, by name, where it is made; what it fills a chunk up with decays a little.
        name, chunk = str(x.dtype).removeprefix("torch."), math.gcd(x.shape[1], 16)
        backend = large.mLSTMBackendConfig(mode="inference", chunk_size=chunk, eps=eps, inference_state_dtype=name)
        peer.mlstm_backend = large.mLSTMBackend(backend)
        y, last = peer(x, cache or None)
        if cache is not None:
            cache[:] = last
        return y

    def state_from(cache, state):
        memory, normalizer, stabilizer = cache
        return MLSTMState(memory.clone(), normalizer.clone(), stabilizer.reshape(2, HEADS).clone())

    return pair(ours, peer, MLSTM_NAMES, run, new_cache=list, state_from=state_from)


def build_slstm():
    config = blocks.sLSTMLayerConfig(embedding_dim=32, num_heads=HEADS, backend="vanilla", batch_size=2)
    peer = blocks.sLSTMLayer(config)
    peer.reset_parameters()
    # Its norm's weights are what is added to one.
    peer.group_norm.residual_weight = False
    torch.nn.init.ones_(peer.group_norm.weight)

    def run(peer, x, cache):
        if cache is None:
            return peer(x)
        y, last = peer(x, *(cache or [None, None]), return_last_state=True)
        # Its convolution leaves as many inputs as it saw; zeros stand for those before.
        conv = last["conv_state"]
        cache[:] = torch.nn.functional.pad(conv, (0, 0, TAPS - 1 - conv.shape[1], 0)), last["slstm_state"]
        return y

    def state_from(cache, state):
        conv, states = cache
        return SLSTMState(*states.clone().unbind(), conv.clone())

    return pair(SLSTM(32, num_heads=HEADS), peer, SLSTM_NAMES, run, new_cache=list, state_from=state_from)


@pytest.fixture(params=[build_mlstm, build_slstm], ids=["MLSTM", "SLSTM"])
def both(request):
    return request.param()


class TestXLSTM(CacheAgreement):
    pass


def test_slstm_rounds_no_worse_in_bfloat16():
    assert_rounds_no_worse(build_slstm())


def test_mlstm_rounds_no_worse_in_bfloat16(monkeypatch):
    """Than transformers' layer, token by token: chunks of bfloat16 fail there and in the package alike."""
    monkeypatch.setitem(sys.modules, "xlstm", None)  # else transformers' file has that one's layer
    hf = modeling("xlstm")
    sizes = {"hidden_size": 32, "num_heads": HEADS, "num_hidden_layers": 1, "norm_eps": 1e-2}
    config = hf.xLSTMConfig(**sizes, eps=0.0, chunk_size=128)

    def run(peer, x, cache):
        peer.mlstm_backend = hf.xLSTMBackend(config)  # it binds dtypes where it is made
        return peer(x)[0]

    assert_rounds_no_worse(pair(MLSTM(32, num_heads=HEADS, norm_eps=1e-2), hf.xLSTMLayer(config), MLSTM_NAMES, run))


@torch.no_grad()
def test_the_official_epsilon_makes_outputs_depend_on_the_stabilizer():
    both, x = build_mlstm(eps=1e-6), draw(37, torch.float64)
    official, exact = both.call_peer(x), both.ours(x)[0]
    assert 1e-10 < (official - exact).norm() / exact.norm() < 1e-3


@pytest.mark.parametrize("index", [0, 1, 3])
def test_slstm_starts_like_the_peer(index):
    sizes = {"embedding_dim": 32, "num_heads": HEADS, "backend": "vanilla"}
    peer = blocks.sLSTMLayer(blocks.sLSTMLayerConfig(**sizes, _block_idx=index, _num_blocks=4))
    ours = SLSTM(32, num_heads=HEADS, layer_index=index, num_layers=4)
    torch.testing.assert_close(ours.bias, peer.slstm_cell._bias_, rtol=1e-5, atol=1e-5)
    assert not ours.recurrent.any() and not peer.slstm_cell._recurrent_kernel_.any()


@torch.no_grad()
def test_the_stabilizer_is_free():
    """A memory and a normalizer divided by another power of e are the same, to us and without the official epsilon."""
    x, past = draw(20, torch.float64), draw(20, torch.float64, seed=1)
    for eps in (0.0, 1e-6):
        both, cache = build_mlstm(eps), []
        both.call_peer(past, cache)
        memory, normalizer, stabilizer = cache
        states = [(memory, normalizer, stabilizer), (memory * math.e**-9, normalizer * math.e**-9, stabilizer + 9)]
        y, z = (both.call_peer(x, list(state)) for state in states)
        assert error(y, z) > 1e-6 if eps else error(y, z) < 1e-10
        y, z = (both.ours(x, MLSTMState(*state[:2], state[2].reshape(2, HEADS)))[0] for state in states)
        assert error(y, z) < 1e-10
