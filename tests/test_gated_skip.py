"""Gated skips: the native kernel is the equation, with gradients, in any layout and dtype."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from seqzoo.kernels import native
from seqzoo.kernels.gated_skip import gated_skip

KINDS = {"no gate": {}, "a gate": {"gate": True}, "silu": {"gate": True, "activation": "silu"}}
SIZES = {"one head": (37, 1), "heads": (96, 6), "a channel a head": (5, 5)}

kinds = pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
sizes = pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)


def example(sizes, kind, dtype=torch.float64, tokens=(2, 50), seed=0):
    random = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(shape, generator=random, dtype=torch.float64).bfloat16().to(dtype)

    channels, heads = sizes
    # Tokens lie apart, as slices of a wider projection do.
    inputs = {"x": draw(*tokens, channels), "skip": draw(*tokens, 2 * channels)[..., channels:]}
    if kind.get("gate"):
        inputs["gate"] = draw(*tokens, 3 * channels)[..., channels : 2 * channels]
    inputs["weight"] = draw(*tokens, heads).to(torch.promote_types(dtype, torch.float32))
    return inputs, {"activation": kind.get("activation")}


def with_gradients(inputs, y):
    weight = torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).bfloat16().to(y.dtype)
    return {"y": y.detach()} | dict(zip(inputs, torch.autograd.grad(y, list(inputs.values()), weight), strict=True))


def differentiate(inputs, settings, backend):
    inputs = {name: x.detach().requires_grad_() for name, x in inputs.items()}
    return with_gradients(inputs, gated_skip(**inputs, **settings, backend=backend))


def written_out(x, skip, weight, gate=None, *, activation):
    heads = weight.shape[-1]
    y = (x.unflatten(-1, (heads, -1)) + weight[..., None] * skip.unflatten(-1, (heads, -1))).flatten(-2)
    return y if gate is None else y * (gate * gate.sigmoid() if activation == "silu" else gate)


@sizes
@kinds
@pytest.mark.parametrize("backend", ["reference", "native"])
def test_is_the_equation(backend, kind, sizes):
    inputs, settings = example(sizes, kind)
    ours = differentiate(inputs, settings, backend)
    inputs = {name: x.detach().requires_grad_() for name, x in inputs.items()}
    for name, tensor in with_gradients(inputs, written_out(**inputs, **settings)).items():
        torch.testing.assert_close(ours[name], tensor, rtol=1e-10, atol=1e-10, msg=lambda text, n=name: f"{n}: {text}")


@kinds
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_rounds_no_worse_than_plain_pytorch(kind, dtype):
    inputs, settings = example(SIZES["heads"], kind, dtype, tokens=(4, 300))
    exact = differentiate({name: x.double() for name, x in inputs.items()}, settings, "reference")
    ours, plain = (differentiate(inputs, settings, backend) for backend in ("native", "reference"))
    for name, truth in exact.items():
        assert ours[name].dtype == plain[name].dtype
        error, allowed = ((side[name].double() - truth).norm() for side in (ours, plain))
        assert error <= max(2 * allowed, 3 * torch.finfo(torch.float32).eps * truth.norm()), name


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("tokens", [(1,), (0, 5), (1, 1), (3, 700)], ids=str)
def test_any_number_of_tokens(tokens, threads):
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        inputs, settings = example(SIZES["heads"], KINDS["silu"], tokens=tokens)
        ours, plain = (differentiate(inputs, settings, backend) for backend in ("native", "reference"))
        for name in plain:
            torch.testing.assert_close(ours[name], plain[name], rtol=1e-10, atol=1e-10)
    finally:
        torch.set_num_threads(before)


def test_finite_where_gates_saturate():
    inputs, settings = example(SIZES["heads"], KINDS["silu"], torch.float32)
    inputs["gate"] = inputs["gate"] * 1e4
    for name, tensor in differentiate(inputs, settings, "native").items():
        assert tensor.isfinite().all(), name


@kinds
def test_is_an_operator_of_torch(kind):
    inputs, settings = example(SIZES["heads"], kind, torch.float32)
    inputs = {name: x.detach().requires_grad_() for name, x in inputs.items()}
    compiled = torch.compile(gated_skip, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(**inputs, **settings), gated_skip(**inputs, **settings))
    arguments = (inputs["x"], inputs["skip"], inputs["weight"], inputs.get("gate"), settings["activation"] == "silu")
    torch.library.opcheck(torch.ops.seqzoo.gated_skip_native.default, arguments)


def test_one_answer_in_mixed_precision():
    x, skip, gate = torch.randn(3, 8), torch.randn(3, 8).bfloat16(), torch.randn(3, 8).bfloat16()
    y = gated_skip(x, skip, torch.full((3, 2), 0.5), gate, activation="silu")
    torch.testing.assert_close(y, (x + 0.5 * skip.float()) * F.silu(gate.float()))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"weight": torch.ones(2, 3)}, r"x \(2, 8\), weight \(2, 3\) do not fit together"),
        ({"weight": torch.ones(2)}, "do not fit together"),
        ({"skip": torch.ones(2, 4)}, r"skip has shape \(2, 4\); expected \(2, 8\)"),
        ({"gate": torch.ones(2, 4)}, r"gate has shape \(2, 4\); expected \(2, 8\)"),
        ({"gate": torch.ones(2, 8).long()}, "gate is torch.int64"),
        ({"activation": "relu"}, "activation='relu'; use silu or None"),
    ],
)
def test_refuses_what_does_not_fit(settings, message, unchecked):
    inputs = {"x": torch.ones(2, 8), "skip": torch.ones(2, 8), "weight": torch.ones(2, 4)}
    with pytest.raises(ValueError, match=message):
        gated_skip(**inputs | settings)


def test_refuses_native_where_it_cannot_run(monkeypatch):
    monkeypatch.setattr(native, "reason", lambda: "no compiler was found")
    with pytest.raises(ValueError, match="cannot run gated_skip: no compiler was found; use auto or reference"):
        gated_skip(torch.ones(2, 8), torch.ones(2, 8), torch.ones(2, 4), backend="native")
