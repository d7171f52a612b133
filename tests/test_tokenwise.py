"""What layers do to single tokens: the native kernels are the equations, with gradients, in any layout and dtype."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from seqzoo.kernels import native
from seqzoo.kernels.erasing_keys import erasing_keys
from seqzoo.kernels.gated_output import gated_output
from seqzoo.kernels.gated_output.native import ACTIVATIONS
from seqzoo.kernels.recurrence_gates import recurrence_gates
from seqzoo.kernels.taylor_features import taylor_features, taylor_size

TOKENS = -1  # in a shape: where the axes of the tokens stand


@dataclass(frozen=True)
class Case:
    """A function, its inputs, and the equation once more.

    Args:
        function: the function.
        written_out: the same outputs from the same inputs, in plain PyTorch.
        narrow: widths of the inputs of each token, or shapes where tokens are not the first axes.
        wide: shapes of the inputs in float32 or better.
        settings: passed on to both.
        begins: whether there is a mark of tokens, ``begins``.
    """

    function: Callable[..., Any]
    written_out: Callable[..., Any]
    narrow: dict[str, int | tuple[int, ...]]
    wide: dict[str, tuple[int, ...]] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)
    begins: bool = False

    def example(self, dtype=torch.float64, tokens=(2, 50), seed=0):
        """Inputs that round to themselves in bfloat16; tokens lie apart, as slices of a wider projection do."""
        random = torch.Generator().manual_seed(seed)

        def draw(*shape):
            return torch.randn(shape, generator=random, dtype=torch.float64).bfloat16().to(torch.float64)

        def axes(shape):
            return [size for axis in shape for size in (tokens if axis == TOKENS else (axis,))]

        inputs = {}
        for name, shape in self.narrow.items():
            *first, width = axes((TOKENS, shape) if isinstance(shape, int) else shape)
            inputs[name] = draw(*first, 2 * width)[..., width:].to(dtype)
        for name, shape in self.wide.items():
            inputs[name] = draw(*axes(shape)).to(torch.promote_types(dtype, torch.float32))
        if "rate" in self.wide:
            inputs["rate"] = inputs["rate"].abs()
        if self.begins:
            inputs["begins"] = torch.rand(tokens, generator=random) < 0.1
        return inputs


OPENED = {
    None: lambda gate: gate,
    "silu": lambda gate: gate * gate.sigmoid(),
    "sigmoid": lambda gate: gate.sigmoid(),
    "gelu": lambda gate: gate / 2 * (1 + torch.tanh((2 / math.pi) ** 0.5 * (gate + 0.044715 * gate**3))),
}


def output_written_out(x, gate=None, skip=None, weight=None, *, activation=None):
    if skip is not None:
        heads = weight.shape[-1]
        x = (x.unflatten(-1, (heads, -1)) + weight[..., None] * skip.unflatten(-1, (heads, -1))).flatten(-2)
    return x if gate is None else x * OPENED[activation](gate)


def keys_written_out(r, k, decay, rate, decay_bias, rate_bias, key_scale, key_rate, bonus):
    a = (rate + rate_bias).sigmoid().unflatten(-1, bonus.shape)
    h = F.normalize((k * key_scale).unflatten(-1, bonus.shape), dim=-1)
    written = k.unflatten(-1, bonus.shape) * (1 + (a - 1) * key_rate.view_as(bonus))
    log_decay = -(math.e**-0.5) * (decay + decay_bias).sigmoid().unflatten(-1, bonus.shape)
    return log_decay, written, -h, a * h, (r.unflatten(-1, bonus.shape) * bonus * written).sum(-1)


def features_written_out(x):
    z = x / x.shape[-1] ** 0.25
    rows, columns = torch.triu_indices(x.shape[-1], x.shape[-1], 1)
    return torch.cat([torch.ones_like(z[..., :1]), z, z**2 / 2**0.5, z[..., rows] * z[..., columns]], -1)


def gates_written_out(u, gates, recurrence_bias, input_bias, rate, begins=None):
    recurrence, input = (torch.cat(list(both), -1) for both in gates.chunk(2, -1))
    a = torch.exp(-rate * (recurrence + recurrence_bias).sigmoid())
    room = (1 - a**2).sqrt()
    if begins is not None:
        room = torch.where(begins[..., None], 1, room)
    return a, room * (input + input_bias).sigmoid() * u


def output(channels, heads=None, gate=True, activation=None):
    """Without heads there is no skip."""
    narrow = dict.fromkeys(("x", *["gate"] * gate, *["skip"] * (heads is not None)), channels)
    wide = {} if heads is None else {"weight": (TOKENS, heads)}
    return Case(gated_output, output_written_out, narrow, wide, {"activation": activation})


def keys(heads, size):
    learned = dict.fromkeys(("decay_bias", "rate_bias", "key_scale", "key_rate"), (heads * size,))
    narrow = dict.fromkeys(("r", "k", "decay", "rate"), heads * size)
    return Case(erasing_keys, keys_written_out, narrow, learned | {"bonus": (heads, size)})


def gates(channels, blocks=1, begins=False):
    learned = dict.fromkeys(("recurrence_bias", "input_bias", "rate"), (channels,))
    narrow = {"u": channels, "gates": (blocks, TOKENS, 2 * channels // blocks)}
    return Case(recurrence_gates, gates_written_out, narrow, learned, begins=begins)


CASES = {
    "gated_output, one head": output(37, 1, gate=False),
    "gated_output, a gate": output(37),
    "gated_output, silu": output(8, activation="silu"),
    "gated_output, sigmoid": output(5, activation="sigmoid"),
    "gated_output, gelu": output(37, activation="gelu"),
    "gated_output, heads, a gate": output(96, 6),
    "gated_output, heads, sigmoid": output(12, 3, activation="sigmoid"),
    "gated_output, heads, gelu": output(18, 2, activation="gelu"),
    "gated_output, a channel a head, silu": output(5, 5, activation="silu"),
    "erasing_keys, one head": keys(1, 37),
    "erasing_keys, heads": keys(6, 16),
    "erasing_keys, small heads": keys(5, 3),
    "taylor_features, one number": Case(taylor_features, features_written_out, {"x": 1}),
    "taylor_features, 16": Case(taylor_features, features_written_out, {"x": 16}),
    "taylor_features, 19": Case(taylor_features, features_written_out, {"x": 19}),
    "recurrence_gates, 37": gates(37),
    "recurrence_gates, 15 in blocks": gates(15, blocks=3),
    "recurrence_gates, 32 in blocks, begins": gates(32, blocks=2, begins=True),
}
cases = pytest.mark.parametrize("case", CASES.values(), ids=CASES)
# One of each function, the one that does the most.
MOST = {case.function.__name__: case for case in CASES.values()}
each_function = pytest.mark.parametrize("case", MOST.values(), ids=MOST)


def differentiable(inputs):
    return {name: x.detach().requires_grad_(x.is_floating_point()) for name, x in inputs.items()}


def with_gradients(inputs, outputs):
    outputs = [outputs] if isinstance(outputs, Tensor) else list(outputs)
    random = torch.Generator().manual_seed(1)
    weights = [torch.randn(y.shape, generator=random).bfloat16().to(y.dtype) for y in outputs]
    inputs = {name: x for name, x in inputs.items() if x.requires_grad}
    gradients = torch.autograd.grad(outputs, list(inputs.values()), weights)
    named = {f"output {place}": y.detach() for place, y in enumerate(outputs)}
    return named | {f"gradient of {name}": x for name, x in zip(inputs, gradients, strict=True)}


def differentiate(case, inputs, backend):
    inputs = differentiable(inputs)
    return with_gradients(inputs, case.function(**inputs, **case.settings, backend=backend))


def assert_same(ours, truth):
    assert ours.keys() == truth.keys()
    for name, tensor in truth.items():
        torch.testing.assert_close(ours[name], tensor, rtol=1e-10, atol=1e-10, msg=lambda text, n=name: f"{n}: {text}")


@cases
@pytest.mark.parametrize("backend", ["reference", "native"])
def test_is_the_equation(backend, case):
    inputs = case.example()
    ours = differentiate(case, inputs, backend)
    inputs = differentiable(inputs)
    assert_same(ours, with_gradients(inputs, case.written_out(**inputs, **case.settings)))


@cases
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_rounds_no_worse_than_plain_pytorch(dtype, case):
    inputs = case.example(dtype, tokens=(4, 300))
    exact = {name: x.double() if x.is_floating_point() else x for name, x in inputs.items()}
    exact = differentiate(case, exact, "reference")
    ours, plain = (differentiate(case, inputs, backend) for backend in ("native", "reference"))
    for name, truth in exact.items():
        assert ours[name].dtype == plain[name].dtype
        error, allowed = ((side[name].double() - truth).norm() for side in (ours, plain))
        assert error <= max(2 * allowed, 3 * torch.finfo(torch.float32).eps * truth.norm()), name


@each_function
@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("tokens", [(1,), (0, 5), (1, 1), (3, 700)], ids=str)
def test_any_number_of_tokens(tokens, threads, case):
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        inputs = case.example(tokens=tokens)
        assert_same(differentiate(case, inputs, "native"), differentiate(case, inputs, "reference"))
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("case", [output(0, 3), keys(3, 0)], ids=["gated_output", "erasing_keys"])
def test_heads_without_channels(case):
    inputs = case.example()
    torch.use_deterministic_algorithms(True)  # fresh memory is NaN
    try:
        ours = differentiate(case, inputs, "native")
    finally:
        torch.use_deterministic_algorithms(False)
    assert_same(ours, differentiate(case, inputs, "reference"))


@each_function
@pytest.mark.parametrize("backend", ["native", "reference"])
@pytest.mark.parametrize("scale", [0.0, 1e-15, 1e4])
def test_finite_at_hostile_inputs(scale, backend, case):
    inputs = case.example(torch.float32)
    inputs |= {name: inputs[name] * scale for name in case.narrow}
    for name, tensor in differentiate(case, inputs, backend).items():
        assert tensor.isfinite().all(), name


@each_function
def test_is_an_operator_of_torch(case):
    inputs = differentiable(case.example(torch.float32))
    compiled = torch.compile(case.function, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(**inputs, **case.settings), case.function(**inputs, **case.settings))
    operator = getattr(torch.ops.seqzoo, f"{case.function.__name__}_native").default
    inputs |= {"activation": ACTIVATIONS[case.settings.get("activation")]}
    torch.library.opcheck(operator, tuple(inputs.get(argument.name) for argument in operator._schema.arguments))


@each_function
def test_one_answer_in_mixed_precision(case):
    """One input in bfloat16 beside others in float32 changes no output's dtype, nor, exact as it is, any number."""
    inputs = case.example(torch.float32)
    first, *others = case.narrow
    inputs |= {name: inputs[name].bfloat16() for name in [others[-1] if others else first]}
    wide = {name: x.float() if x.is_floating_point() else x for name, x in inputs.items()}
    mixed, truth = (case.function(**side, **case.settings) for side in (inputs, wide))
    torch.testing.assert_close(mixed, truth if others else truth.bfloat16())


