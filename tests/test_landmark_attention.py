"""Landmark attention: chunks are the equation, and the equation is a softmax within groups."""

from __future__ import annotations

import pytest
import torch

from seqzoo.kernels.landmark_attention import explain, landmark_attention
from seqzoo.layers import Attention, LandmarkAttention

EXACT = {"rtol": 1e-10, "atol": 1e-10}
# Tokens, slots, query heads, key heads.
SIZES = {"one token": (1, 1, 2, 2), "decoding": (1, 40, 4, 2), "short": (30, 30, 2, 2), "goes on": (20, 47, 4, 1)}
SETTINGS = [{"block": 5}, {"block": 5, "top_k": 2}, {"block": 1, "top_k": 3}, {"block": 4, "top_k": 50, "scale": 0.3}]

sizes = pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
settings = pytest.mark.parametrize("settings", SETTINGS, ids=str)


def example(sizes, dtype=torch.float64, starts=0.0, seed=0):
    random = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(shape, generator=random, dtype=torch.float64).bfloat16().to(dtype)

    time, slots, heads, groups = sizes
    inputs = {"q": draw(2, time, heads, 6), "k": draw(2, slots, groups, 6), "v": draw(2, slots, groups, 5)}
    inputs["landmarks"] = draw(2, slots, groups, 6)
    begins = torch.rand(2, slots, generator=random) < starts
    slot = torch.arange(slots)
    return inputs | {"place": slot - torch.where(begins, slot, 0).cummax(1).values}


def differentiate(inputs, settings, backend):
    inputs = {name: x.detach().requires_grad_(x.is_floating_point()) for name, x in inputs.items()}
    o = landmark_attention(**inputs, **settings, backend=backend)
    weight = torch.randn(o.shape, generator=torch.Generator().manual_seed(1)).bfloat16().to(o.dtype)
    learned = {name: x for name, x in inputs.items() if x.requires_grad}
    gradients = torch.autograd.grad(o, list(learned.values()), weight, allow_unused=True, materialize_grads=True)
    return {"o": o.detach()} | dict(zip(learned, gradients, strict=True))


@settings
@sizes
@pytest.mark.parametrize("starts", [0.0, 0.07])
def test_chunks_equal_the_reference(sizes, settings, starts):
    inputs = example(sizes, starts=starts)
    ours, truth = (differentiate(inputs, settings, backend) for backend in ("chunked", "reference"))
    for name, expected in truth.items():
        torch.testing.assert_close(ours[name], expected, **EXACT, msg=lambda text, name=name: f"{name}: {text}")


def test_chunks_of_some_rows_are_the_whole(monkeypatch):
    inputs = example(SIZES["goes on"], starts=0.07)
    whole = differentiate(inputs, {"block": 5}, "chunked")
    monkeypatch.setattr("seqzoo.kernels.landmark_attention.chunked.ROOM", 3 * 2 * 4 * 47)
    for name, tensor in differentiate(inputs, {"block": 5}, "chunked").items():
        torch.testing.assert_close(tensor, whole[name], **EXACT)


@pytest.mark.parametrize("backend", ["reference", "chunked"])
def test_is_the_softmax_within_groups(backend):
    """The paper's form: a token's weight is its own within its block times that of the block's landmark."""
    block, inputs = 4, example((22, 22, 1, 1))
    q, k, v, marks = (inputs[name][:, :, 0] for name in ("q", "k", "v", "landmarks"))
    s, of_marks = (q @ z.mT * 6**-0.5 for z in (k, marks))
    number = torch.arange(22) // block
    rows = []
    for i in range(22):
        own = (number == number[i]) & (torch.arange(22) <= i)
        past = [block * b + block - 1 for b in range(int(number[i]))]
        group = torch.cat([s[:, i, own], of_marks[:, i, past]], 1).softmax(1)
        weights = torch.zeros(2, 22, dtype=torch.float64)
        weights[:, own] = group[:, : int(own.sum())]
        for b in range(int(number[i])):
            inside = number == b
            weights[:, inside] = s[:, i, inside].softmax(1) * group[:, int(own.sum()) + b, None]
        torch.testing.assert_close(weights.sum(1), torch.ones(2, dtype=torch.float64))
        rows.append((weights[..., None] * v).sum(1))
    o = landmark_attention(**inputs, block=block, backend=backend)
    torch.testing.assert_close(o[:, :, 0], torch.stack(rows, 1), **EXACT)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_rounds_no_worse_than_the_reference(dtype):
    inputs = example((90, 90, 4, 2), dtype)
    wide = {name: x.double() if x.is_floating_point() else x for name, x in inputs.items()}
    exact = differentiate(wide, {"block": 8}, "reference")
    ours, plain = (differentiate(inputs, {"block": 8}, backend) for backend in ("chunked", "reference"))
    for name, truth in exact.items():
        error, allowed = ((side[name].double() - truth).norm() / truth.norm() for side in (ours, plain))
        assert error <= max(2 * allowed, 3 * torch.finfo(torch.float32).eps), name


