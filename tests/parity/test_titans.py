"""Titans' memory against the paper's recurrence written out, each surprise autograd's gradient of the loss.

There is no official code, and titans-pytorch needs a dozen packages.
"""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from einops import rearrange
from peers import Agreement, assert_rounds_no_worse, error, pair
from torch import nn

from seqzoo.kernels.fast_weights import fast_weights
from seqzoo.layers import NeuralMemory, TitansMAC
from seqzoo.parts.persistent_attention import PersistentWindow

HEADS, SIZE, CHUNK, RATE = 2, 6, 8, 0.1


def mlp(z, weights):
    """``[batch head channel]`` through matrices ``[batch head input output]``."""
    for index, weight in enumerate(weights):
        z = F.gelu(z) if index else z
        z = torch.einsum("bhi,bhio->bho", z, weight)
    return z


def recur(q, k, v, theta, eta, alpha, initial, read, chunk):
    """Equations 9 and 10 token by token, with gradients at the weights from before the chunk (section 3.2)."""
    now = anchor = [w.expand(len(q), *w.shape) for w in initial]
    surprise, outputs = [torch.zeros_like(w) for w in now], []
    for t in range(q.shape[1]):
        if t % chunk == 0:
            anchor = now
        loss = (read(k[:, t], anchor) - v[:, t]).square().sum()
        gradients = torch.autograd.grad(loss, anchor, create_graph=True)
        theta_t, eta_t, alpha_t = (z[:, t, :, None, None] for z in (theta, eta, alpha))
        surprise = [eta_t * s - theta_t * g for s, g in zip(surprise, gradients, strict=True)]
        now = [(1 - alpha_t) * m + s for m, s in zip(now, surprise, strict=True)]
        outputs.append(read(q[:, t], now))
    return torch.stack(outputs, 1), now, surprise


class Written(nn.Module):
    """The layer, with a residual and a norm around the memory, and a loss that is a mean."""

    def __init__(self):
        super().__init__()
        width = HEADS * SIZE
        self.qkv = nn.Linear(32, 3 * width, bias=False)
        self.conv = nn.Conv1d(3 * width, 3 * width, 4, groups=3 * width, bias=False)
        self.theta, self.eta, self.alpha = (nn.Linear(32, HEADS) for _ in range(3))
        nn.init.constant_(
            self.alpha.bias, -5.0
        )  # a memory that forgets itself in a few tokens leaves noise to its norm
        self.first = nn.Parameter(torch.randn(HEADS, SIZE, 2 * SIZE) * SIZE**-0.5)
        self.second = nn.Parameter(torch.randn(HEADS, 2 * SIZE, SIZE) * SIZE**-0.5)
        self.scale, self.shift = nn.Parameter(torch.ones(HEADS, SIZE)), nn.Parameter(torch.zeros(HEADS, SIZE))
        self.norm = nn.Parameter(torch.ones(SIZE))
        self.gate, self.out = nn.Linear(32, width, bias=False), nn.Linear(width, 32, bias=False)

    def read(self, z, weights):
        return z + self.scale * F.layer_norm(mlp(z, weights), (SIZE,), eps=1e-5) + self.shift

    def forward(self, x):
        mixed = F.silu(self.conv(F.pad(self.qkv(x).mT, (3, 0))).mT)
        q, k, v = rearrange(mixed, "b t (three h d) -> three b t h d", three=3, h=HEADS)
        q, k = (z / (z.square().sum(-1, keepdim=True) + 1e-6).sqrt() for z in (q, k))
        theta, eta, alpha = (gate(x).sigmoid() for gate in (self.theta, self.eta, self.alpha))
        y, _, _ = recur(q, k, v, RATE * theta / SIZE, eta, alpha, [self.first, self.second], self.read, CHUNK)
        y = self.norm * y * (y.square().mean(-1, keepdim=True) + 1e-5).rsqrt()
        return self.out(y.flatten(2) * F.silu(self.gate(x)))


@pytest.fixture
def both():
    ours = NeuralMemory(32, num_heads=HEADS, head_dim=SIZE, chunk=CHUNK, learning_rate=RATE)
    names = {
        "heads.qkv.projection.weight": "qkv.weight",
        "heads.qkv.conv.weight": lambda theirs: theirs["conv.weight"][:, 0],
        "heads.weights.0": "first",
        "heads.weights.1": "second",
        "heads.norm_weight": "scale",
        "heads.norm_bias": "shift",
        "norm.weight": "norm",
        "gate.weight": "gate.weight",
        "out.weight": "out.weight",
    }
    for part in ("weight", "bias"):
        names[f"heads.gates.{part}"] = lambda theirs, part=part: torch.cat(
            [theirs[f"{name}.{part}"] for name in ("theta", "eta", "alpha")]
        )
    return pair(ours, Written(), names, lambda peer, x, cache: peer(x))


class TestNeuralMemory(Agreement):
    pass


def test_rounds_no_worse_in_bfloat16(both):
    assert_rounds_no_worse(both, time=40)


