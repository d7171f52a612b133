"""Every implementation of every operator against its reference: values, states, gradients, laws and hostile inputs."""

from __future__ import annotations

import importlib
import inspect
from functools import cache

import jaxtyping
import pytest
import torch

from seqzoo.kernels import OPERATORS
from seqzoo.kernels.chunks import UnitLowerInverse

EVERY = [(operator, name) for operator, implementations in OPERATORS.items() for name in implementations]
OTHERS = [(operator, name) for operator, name in EVERY if name != "reference"]
GATED = [(operator, name) for operator, name in EVERY if operator.startswith("gated")]
DELTA = [(operator, name) for operator, name in EVERY if operator == "gated_delta_rule"]

# What an operator takes besides tensors, and which of its tensors may be None.
SETTINGS = {"short_conv": {"activation": "silu"}}
OPTIONAL = {"short_conv": ("bias",)}

every = pytest.mark.parametrize(("operator", "backend"), EVERY)
others = pytest.mark.parametrize(("operator", "backend"), OTHERS)

EXACT = {"rtol": 1e-10, "atol": 1e-10}
# The bound on relative errors where twice the reference's is less: three units in the last place of float32. There the
# order of a matmul's sums decides, not the method: the reference adds small, decayed terms first.
FLOOR = 3 * torch.finfo(torch.float32).eps


def module(operator):
    return importlib.import_module(f"seqzoo.kernels.{operator}")


def example(operator, **sizes):
    """The operator's example; sizes that it does not have are ignored."""
    draw = importlib.import_module(f"seqzoo.kernels.{operator}.reference").example
    return draw(**{name: size for name, size in sizes.items() if name in inspect.signature(draw).parameters})


def call(operator, backend, inputs, starts=None, **settings):
    return getattr(module(operator), operator)(**inputs, starts=starts, backend=backend, **settings)


def differentiate(operator, backend, inputs, starts=None, **settings):
    """Outputs, the last state, and the gradient of every input when outputs and state are weighted at random."""
    inputs = {name: x.detach().requires_grad_() for name, x in inputs.items()}
    return with_gradients(inputs, call(operator, backend, inputs, starts, **settings))


def with_gradients(inputs, results):
    random = torch.Generator().manual_seed(1)
    # Numbers of bfloat16, so that they are the same ones in every dtype.
    weights = [torch.randn(z.shape, generator=random).bfloat16().to(z.dtype) for z in results]
    gradients = torch.autograd.grad(results, list(inputs.values()), weights, allow_unused=True, materialize_grads=True)
    names = ["output", "last state", *(f"gradient of {name}" for name in inputs)]
    return dict(zip(names, [*(z.detach() for z in results), *gradients], strict=True))


def assert_same(ours, truth, **tolerance):
    assert ours.keys() == truth.keys()
    for name in truth:
        torch.testing.assert_close(
            ours[name], truth[name], **(tolerance or EXACT), msg=lambda text, n=name: f"{n}: {text}"
        )


def relative_errors(cases):
    """Root mean square over ``cases``, pairs of results and their truth in float64, of each tensor's relative error."""
    squares = dict.fromkeys(cases[0][1], 0.0)
    for ours, truth in cases:
        for name, exact in truth.items():
            # A decay of e^-50 has a gradient of that size, far below the rounding of the terms that it is the sum of.
            size = max(exact.norm(), 0.01 * exact.numel() ** 0.5)
            squares[name] += ((ours[name].double() - exact).norm() / size).square().item() / len(cases)
    return {name: square**0.5 for name, square in squares.items()}


def assert_as_precise_as_the_reference(operator, backend, examples, starts=None, **settings):
    """At most twice the reference's error in the same dtype; truth is the reference in float64 on the same inputs."""
    ours, reference = [], []
    for inputs in examples:
        exact = {name: x.double() for name, x in inputs.items()}
        truth = differentiate(operator, "reference", exact, starts, **settings)
        ours.append((differentiate(operator, backend, inputs, starts, **settings), truth))
        reference.append((differentiate(operator, "reference", inputs, starts, **settings), truth))
    allowed = relative_errors(reference)
    for name, error in relative_errors(ours).items():
        assert error <= max(2 * allowed[name], FLOOR), (
            f"{name}: error {error:.2e}, the reference's is {allowed[name]:.2e}"
        )


