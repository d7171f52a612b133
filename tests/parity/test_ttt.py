"""TTT's layers against their rule written out: each step is autograd's gradient of the loss; fla's, where it agrees.

The official package is not on PyPI. fla's operator has another rule: rates go with the token that reads, which shows
unless all are the same, and what it adds to the norm is what was read, not the query. So its weights are compared.
"""

from __future__ import annotations

from functools import partial
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from einops import rearrange
from peers import PRECISIONS, Agreement, assert_agree, assert_rounds_no_worse, draw, error, pair, widened
from torch import nn

from seqzoo.kernels.fast_weights import fast_weights
from seqzoo.layers import TTTMLP, TTTLinear

HEADS, SIZE, BATCH = 2, 8, 16


class Official(nn.Module):
    """The authors' ``TTTBase``: their names and shapes, their equations token by token.

    ``token_idx`` is the sum of their buffer of that name and of what they learn to add to it.
    """

    def __init__(self, hidden, base_rate):
        super().__init__()
        self.base_rate = base_rate
        for name in "qkvg":
            setattr(self, f"{name}_proj", nn.Linear(32, HEADS * SIZE, bias=False))
        self.o_proj = nn.Linear(HEADS * SIZE, 32, bias=False)
        self.post_norm = nn.LayerNorm(HEADS * SIZE, eps=1e-6)
        self.learnable_ttt_lr_weight = nn.Parameter(torch.randn(HEADS, 32, 1))
        self.learnable_ttt_lr_bias = nn.Parameter(torch.randn(HEADS, 1))
        self.token_idx = nn.Parameter(1 / torch.arange(1, BATCH + 1))
        widths = [SIZE, *hidden, SIZE]
        for index, (rows, columns) in enumerate(pairwise(widths), 1):
            self.register_parameter(f"W{index}", nn.Parameter(torch.randn(HEADS, rows, columns) * rows**-0.5))
            self.register_parameter(f"b{index}", nn.Parameter(torch.randn(HEADS, 1, columns)))
        self.ttt_norm_weight = nn.Parameter(torch.ones(HEADS, SIZE))
        self.ttt_norm_bias = nn.Parameter(torch.zeros(HEADS, SIZE))
        self.depth = len(widths) - 1

    def inner(self, z, weights):
        """The network and its norm: ``[batch head channel]``."""
        z = z[:, :, None]
        for index in range(self.depth):
            z = F.gelu(z, approximate="tanh") if index else z
            z = z @ weights[2 * index] + weights[2 * index + 1]
        unit = (z - z.mean(-1, keepdim=True)) / torch.sqrt(z.var(-1, correction=0, keepdim=True) + 1e-6)
        return self.ttt_norm_weight * unit[:, :, 0] + self.ttt_norm_bias

    def turned(self, z):
        """Rotary positions within a mini-batch, on neighbouring channels."""
        place = torch.arange(z.shape[1]) % BATCH
        angle = place[:, None, None] / 10_000 ** (torch.arange(0, SIZE, 2, dtype=torch.float64) / SIZE)
        pairs = torch.view_as_complex(z.double().unflatten(-1, (-1, 2)).contiguous())
        return torch.view_as_real(pairs * torch.polar(torch.ones_like(angle), angle)).flatten(-2).to(z.dtype)

    def read(self, x):
        """Outputs, and the weights and biases after the last token."""
        q, k, v = (
            rearrange(project(x), "b t (h d) -> b t h d", h=HEADS)
            for project in (self.q_proj, self.k_proj, self.v_proj)
        )
        q, k = self.turned(q), self.turned(k)
        rates = torch.einsum("btc,hco->bth", x, self.learnable_ttt_lr_weight) + self.learnable_ttt_lr_bias[:, 0]
        rates = self.base_rate * rates.sigmoid() / SIZE
        weights = [getattr(self, f"{name}{i}") for i in range(1, self.depth + 1) for name in "Wb"]
        weights = now = [w.expand(len(x), *w.shape) for w in weights]
        outputs = []
        for t in range(x.shape[1]):
            place = t % BATCH
            if place == 0:
                weights, steps = now, [torch.zeros_like(w) for w in now]
            loss = (self.inner(k[:, t], weights) - (v[:, t] - k[:, t])).square().sum() / 2
            gradients = torch.autograd.grad(loss, weights, create_graph=True)
            steps = [s + rates[:, t, :, None, None] * g for s, g in zip(steps, gradients, strict=True)]
            token = self.token_idx[place].clamp(min=0)
            now = [w - token * s for w, s in zip(weights, steps, strict=True)]
            outputs.append(q[:, t] + self.inner(q[:, t], now))
        y = self.post_norm(torch.stack(outputs, 1).flatten(2))
        return self.o_proj(F.gelu(self.g_proj(x), approximate="tanh") * y), now

    def forward(self, x):
        return self.read(x)[0]