@pytest.mark.parametrize("chunk", [1, 8])
@pytest.mark.parametrize("depth", [1, 2, 3])
def test_the_papers_own_form(depth, chunk):
    """Without a norm, the loss a sum: outputs, weights, momentum and all gradients, the state's too."""

    def draw(*shape):
        return torch.randn(shape, dtype=torch.float64)

    widths = [SIZE, *[10] * (depth - 1), 5]
    inputs = [F.normalize(draw(2, 21, HEADS, SIZE), dim=-1) for _ in range(2)] + [draw(2, 21, HEADS, 5)]
    inputs += [0.1 * draw(2, 21, HEADS).sigmoid(), *(draw(2, 21, HEADS).sigmoid() for _ in range(2))]
    initial = [draw(HEADS, *size) / size[0] ** 0.5 for size in pairwise(widths)]
    leaves = [z.requires_grad_() for z in [*inputs, *initial]]
    *tokens, theta, eta, alpha = inputs
    y, now, surprise = recur(*tokens, theta, eta, alpha, initial, lambda z, weights: mlp(z, weights), chunk)
    settings = {"log_momentum": eta.log(), "log_keep": (1 - alpha).log(), "chunk": chunk, "gelu": "none"}
    ours, state = fast_weights(*tokens, 2 * theta, tuple(initial), **settings)
    weights = [a + change for a, change in zip(state.anchor, state.change, strict=True)]
    theirs, ours = [y, *now, *surprise], [ours, *weights, *(-s for s in state.momentum)]
    reading = [draw(*z.shape) for z in theirs]
    for mine, other in zip(
        [*ours, *torch.autograd.grad(ours, leaves, reading)],
        [*theirs, *torch.autograd.grad(theirs, leaves, reading)],
        strict=True,
    ):
        assert error(mine, other) < 1e-10


def find(mixer, q, k, v, visible):
    """Softmax over all pairs, those that are not visible left out; persistent tokens always are."""
    more_k, more_v = mixer.key_value(mixer.persistent).unflatten(-1, (2, HEADS, -1)).unbind(1)
    k, v = (torch.cat([z.expand(len(q), *z.shape), w], 1) for z, w in ((more_k, k), (more_v, v)))
    logits = torch.einsum("bthd,bshd->bhts", q, k) / q.shape[-1] ** 0.5
    weights = logits.masked_fill(~F.pad(visible, (len(more_k), 0), value=True), -torch.inf).softmax(-1)
    return torch.einsum("bhts,bshd->bthd", weights, v).flatten(2)


@pytest.mark.parametrize("window", [1, 5, 30, 70, 150])
@pytest.mark.parametrize("backend", ["auto", "reference", "chunked", "native"])
def test_a_window_beside_persistent_tokens_written_out(window, backend):
    part = PersistentWindow(32, num_heads=HEADS, window=window, persistent=3, rope_base=None, backend=backend).double()
    nn.init.normal_(part.persistent)
    x, back = torch.randn(2, 141, 32).double(), torch.arange(141)[:, None] - torch.arange(141)
    q, k, v = part.query(x), *part.key_value(x).chunk(2, -1)
    expected = find(part, *(z.unflatten(-1, (HEADS, -1)) for z in (q, k, v)), (back >= 0) & (back < window))
    assert error(part(x)[0], expected) < 1e-12


def test_memory_as_a_context_written_out():
    """Segment by segment, with the memory's weights after each token by autograd's gradients."""
    mixer = TitansMAC(12, num_heads=HEADS, segment=CHUNK, learning_rate=RATE, conv_size=None, rope_base=None).double()
    nn.init.normal_(mixer.attention.persistent)
    heads, near, x = mixer.memory, mixer.attention, torch.randn(2, 21, 12).double()

    def read(z, weights):
        return z + heads.norm_weight * F.layer_norm(mlp(z, weights), (SIZE,), eps=1e-5) + heads.norm_bias

    def unit(z):
        z = F.silu(z).unflatten(-1, (HEADS, -1))
        return z / (z.square().sum(-1, keepdim=True) + 1e-6).sqrt()

    def rms(z):
        return z * (z.square().mean(-1, keepdim=True) + 1e-5).rsqrt()

    now = [w.expand(2, *w.shape) for w in heads.weights]
    surprise, outputs = [torch.zeros_like(w) for w in now], []
    for segment in x.split(CHUNK, 1):
        anchor, time = now, segment.shape[1]
        recalled = torch.stack([read(r, anchor) for r in unit(mixer.recall(segment)).unbind(1)], 1).flatten(2)
        k, v = near.key_value(torch.cat([recalled, segment], 1)).unflatten(-1, (2, HEADS, -1)).unbind(2)
        seen = torch.ones(time, time).tril().bool().repeat(1, 2)
        a = find(near, near.query(segment).unflatten(-1, (HEADS, -1)), k, v, seen).detach()  # it knows the anchor, too
        q, k, v = heads.qkv.projection(a).chunk(3, -1)
        q, k, v = unit(q), unit(k), F.silu(v).unflatten(-1, (HEADS, -1))
        gates = heads.gates(a).sigmoid()[..., None, None].split(HEADS, 2)
        for t in range(time):
            theta, eta, alpha = (gate[:, t] for gate in gates)
            loss = (read(k[:, t], anchor) - v[:, t]).square().mean(-1).sum()
            gradients = torch.autograd.grad(loss, anchor, retain_graph=True)
            surprise = [eta * s - RATE * theta * g for s, g in zip(surprise, gradients, strict=True)]
            now = [(1 - alpha) * m + s for m, s in zip(now, surprise, strict=True)]
            outputs.append(rms(a[:, t]) * F.silu(rms(read(q[:, t], now).flatten(1))))
    assert error(mixer(x)[0], mixer.out(torch.stack(outputs, 1))) < 1e-10