def without(inputs, *names):
    return {name: x for name, x in inputs.items() if name not in names}


def begin_at(time, *tokens):
    """Starts at ``tokens`` in the first row, one token earlier in the second."""
    starts = torch.zeros(2, time, dtype=torch.bool)
    for token in tokens:
        starts[0, token] = starts[1, max(token - 1, 0)] = True
    return starts


STARTS = {
    "no start": lambda time: None,
    "start at the first token": lambda time: begin_at(time, 0),
    "start in the middle": lambda time: begin_at(time, time // 2),
    "start at the last token": lambda time: begin_at(time, time - 1),
    "many starts": lambda time: torch.rand(2, time, generator=torch.Generator().manual_seed(0)) < 1 / 8,
    "a start at every token": lambda time: torch.ones(2, time, dtype=torch.bool),
}
TIMES = (1, 3, 17, 63, 64, 100, 200)


@cache
def truth_of(operator, time, starts, dropped, settings=()):
    inputs = without(example(operator, time=time), *dropped)
    return differentiate(operator, "reference", inputs, STARTS[starts](time), **dict(settings))


@others
@pytest.mark.parametrize("state", ["with state", "without state"])
@pytest.mark.parametrize("starts", STARTS)
@pytest.mark.parametrize("time", TIMES)
def test_equals_the_reference(operator, backend, time, starts, state):
    dropped = ("state",) if state == "without state" else ()
    inputs = without(example(operator, time=time), *dropped)
    ours = differentiate(operator, backend, inputs, STARTS[starts](time))
    assert_same(ours, truth_of(operator, time, starts, dropped))


@others
def test_equals_the_reference_with_other_settings(operator, backend):
    inputs, settings = example(operator, time=70), SETTINGS.get(operator, {})
    for dropped in [(), OPTIONAL.get(operator, ())]:
        ours = differentiate(operator, backend, without(inputs, *dropped), STARTS["many starts"](70), **settings)
        assert_same(ours, truth_of(operator, 70, "many starts", dropped, tuple(settings.items())))


@pytest.mark.parametrize(("operator", "backend"), [pair for pair in OTHERS if pair in GATED])
@pytest.mark.parametrize(("groups", "heads"), [(1, 1), (1, 4), (2, 4), (4, 4)])
def test_groups_of_heads_share_queries_and_keys(operator, backend, groups, heads):
    inputs, starts = example(operator, time=70, groups=groups, heads=heads), STARTS["many starts"](70)
    truth = differentiate(operator, "reference", inputs, starts)
    assert_same(differentiate(operator, backend, inputs, starts), truth)
    repeated = inputs | {name: inputs[name].repeat_interleave(heads // groups, 2) for name in ("q", "k")}
    assert_same(*(dict(enumerate(call(operator, backend, z, starts))) for z in (inputs, repeated)))


@pytest.mark.parametrize("size", [1, 2, 5])
@pytest.mark.parametrize("backend", OPERATORS["short_conv"])
@pytest.mark.parametrize("time", [1, 3, 20])
def test_short_conv_is_pytorchs_conv1d(backend, size, time):
    x, weight, bias, state = example("short_conv", time=time, size=size).values()
    y, last = call("short_conv", backend, {"x": x, "weight": weight, "bias": bias, "state": state})
    seen = torch.cat([state, x], 1)
    truth = torch.nn.functional.conv1d(seen.mT, weight[:, None], bias, groups=len(weight)).mT
    torch.testing.assert_close(y, truth, **EXACT)
    torch.testing.assert_close(last, seen[:, time:])


@others
@pytest.mark.parametrize("starts", ["no start", "many starts"])
@pytest.mark.parametrize("time", [1, 63, 64, 100, 200])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_is_as_precise_as_the_reference(operator, backend, dtype, time, starts):
    examples = [example(operator, time=time, dtype=dtype, seed=seed) for seed in range(3)]
    for settings in [{}, SETTINGS[operator]] if operator in SETTINGS else [{}]:
        assert_as_precise_as_the_reference(operator, backend, examples, STARTS[starts](time), **settings)


@every
@pytest.mark.parametrize("starts", ["no start", "many starts"])
@pytest.mark.parametrize("sizes", [[1, 99], [64, 36], [37, 53, 1, 9], [2] * 50], ids=lambda sizes: str(sizes[:4]))
def test_goes_on_from_its_state(operator, backend, sizes, starts):
    """One call and any split are the same, gradients through the carried state included."""

    def split(*, sizes, state, starts, **inputs):
        over_time = {name: x.split(sizes, 1) for name, x in inputs.items() if x.shape[:2] == (2, sum(sizes))}
        begins = [None] * len(sizes) if starts is None else starts.split(sizes, 1)
        outputs = []
        for piece, begin in enumerate(begins):
            parts = inputs | {name: pieces[piece] for name, pieces in over_time.items()}
            y, state = call(operator, backend, parts | {"state": state}, begin)
            outputs.append(y)
        return torch.cat(outputs, 1), state

    results = []
    for pieces in (sizes, [100]):
        inputs = {name: x.requires_grad_() for name, x in example(operator, time=100).items()}
        y, state = split(sizes=pieces, starts=STARTS[starts](100), **inputs)
        loss = (y * torch.linspace(-1, 1, 100, dtype=y.dtype)[:, *[None] * (y.ndim - 2)]).sum() + state.square().sum()
        gradients = torch.autograd.grad(loss, list(inputs.values()))
        results.append(dict(zip(["output", "last state", *inputs], [y, state, *gradients], strict=True)))
    assert_same(*results)


@every
def test_documents_do_not_see_each_other(operator, backend):
    """Packed side by side, a state in front, documents give what each gives alone."""
    lengths = [1, 66, 3, 30]
    inputs = example(operator, time=sum(lengths))
    ends = torch.tensor(lengths).cumsum(0).tolist()
    starts = begin_at(sum(lengths))
    starts[:, [0, *ends[:-1]]] = True
    packed, state = call(operator, backend, inputs, starts)
    over_time = [name for name, x in inputs.items() if x.shape[:2] == starts.shape]
    for length, end, y in zip(lengths, ends, packed.split(lengths, 1), strict=True):
        document = without(inputs, "state") | {name: inputs[name][:, end - length : end] for name in over_time}
        alone, last = call(operator, backend, document)
        torch.testing.assert_close(y, alone, **EXACT)
    torch.testing.assert_close(state, last, **EXACT)


def strongly_decaying(operator, where, amount, seed):
    """An example that decays by ``amount`` at each token, or at one token in the middle of mild ones."""
    inputs = example(operator, time=100, dtype=torch.float32, seed=seed)
    inputs["log_decay"][:, slice(None) if where == "each token" else 40] = amount
    return inputs


@pytest.mark.parametrize("amount", [-50.0, -1e4])
@pytest.mark.parametrize("where", ["each token", "one token"])
@pytest.mark.parametrize(("operator", "backend"), GATED)
def test_stays_precise_under_strong_decay(operator, backend, where, amount):
    examples = [strongly_decaying(operator, where, amount, seed) for seed in range(3)]
    for inputs in examples:
        for name, tensor in differentiate(operator, backend, inputs).items():
            assert tensor.isfinite().all(), name
    assert_as_precise_as_the_reference(operator, backend, examples)


@pytest.mark.parametrize(("operator", "backend"), GATED)
def test_a_strong_decay_forgets_all_before_it(operator, backend):
    inputs = strongly_decaying(operator, "one token", -1e4, 0)
    y, state = call(operator, backend, inputs)
    later = {name: inputs[name][:, 40:] for name in without(inputs, "state")}
    alone, last = call(operator, backend, later)
    torch.testing.assert_close(y[:, 40:], alone, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(state, last, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("operator", "backend"), DELTA)
def test_writes_with_strength_up_to_two(operator, backend):
    examples = []
    for seed in range(3):
        inputs = example(operator, time=200, dtype=torch.float32, seed=seed)
        inputs["beta"] = 2 * torch.rand(inputs["beta"].shape)
        inputs["beta"][:, ::3] = 2
        examples.append(inputs)
    assert_as_precise_as_the_reference(operator, backend, examples)
    wide = {name: x.double() for name, x in examples[0].items()}
    assert_same(*(differentiate(operator, name, wide) for name in (backend, "reference")))


@pytest.mark.parametrize(("operator", "backend"), DELTA)
def test_repeated_keys_overwrite_each_other(operator, backend):
    """The same key at each token, no decay: powers of the triangular matrix would pass 1e18."""
    examples = []
    for seed in range(3):
        inputs = example(operator, time=200, dtype=torch.float32, seed=seed)
        inputs["k"] = inputs["k"][:, :1].expand_as(inputs["k"]).contiguous()
        inputs["beta"].fill_(1)
        inputs["log_decay"].zero_()
        examples.append(inputs)
    assert_as_precise_as_the_reference(operator, backend, examples)
    y, _ = call(operator, backend, inputs | {"q": inputs["k"]})
    torch.testing.assert_close(y, inputs["v"], rtol=1e-5, atol=1e-5)


@every
def test_takes_strided_inputs_and_leaves_them_alone(operator, backend):
    inputs, starts = example(operator, time=70), STARTS["many starts"](70)
    truth = differentiate(operator, backend, inputs, starts)
    apart = {name: torch.stack([x, x], -1)[..., 0] for name, x in inputs.items()}
    swapped = {name: x.transpose(0, 1).contiguous().transpose(0, 1) for name, x in inputs.items() if x.ndim > 1}
    for strided in (apart, inputs | swapped):
        copies = {name: x.clone() for name, x in strided.items()}
        with torch.no_grad():
            call(operator, backend, strided, starts)
        assert_same(strided, copies, rtol=0, atol=0)
        assert_same(differentiate(operator, backend, strided, starts.mT.contiguous().mT), truth)


@every
def test_rows_are_independent(operator, backend):
    inputs, starts = example(operator, time=70), STARTS["many starts"](70)
    y, state = call(operator, backend, inputs, starts)
    row = {name: x[1:] if x.shape[0] == 2 and name not in ("weight", "bias") else x for name, x in inputs.items()}
    torch.testing.assert_close(call(operator, backend, row, starts[1:]), (y[1:], state[1:]), **EXACT)


@every
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_outputs_have_the_dtype_of_the_inputs_and_states_at_least_float32(operator, backend, dtype):
    inputs = example(operator, time=5, dtype=dtype)
    y, state = call(operator, backend, inputs)
    assert y.dtype == dtype
    # The convolution's state is inputs, not sums: nothing is lost by keeping it narrow.
    assert state.dtype == (dtype if operator == "short_conv" else torch.promote_types(dtype, torch.float32))
    assert state.dtype == inputs["state"].dtype


@every
def test_autocast_changes_nothing(operator, backend):
    inputs, starts = example(operator, time=70, dtype=torch.float32), STARTS["many starts"](70)
    truth = differentiate(operator, backend, inputs, starts)
    inputs = {name: x.requires_grad_() for name, x in inputs.items()}
    with torch.autocast("cpu", torch.bfloat16):
        results = call(operator, backend, inputs, starts)
    assert_same(with_gradients(inputs, results), truth, rtol=0, atol=0)


def compare_compiled(operator, backend, compiler, time):
    torch._dynamo.reset()
    inputs = {name: x.requires_grad_() for name, x in example(operator, time=time).items()}
    settings = SETTINGS.get(operator, {}) | {"starts": STARTS["many starts"](time), "backend": backend}
    function = getattr(module(operator), operator)
    compiled = torch.compile(function, fullgraph=True, backend=compiler)
    assert_same(*(with_gradients(inputs, run(**inputs, **settings)) for run in (compiled, function)))


@pytest.mark.parametrize(("operator", "backend"), [*EVERY, *((operator, "auto") for operator in OPERATORS)])
def test_compiles_in_one_graph(operator, backend):
    compare_compiled(operator, backend, "aot_eager", 3)


@pytest.mark.slow
@pytest.mark.parametrize("operator", OPERATORS)
def test_compiles_to_machine_code(operator):
    compare_compiled(operator, "auto", "inductor", 70)


@every
def test_refuses_a_shape_that_does_not_fit(operator, backend, unchecked):
    inputs, starts = example(operator, time=5), begin_at(5, 2)
    call(operator, backend, inputs, starts)
    for name, x in inputs.items():
        # What the first input's shape says is taken for granted, so blame may fall on any other; any x is long enough.
        blame = "|".join(inputs) if name == next(iter(inputs)) else f"{name}|state"
        axes = (0, 2) if name == "x" else range(x.ndim)
        for wrong in [*(x.narrow(axis, 0, x.shape[axis] - 1) for axis in axes), x[None], x.flatten()[0]]:
            with pytest.raises(ValueError, match=rf"{operator}: .*\b({blame})\b.* expected [\[(]"):
                call(operator, backend, inputs | {name: wrong}, starts)
    for wrong in (starts[:, 1:], starts[:1], starts[0], starts[..., None]):
        with pytest.raises(ValueError, match=rf"{operator}: starts has shape .*; expected \(2, 5\)"):
            call(operator, backend, inputs, wrong)


def test_short_conv_refuses_an_activation_that_it_does_not_have(unchecked):
    with pytest.raises(ValueError, match=r"activation='relu'; use silu or None"):
        call("short_conv", "auto", example("short_conv"), activation="relu")


@pytest.mark.parametrize("operator", OPERATORS)
def test_refuses_a_backend_that_does_not_exist(operator):
    names = ", ".join(["auto", *OPERATORS[operator]])
    with pytest.raises(ValueError, match=f"backend='magic' cannot run {operator}: .*; use {names}$"):
        call(operator, "magic", example(operator))


@pytest.mark.parametrize("time", [1, 2, 200])
@pytest.mark.parametrize("operator", OPERATORS)
def test_explains_what_auto_runs(operator, time, monkeypatch):
    ran = []
    for name, implementation in OPERATORS[operator].items():

        def spy(*inputs, name=name, implementation=implementation):
            ran.append(name)
            return implementation(*inputs)

        monkeypatch.setitem(OPERATORS[operator], name, spy)
    call(operator, "auto", example(operator, time=time))
    (chosen,) = ran
    first, *rest = module(operator).explain(time).splitlines()
    assert first == f"{operator}, {time} token(s): {chosen}"
    for name in OPERATORS[operator].keys() - {chosen}:
        assert any(line.startswith(f"  not {name}: ") for line in rest), name
    assert not any(line.startswith(f"  not {chosen}") for line in rest)


@pytest.mark.parametrize("size", [1, 2, 4, 16, 64])
@pytest.mark.parametrize("batch", [(), (3,), (2, 3)], ids=str)
def test_triangular_inverse(batch, size):
    lower = torch.randn(*batch, size, size, dtype=torch.float64).tril(-1).div(size**0.5)
    truth = torch.linalg.inv(torch.eye(size, dtype=torch.float64) + lower)
    torch.testing.assert_close(UnitLowerInverse.apply(lower), truth, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("size", [1, 2, 8])
def test_gradient_of_the_triangular_inverse(size):
    full = torch.randn(2, size, size, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: UnitLowerInverse.apply(x.tril(-1)), full)


def test_shapes_are_checked_while_tests_run():
    inputs = example("short_conv")
    with pytest.raises(jaxtyping.TypeCheckError, match="bias"):
        call("short_conv", "auto", inputs | {"bias": inputs["bias"][:1]})
    with pytest.raises(jaxtyping.TypeCheckError, match="weight"):
        call("short_conv", "auto", inputs | {"weight": inputs["weight"].long()})