@pytest.mark.parametrize("size", [1, 2, 16])
def test_features_are_the_series_of_the_exponential(size):
    q, k = torch.randn(2, 7, size, dtype=torch.float64)
    assert taylor_features(q).shape == (7, taylor_size(size))
    s = (q * k).sum(-1) / size**0.5
    torch.testing.assert_close((taylor_features(q) * taylor_features(k)).sum(-1), 1 + s + s**2 / 2)


@pytest.mark.parametrize("backend", ["native", "reference"])
def test_gates_that_hardly_decay_let_little_in(backend):
    """1 - a^2 is exact where a rounds to 1."""
    open_gates, rate = torch.full((1, 1, 8), 30.0), torch.tensor([1e-12, 1e-9, 1e-6, 1e-3])
    zero = torch.zeros(4)
    _, entering = recurrence_gates(torch.ones(1, 4), open_gates, zero, zero, rate, backend=backend)
    torch.testing.assert_close(entering[0].double(), (-torch.expm1(-2 * rate.double())).sqrt(), rtol=1e-6, atol=0)


@pytest.mark.parametrize(
    ("case", "wrong", "message"),
    [
        (output(8, 4), {"weight": torch.ones(2, 3)}, r"x \(2, 8\), weight \(2, 3\) do not fit together"),
        (output(8, 4), {"weight": torch.ones(2)}, "do not fit together"),
        (output(8, 4), {"weight": None}, "skip is given and weight is None; expected both or neither"),
        (output(8, 4), {"skip": None}, "weight is given and skip is None; expected both or neither"),
        (output(8, 4), {"skip": torch.ones(2, 4)}, r"skip has shape \(2, 4\); expected \(2, 8\)"),
        (output(8, 4), {"gate": torch.ones(2, 4)}, r"gate has shape \(2, 4\); expected \(2, 8\)"),
        (output(8, 4), {"gate": torch.ones(2, 8).long()}, "gate is torch.int64"),
        (output(8), {"gate": None}, "gate and skip are None; expected at least one of them"),
        (output(8), {"x": torch.ones(())}, r"x has shape \(\); expected \[..., channel\]"),
        (output(8), {"activation": "relu"}, "activation='relu'; use silu, sigmoid, gelu or None"),
        (keys(4, 2), {"bonus": torch.ones(2, 3)}, r"k \(2, 8\), bonus \(2, 3\) do not fit together"),
        (keys(4, 2), {"bonus": torch.ones(8)}, "do not fit together"),
        (keys(4, 2), {"rate": torch.ones(2, 4)}, r"rate has shape \(2, 4\); expected \(2, 8\)"),
        (keys(4, 2), {"key_rate": torch.ones(4)}, r"key_rate has shape \(4,\); expected \(8,\)"),
        (keys(4, 2), {"decay_bias": torch.ones(8).long()}, "decay_bias is torch.int64"),
        (gates(8), {"u": torch.ones(())}, r"u has shape \(\); expected \[..., channel\]"),
        (gates(8), {"gates": torch.ones(2, 16)}, r"u \(2, 8\), gates \(2, 16\) do not fit together"),
        (gates(8), {"gates": torch.ones(3, 2, 6)}, "do not fit together"),
        (gates(8), {"gates": torch.ones(0, 2, 16)}, "do not fit together"),
        (gates(8), {"rate": torch.ones(4)}, r"rate has shape \(4,\); expected \(8,\)"),
        (gates(8), {"begins": torch.ones(3).bool()}, r"begins has shape \(3,\); expected \(2,\)"),
        (gates(8), {"input_bias": torch.ones(8).long()}, "input_bias is torch.int64"),
        (CASES["taylor_features, 16"], {"x": torch.ones(3, 0)}, r"x has shape \(3, 0\); expected \[..., dim\]"),
        (CASES["taylor_features, 16"], {"x": torch.ones(3, 2).long()}, "x is torch.int64"),
    ],
)
def test_refuses_what_does_not_fit(case, wrong, message, unchecked):
    inputs = case.example(torch.float32, tokens=(2,))
    with pytest.raises(ValueError, match=message):
        case.function(**inputs | case.settings | wrong)


@each_function
def test_refuses_native_where_it_cannot_run(monkeypatch, case):
    monkeypatch.setattr(native, "reason", lambda: "no compiler was found")
    name = case.function.__name__
    with pytest.raises(ValueError, match=f"cannot run {name}: no compiler was found; use auto or reference"):
        case.function(**case.example(), **case.settings, backend="native")


@each_function
def test_refuses_a_backend_that_no_operator_has(case):
    name = case.function.__name__
    with pytest.raises(ValueError, match=f"backend='magic' cannot run {name}: there is no such backend; use auto, "):
        case.function(**case.example(), **case.settings, backend="magic")


@each_function
def test_refuses_an_input_that_is_missing(case, unchecked):
    for missing in (*case.narrow, *case.wide):
        if missing not in ("gate", "skip", "weight"):
            with pytest.raises(ValueError, match=f"{case.function.__name__}: {missing} is None; expected a tensor"):
                case.function(**case.example() | {missing: None}, **case.settings)
