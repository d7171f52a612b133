"""Gated norms: every implementation is the equation, with gradients, in any layout and dtype."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F

from seqzoo.kernels import native
from seqzoo.kernels.gated_norm import IMPLEMENTATIONS, gated_norm

# Channels, groups, and how many of the learned numbers there are: for all channels or those of one group.
SIZES = {"one group": (37, 1, 37), "shared": (96, 6, 16), "each its own": (64, 4, 64), "ragged": (3 * 21, 3, 21)}
KINDS = {
    f"{'layer' if centered else 'rms'}, {gate}": {"centered": centered, "gate": gate}
    for centered, gate in itertools.product([False, True], ["no gate", "silu", "sigmoid", "silu first"])
}
LEARNED = {"nothing learned": (), "weight": ("weight",), "weight and bias": ("weight", "bias")}

sizes = pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
kinds = pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
learned = pytest.mark.parametrize("learned", LEARNED.values(), ids=LEARNED)
fused = pytest.mark.parametrize("backend", [name for name in IMPLEMENTATIONS if name != "reference"])


def example(sizes, kind, learned, dtype=torch.float64, tokens=(2, 20), seed=0):
    random = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(shape, generator=random, dtype=torch.float64).bfloat16().to(dtype)

    channels, groups, numbers = sizes
    # Tokens lie apart, as slices of a wider projection do.
    inputs = {"x": draw(*tokens, 2 * channels)[..., channels:]}
    settings = {"groups": groups, "centered": kind["centered"], "eps": 1e-3, "scale": 0.7}
    if kind["gate"] != "no gate":
        inputs["gate"] = draw(*tokens, 3 * channels)[..., channels : 2 * channels]
        settings |= {"activation": kind["gate"].split()[0], "gate_first": kind["gate"].endswith("first")}
    return inputs | {name: draw(numbers) for name in learned}, settings


def differentiate(inputs, settings, backend):
    inputs = {name: x.detach().requires_grad_() for name, x in inputs.items()}
    y = gated_norm(**inputs, **settings, backend=backend)
    weight = torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).bfloat16().to(y.dtype)
    return {"y": y.detach()} | dict(zip(inputs, torch.autograd.grad(y, list(inputs.values()), weight), strict=True))


def written_out(x, gate=None, weight=None, bias=None, *, groups, centered, eps, scale, activation="", gate_first=False):
    factor = 1 if gate is None else {"silu": gate * gate.sigmoid(), "sigmoid": gate.sigmoid()}[activation]
    u = (x * factor if gate_first else x).unflatten(-1, (groups, -1))
    c = u.mean(-1, keepdim=True) if centered else 0
    n = scale * (u - c) / ((u - c).square().mean(-1, keepdim=True) + eps).sqrt()
    repeat = 1 if weight is None else x.shape[-1] // len(weight)
    z = n.flatten(-2) * (1 if weight is None else weight.repeat(repeat))
    z = z if bias is None else z + bias.repeat(repeat)
    return z if gate_first else z * factor


@sizes
@kinds
@learned
@pytest.mark.parametrize("backend", IMPLEMENTATIONS)
def test_is_the_equation(backend, sizes, kind, learned):
    inputs, settings = example(sizes, kind, learned)
    ours = differentiate(inputs, settings, backend)
    inputs = {name: x.detach().requires_grad_() for name, x in inputs.items()}
    y = written_out(**inputs, **settings)
    weight = torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).bfloat16().to(y.dtype)
    expected = {"y": y} | dict(zip(inputs, torch.autograd.grad(y, list(inputs.values()), weight), strict=True))
    for name, tensor in expected.items():
        torch.testing.assert_close(ours[name], tensor, rtol=1e-10, atol=1e-10, msg=lambda text, name=name: name + text)


def relative_errors(inputs, settings, backend):
    """Of outputs and gradients: those of ``backend``, and those of plain PyTorch; truth is the equation in float64."""
    exact = differentiate({name: x.double() for name, x in inputs.items()}, settings, "reference")
    sides = [differentiate(inputs, settings, name) for name in (backend, "reference")]
    assert all(tensor.dtype == inputs["x"].dtype for tensor in sides[0].values())
    return {name: [(side[name] - truth).norm() / truth.norm() for side in sides] for name, truth in exact.items()}


@fused
@kinds
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_rounds_no_worse_than_plain_pytorch(kind, dtype, backend):
    # Errors are averaged over examples. Triton's interpreter takes a hundredth of a second for each token.
    tokens = (2, 40) if backend == "triton" else (4, 300)
    examples = [example(SIZES["shared"], kind, ("weight", "bias"), dtype, tokens, seed) for seed in range(3)]
    errors = [relative_errors(*each, backend) for each in examples]
    for name in errors[0]:
        ours, plain = torch.tensor([each[name] for each in errors]).square().mean(0).sqrt()
        assert ours <= max(2 * plain, 3 * torch.finfo(torch.float32).eps), name


@fused
@pytest.mark.parametrize("tokens", [(1,), (0, 5), (1, 1), (3, 700)], ids=str)
def test_any_number_of_tokens(tokens, backend):
    inputs, settings = example(SIZES["shared"], KINDS["rms, silu"], ("weight",), tokens=tokens)
    ours, plain = (differentiate(inputs, settings, backend) for backend in (backend, "reference"))
    for name in plain:
        torch.testing.assert_close(ours[name], plain[name], rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("name", SIZES)
def test_programs_walk_through_several_tiles(name, monkeypatch):
    kernels = pytest.importorskip("seqzoo.kernels.gated_norm.triton_kernels")
    monkeypatch.setattr(kernels, "PROGRAMS", 3)
    monkeypatch.setattr(kernels, "NUMBERS", 64)
    inputs, settings = example(SIZES[name], KINDS["layer, silu"], ("weight", "bias"), tokens=(2, 9))
    ours, plain = (differentiate(inputs, settings, backend) for backend in ("triton", "reference"))
    for name in plain:
        torch.testing.assert_close(ours[name], plain[name], rtol=1e-10, atol=1e-10)


@fused
@pytest.mark.parametrize("centered", [False, True])
@pytest.mark.parametrize("scale", [0.0, 1e-15, 1e4, 1e15])
def test_finite_where_gates_saturate(scale, centered, backend):
    inputs, settings = example(SIZES["shared"], KINDS["rms, silu"], ("weight",), torch.float32)
    inputs |= {"x": inputs["x"] * scale, "gate": inputs["gate"] * 1e4}
    for name, tensor in differentiate(inputs, settings | {"centered": centered}, backend).items():
        assert tensor.isfinite().all(), name


@fused
@kinds
def test_is_an_operator_of_torch(kind, backend):
    inputs, settings = example(SIZES["shared"], kind, ("weight", "bias"), torch.float32, tokens=(2, 3))
    inputs = {name: x.requires_grad_() for name, x in inputs.items()}
    torch._dynamo.reset()
    compiled = torch.compile(gated_norm, fullgraph=True, backend="aot_eager")
    settings |= {"backend": backend}
    torch.testing.assert_close(compiled(**inputs, **settings), gated_norm(**inputs, **settings))
    activation = settings.get("activation", "silu")
    code = 0 if "gate" not in inputs else {"silu": 1, "sigmoid": 2}[activation]
    first = settings.get("gate_first", False)
    arguments = [inputs.get(name) for name in ("x", "gate", "weight", "bias")]
    arguments += [settings["groups"], settings["eps"], settings["scale"], settings["centered"]]
    arguments += [code if backend == "native" else activation, first]
    operator = getattr(torch.ops.seqzoo, f"gated_norm_{backend}").default
    torch.library.opcheck(operator, tuple(arguments))


def test_one_answer_in_mixed_precision():
    x, gate = torch.randn(3, 8), torch.randn(3, 8).bfloat16()
    torch.testing.assert_close(gated_norm(x, gate), F.rms_norm(x, (8,), eps=1e-5) * F.silu(gate.float()))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"groups": 3}, "groups=3 does not divide the 8 channels"),
        ({"x": torch.ones(2, 0)}, r"x has shape \(2, 0\); expected \[..., channel\]"),
        ({"activation": "relu"}, "activation='relu'; use silu or sigmoid"),
        ({"activation": None}, "activation=None; use silu or sigmoid"),
        ({"gate": torch.ones(2, 4)}, r"gate has shape \(2, 4\); expected that of x, \(2, 8\)"),
        ({"weight": torch.ones(3)}, r"weight has shape \(3,\); expected \(8,\) or \(8,\)"),
        ({"bias": torch.ones(8).long()}, "bias is torch.int64"),
        ({"x": torch.ones(())}, r"x has shape \(\); expected \[..., channel\]"),
        ({"x": None}, "x is None; expected a tensor"),
        ({"eps": 0.0}, "eps=0.0; expected a finite number above 0"),
        ({"backend": "magic"}, "backend='magic' cannot run gated_norm: there is no such backend; use auto, reference"),
    ],
)
def test_refuses_what_does_not_fit(settings, message, unchecked):
    with pytest.raises(ValueError, match=message):
        gated_norm(**{"x": torch.ones(2, 8)} | settings)


def test_refuses_native_where_it_cannot_run(monkeypatch):
    monkeypatch.setattr(native, "reason", lambda: "no compiler was found")
    with pytest.raises(ValueError, match="cannot run gated_norm: no compiler was found; use auto, reference"):
        gated_norm(torch.ones(2, 8), backend="native")