def build(layer):
    """Both layers, with 8 channels a head, and hidden layers of 16."""
    torch.manual_seed(1)  # with 0 the first token's gradient of its reach happens to be a hundredth of its terms
    expand, base_rate = (1, 1.5) if layer is TTTLinear else (2, 0.5)
    settings = {} if layer is TTTLinear else {"expand": expand}
    ours = layer(32, num_heads=HEADS, head_dim=SIZE, learning_rate=base_rate, use_gate=True, **settings)
    peer = Official([] if layer is TTTLinear else [expand * SIZE], base_rate)
    names = {
        "heads.qkv.weight": lambda theirs: torch.cat([theirs[f"{name}_proj.weight"] for name in "qkv"]),
        "heads.rate.weight": lambda theirs: theirs["learnable_ttt_lr_weight"][..., 0],
        "heads.rate.bias": lambda theirs: theirs["learnable_ttt_lr_bias"][..., 0],
        "heads.reach": "token_idx",
        "heads.norm_weight": "ttt_norm_weight",
        "heads.norm_bias": "ttt_norm_bias",
        "norm.weight": "post_norm.weight",
        "norm.bias": "post_norm.bias",
        "gate.weight": "g_proj.weight",
        "out.weight": "o_proj.weight",
    }
    for index in range(peer.depth):
        names[f"heads.weights.{index}"] = f"W{index + 1}"
        names[f"heads.biases.{index}"] = partial(lambda theirs, name: theirs[name][:, 0], name=f"b{index + 1}")
    return pair(ours, peer, names, lambda peer, x, cache: peer(x))


@pytest.fixture(params=[TTTLinear, TTTMLP], ids=lambda layer: layer.__name__)
def both(request):
    return build(request.param)


class TestTTT(Agreement):
    pass


@PRECISIONS
@pytest.mark.parametrize("time", [5, 16, 40])
def test_weights_are_the_same(both, dtype, time):
    both, x = both.to(dtype), draw(time, dtype)
    _, state = both.ours(x)
    _, theirs = both.peer.read(x)
    for index in range(both.peer.depth):
        expected = torch.cat(theirs[2 * index : 2 * index + 2], 2)
        place = time % BATCH
        reach = both.peer.token_idx[place - 1].clamp(min=0) if place else 1
        now = state.anchor[index] + reach * state.change[index]
        assert_agree({"weights": now}, {"weights": expected}, dtype)


def test_rounds_no_worse_in_bfloat16(both):
    assert_rounds_no_worse(both, time=40)


@PRECISIONS
@torch.no_grad()
def test_flas_weights_are_the_same_where_all_rates_are(dtype):
    naive = pytest.importorskip("fla.ops.ttt.naive")
    q, k, v = (torch.randn(2, 48, HEADS, SIZE, dtype=dtype) for _ in range(3))
    weight = torch.randn(HEADS, SIZE + 1, SIZE, dtype=dtype)
    scale, bias = (torch.randn(HEADS, SIZE, dtype=dtype) for _ in range(2))
    initial = weight.expand(2, -1, -1, -1)
    with widened(dtype):
        _, matrix, offset = naive.chunk_ttt_linear_ref(
            q.clone(), k, v, scale, bias, 0.1, initial_state=initial[:, :, :-1],
            initial_state_bias=initial[:, :, -1:], output_final_state=True,
        )  # fmt: skip
    rate = torch.full((2, 48, HEADS), 0.1, dtype=dtype)
    _, state = fast_weights(q, k, v, rate, (weight,), scale, bias)
    assert error(state.anchor[0], torch.cat([matrix, offset], 2)) < (1e-10 if dtype == torch.float64 else 1e-5)