@pytest.mark.parametrize("scale", [0.0, 1e4])
def test_finite_at_hostile_inputs(scale):
    inputs = example((40, 40, 2, 2), torch.float32)
    inputs |= {name: inputs[name] * scale for name in ("q", "k", "landmarks")}
    for settings in SETTINGS:
        for name, tensor in differentiate(inputs, settings, "chunked").items():
            assert tensor.isfinite().all(), name


@torch.no_grad()
def test_as_many_blocks_as_there_are_is_all_of_them():
    mixer, x = LandmarkAttention(32, block_size=5).double(), torch.randn(2, 64, 32, dtype=torch.float64)
    everything, _ = mixer(x)
    for top_k, same in ((12, True), (2, False)):
        mixer.top_k = top_k
        assert torch.allclose(mixer(x)[0], everything, rtol=1e-10, atol=1e-12) == same


@torch.no_grad()
@pytest.mark.parametrize("sizes", [[1] * 40, [17, 1, 22]], ids=str)
def test_few_blocks_in_pieces_and_in_packed_documents(sizes):
    """The laws of tests/test_layers.py for a choice of blocks, which rounding in low precision may change."""
    mixer = LandmarkAttention(32, block_size=3, top_k=2).double()
    x, state, pieces = torch.randn(2, 40, 32, dtype=torch.float64), None, []
    starts = torch.zeros(2, 40, dtype=torch.bool)
    starts[:, 15] = True
    for piece, begins in zip(x.split(sizes, 1), starts.split(sizes, 1), strict=True):
        y, state = mixer(piece, state, begins)
        pieces.append(y)
    documents = [mixer(document)[0] for document in x.split([15, 25], 1)]
    torch.testing.assert_close(torch.cat(pieces, 1), torch.cat(documents, 1), **EXACT)


@torch.no_grad()
def test_within_one_block_it_is_attention():
    mixer, plain = LandmarkAttention(32, block_size=64).double(), Attention(32).double()
    plain.load_state_dict({name: x for name, x in mixer.state_dict().items() if "landmark" not in name})
    x = torch.randn(2, 64, 32, dtype=torch.float64)
    torch.testing.assert_close(mixer(x)[0], plain(x)[0], **EXACT)


def test_explains_what_auto_runs():
    for time in (1, 7):
        assert explain(time).splitlines()[0] == f"landmark_attention, {time} token(s) of float32 on cpu: chunked"


def bad(**changes):
    inputs = example((3, 5, 4, 2), torch.float32)
    return inputs | {name: change(inputs[name]) for name, change in changes.items()}


@pytest.mark.parametrize(
    ("inputs", "settings", "message"),
    [
        (bad(q=lambda x: x[0]), {}, "do not fit together"),
        (bad(q=lambda x: x[:, :, :3]), {}, "heads that are a multiple of groups"),
        (bad(landmarks=lambda x: x[:, 1:]), {}, r"landmarks has shape \(2, 4, 2, 6\); expected \(2, 5, 2, 6\)"),
        (bad(place=lambda x: x.int()), {}, "place is torch.int32"),
        (bad(k=lambda x: x.double()), {}, "k is torch.float64 on cpu; expected what q is, torch.float32"),
        (bad(), {"block": 0}, "block=0, top_k=None; expected 1 or more"),
        (bad(), {"top_k": 0}, "block=2, top_k=0; expected 1 or more"),
        (bad(place=lambda x: None), {}, "landmark_attention: place is None; expected a tensor"),
        (bad(), {"backend": "magic"}, "backend='magic' cannot run landmark_attention"),
    ],
)
def test_refuses_what_does_not_fit(inputs, settings, message, unchecked):
    with pytest.raises(ValueError, match=message):
        landmark_attention(**inputs, **{"block": 2} | settings)
