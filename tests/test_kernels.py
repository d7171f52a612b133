"""Every implementation of every operator against its reference: values, states, gradients, laws and hostile inputs."""

from __future__ import annotations

import importlib
import inspect
import math
from functools import cache

import jaxtyping
import pytest
import torch
from torch.utils._pytree import tree_flatten_with_path, tree_leaves, tree_map, tree_map_only

from seqzoo.kernels import (
    EVERY_OPERATOR,
    OPERATORS,
    TOKENWISE,
    adapters,
    backends,
    checked_ranges,
    native,
    triton_support,
)
from seqzoo.kernels.chunks import UnitLowerInverse

# Triton's interpreter walks through a kernel's programs one by one: one length of several chunks stands for all, and
# what `interpreted_by_default` does not name waits for `make test-all`.
INTERPRETED = ("triton",)
TIMES = (1, 3, 17, 63, 64, 200)
FEW_TIMES = (1, 70)
# Starts that stand for all at most lengths.
FEW_STARTS = ("no start", "many starts")
# Made of other operators, whose kernels are tested by themselves.
COMPOSED = ("gated_delta_product", "mlstm")
# Kernels that keep a number of chunks of all heads in memory, more than the interpreter could walk through.
CUT_BY_CELLS = ("gated_delta_rule", "dplr_delta_rule")

# Names of what a memory decays by, as logarithms; and of all that is at most 0, or its real part, if it is not to grow.
DECAYS = ("log_decay", "log_forget")
AT_MOST_ZERO = (*DECAYS, "log_momentum", "log_keep", "A", "exponent")

EXACT = {"rtol": 1e-10, "atol": 1e-10}
# The bound on relative errors where twice the reference's is less: three units in the last place of float32. There the
# order of a matmul's sums decides, not the method: the reference adds small, decayed terms first.
FLOOR = 3 * torch.finfo(torch.float32).eps


def module(operator):
    return importlib.import_module(f"seqzoo.kernels.{operator}")


def equation(operator):
    return importlib.import_module(f"seqzoo.kernels.{operator}.reference")


def example(operator, variant=None, **sizes):
    """The operator's example, of its first variant by default; sizes that it does not have are ignored."""
    draw, variants = equation(operator).example, equation(operator).VARIANTS
    known = inspect.signature(draw).parameters
    settings = variants[next(iter(variants)) if variant is None else variant]
    return draw(**{name: size for name, size in sizes.items() if name in known} | settings)


# Adapters of other people's kernels keep their promises, not our laws: tests/test_adapters.py.
EVERY = [(operator, name) for operator, names in OPERATORS.items() for name in names if name not in adapters.PACKAGES]
OTHERS = [(operator, name) for operator, name in EVERY if name != "reference"]


def with_variants(pairs, having=None):
    """``pairs`` of operator and implementation with each variant, or only those with an input of one of these names."""
    cases = [(*pair, variant) for pair in pairs for variant in equation(pair[0]).VARIANTS]
    if having is None:
        return cases
    return [case for case in cases if any(example(case[0], case[2]).get(name) is not None for name in having)]


def with_times(cases, times):
    return [(*case, time) for case in cases for time in (times if case[1] not in INTERPRETED else FEW_TIMES)]


def parametrize(cases):
    names = ("operator", "backend", "variant", "time")
    return pytest.mark.parametrize(names[: len(cases[0])], cases)


def interpreted_by_default(**values):
    """Of a test of kernels, run what has these values also where kernels are interpreted; the rest of it is slow there.

    Without values, none of it. Tests without this mark always run.
    """
    return pytest.mark.interpreted_by_default(**values)


SINGLE = tuple(operator for operator in OPERATORS if operator not in COMPOSED)

every = parametrize(with_variants(EVERY))
others = parametrize(with_variants(OTHERS))
gated = parametrize(with_variants(OTHERS, having=["log_decay"]))
forgetting = parametrize(with_variants(EVERY, having=DECAYS))
delta = parametrize(with_variants(OTHERS, having=["beta"]))


def call(operator, backend, inputs, starts=None):
    return getattr(module(operator), operator)(**inputs, starts=starts, backend=backend)


def over(operator, variant, axis):
    """Names of the inputs that have a row for each member of ``axis``: batch (the first) or time (the second)."""
    shapes = []
    for size in (2, 5):
        inputs = example(operator, variant, **{axis: size})
        shapes.append({name: [z.shape for z in tree_leaves(x) if hasattr(z, "shape")] for name, x in inputs.items()})
    return [name for name in shapes[0] if shapes[0][name] != shapes[1][name]]


def select(inputs, names, index):
    return {name: tree_map(lambda z: z[index], x) if name in names else x for name, x in inputs.items()}


def named_tensors(tree):
    """The tensors of ``tree`` by their path, such as ``q`` or ``state.memory``."""
    leaves = tree_flatten_with_path(tree)[0]
    return {"".join(map(str, path)): leaf for path, leaf in leaves if isinstance(leaf, torch.Tensor)}


def convert(inputs, dtype):
    """Floating-point inputs in ``dtype``, or complex ones in the complex type of its precision."""
    return tree_map_only(
        torch.Tensor,
        lambda x: (
            x.to(dtype.to_complex() if x.is_complex() else dtype) if x.is_floating_point() or x.is_complex() else x
        ),
        inputs,
    )


def counts(x):
    """Whether ``x`` is a count or a position, which has no gradient and no rounding."""
    return not (x.is_floating_point() or x.is_complex())


def learnable(inputs):
    return tree_map_only(torch.Tensor, lambda x: x.detach() if counts(x) else x.detach().requires_grad_(), inputs)


def differentiate(operator, backend, inputs, starts=None):
    """Outputs, the last state, and the gradient of every input when outputs and state are weighted at random."""
    inputs = learnable(inputs)
    return with_gradients(inputs, call(operator, backend, inputs, starts))


def with_gradients(inputs, results):
    random = torch.Generator().manual_seed(1)
    results, inputs = named_tensors(dict(zip(("output", "last state"), results, strict=True))), named_tensors(inputs)
    inputs = {name: x for name, x in inputs.items() if not counts(x)}
    smooth = [z for z in results.values() if not counts(z)]
    # Numbers of bfloat16, so that they are the same ones in every dtype.
    weights = [torch.randn(z.shape, generator=random).bfloat16().to(z.dtype) for z in smooth]
    # What a state holds may be constant: of an open chunk nothing is left where one has just ended.
    read = [pair for pair in zip(smooth, weights, strict=True) if pair[0].requires_grad]
    outputs, weights = zip(*read, strict=True)
    gradients = torch.autograd.grad(outputs, list(inputs.values()), weights, allow_unused=True, materialize_grads=True)
    names = [*results, *(f"gradient of {name}" for name in inputs)]
    return dict(zip(names, [*(z.detach() for z in results.values()), *gradients], strict=True))


def assert_same(ours, truth, **tolerance):
    assert ours.keys() == truth.keys()
    for name in truth:
        torch.testing.assert_close(
            ours[name], truth[name], **(tolerance or EXACT), msg=lambda text, n=name: f"{n}: {text}"
        )


def relative_errors(cases):
    """Root mean square over ``cases``, pairs of results and their truth in float64, of each tensor's relative error."""
    squares = {name: 0.0 for name, exact in cases[0][1].items() if not counts(exact)}
    for ours, truth in cases:
        for name in squares:
            exact = truth[name]
            # A decay of e^-50 has a gradient of that size, far below the rounding of the terms that it is the sum of.
            size = max(exact.norm(), 0.01 * exact.numel() ** 0.5)
            squares[name] += ((ours[name].to(exact.dtype) - exact).norm() / size).square().item() / len(cases)
    return {name: square**0.5 for name, square in squares.items()}


def plain(operator, inputs, starts):
    """The reference as plain PyTorch runs it: every input, sum and state in the one dtype of the outputs."""
    with pytest.MonkeyPatch.context() as patch:
        if hasattr(equation(operator), "accumulation_dtype"):
            patch.setattr(equation(operator), "accumulation_dtype", lambda x: x.dtype)
        return differentiate(operator, "reference", inputs, starts)


def exact_and_plain(operator, inputs, starts=None):
    """What the reference says of ``inputs`` in float64, and wholly in their dtype."""
    narrow = tree_leaves(inputs)[0].dtype
    truth = differentiate(operator, "reference", convert(inputs, torch.float64), starts)
    return truth, plain(operator, convert(inputs, narrow), starts)


@cache
def example_with_truth(operator, variant, dtype, time, seed, starts, interpreted):
    """An example whose rounding is compared, and what ``exact_and_plain`` says of it."""
    inputs = example(operator, variant, time=time, dtype=dtype, seed=seed, **heads_for(interpreted))
    return inputs, exact_and_plain(operator, inputs, STARTS[starts](time))


def assert_as_precise_as_plain_pytorch(operator, backend, examples, starts=None, expected=None):
    """At most twice the error of the reference run wholly in the same dtype; truth is the reference in float64.

    ``expected`` is what ``exact_and_plain`` says of each example.
    """
    if expected is None:
        expected = [exact_and_plain(operator, inputs, starts) for inputs in examples]
    ours = [
        (differentiate(operator, backend, inputs, starts), truth)
        for inputs, (truth, _) in zip(examples, expected, strict=True)
    ]
    allowed = relative_errors([(rounded, truth) for truth, rounded in expected])
    for name, error in relative_errors(ours).items():
        assert error <= max(2 * allowed[name], FLOOR), (
            f"{name}: error {error:.2e}, plain PyTorch's is {allowed[name]:.2e}"
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


@cache
def truth_of(operator, variant, time, starts, dropped, few_heads):
    inputs = without(example_of(operator, variant, time, few_heads), *dropped)
    return differentiate(operator, "reference", inputs, STARTS[starts](time))


def example_of(operator, variant, time, few_heads):
    return example(operator, variant, time=time, **({"groups": 1, "heads": 2} if few_heads else {}))


def assert_equals_the_reference(operator, backend, variant, time, starts, *dropped):
    # The interpreter takes one head at a time: how heads are found is the same in all variants.
    few_heads = backend in INTERPRETED and variant != next(iter(equation(operator).VARIANTS))
    inputs = without(example_of(operator, variant, time, few_heads), *dropped)
    ours = differentiate(operator, backend, inputs, STARTS[starts](time))
    assert_same(ours, truth_of(operator, variant, time, starts, dropped, few_heads))


@interpreted_by_default(operator=SINGLE, starts=("many starts",))
@parametrize(with_times(with_variants(OTHERS), TIMES))
@pytest.mark.parametrize("starts", FEW_STARTS)
def test_equals_the_reference(operator, backend, variant, time, starts):
    assert_equals_the_reference(operator, backend, variant, time, starts)


@interpreted_by_default()
@parametrize(with_times(with_variants(OTHERS), [3, 100]))
@pytest.mark.parametrize("starts", FEW_STARTS)
def test_equals_the_reference_without_a_state(operator, backend, variant, time, starts):
    assert_equals_the_reference(operator, backend, variant, time, starts, "state")


@interpreted_by_default()
@others
@pytest.mark.parametrize("starts", [name for name in STARTS if name not in FEW_STARTS])
def test_equals_the_reference_wherever_documents_start(operator, backend, variant, starts):
    assert_equals_the_reference(operator, backend, variant, 70 if backend in INTERPRETED else 100, starts)


@interpreted_by_default()
@pytest.mark.parametrize(("groups", "heads"), [(1, 1), (1, 4), (2, 4), (4, 4)])
@parametrize(
    [case for case in with_variants(OTHERS) if "groups" in inspect.signature(equation(case[0]).example).parameters]
)
def test_groups_of_heads_share_queries_and_keys(operator, backend, variant, groups, heads):
    inputs, starts = example(operator, variant, time=70, groups=groups, heads=heads), STARTS["many starts"](70)
    truth = differentiate(operator, "reference", inputs, starts)
    assert_same(differentiate(operator, backend, inputs, starts), truth)
    repeated = inputs | {name: inputs[name].repeat_interleave(heads // groups, -2) for name in ("q", "k")}
    assert_same(*(named_tensors(call(operator, backend, z, starts)) for z in (inputs, repeated)))


@pytest.mark.parametrize("backend", ["reference", "chunked", "native"])
@pytest.mark.parametrize("variant", ["decay per channel", "no decay", "bonus, scalar decay"])
def test_gated_linear_attention_with_weights_and_a_skip(backend, variant):
    """Beside any decay and a bonus, they are what they say: weighted values, and a share of the token's own."""
    weights = example("gated_linear_attention", "scalar decay, weights and a skip", time=70)
    inputs, starts = example("gated_linear_attention", variant, time=70), STARTS["many starts"](70)
    inputs |= {name: weights[name] for name in ("write", "skip")}

    def outside(v, write, skip, **others):
        o, last = call("gated_linear_attention", "reference", {"v": v * write[..., None], **others}, starts)
        return o + skip[:, None] * v, last

    learned = learnable(inputs)
    ours = differentiate("gated_linear_attention", backend, inputs, starts)
    assert_same(ours, with_gradients(learned, outside(**learned)))


@pytest.mark.parametrize("operator", ["gated_linear_attention", "mlstm"])
def test_values_without_channels(operator):
    for variant in equation(operator).VARIANTS:
        inputs = example(operator, variant, time=5, value=0)
        del inputs["state"]
        assert_same(*(named_tensors(call(operator, backend, inputs)) for backend in ("native", "reference")))


@pytest.mark.parametrize("size", [1, 2, 5])
@pytest.mark.parametrize("backend", [name for operator, name in EVERY if operator == "short_conv"])
@pytest.mark.parametrize("time", [1, 3, 20])
def test_short_conv_is_pytorchs_conv1d(backend, size, time):
    inputs = example("short_conv", time=time, size=size)
    y, last = call("short_conv", backend, inputs)
    seen = torch.cat([inputs["state"], inputs["x"]], 1)
    weight = inputs["weight"]
    truth = torch.nn.functional.conv1d(seen.mT, weight[:, None], inputs["bias"], groups=len(weight)).mT
    torch.testing.assert_close(y, truth, **EXACT)
    torch.testing.assert_close(last, seen[:, time:])


@pytest.mark.parametrize("backend", [name for operator, name in OTHERS if operator == "fast_weights"])
@pytest.mark.parametrize("chunk", [64, 65, 150])
def test_fast_weights_of_long_chunks(backend, chunk):
    """Kernels may take a chunk in pieces."""
    variant = equation("fast_weights").VARIANTS["everything"] | {"chunk": chunk}
    inputs, starts = equation("fast_weights").example(time=200, **variant), STARTS["start in the middle"](200)
    inputs["rate"] = inputs["rate"] / 10  # so many steps at once diverge at larger ones
    assert_same(*(differentiate("fast_weights", name, inputs, starts) for name in (backend, "reference")))


@interpreted_by_default(operator=SINGLE, starts=("many starts",), time=(70,))
@parametrize(with_times(with_variants(OTHERS), [1, 100]))
@pytest.mark.parametrize(
    ("dtype", "starts"),
    [(torch.float32, "no start"), (torch.float32, "many starts"), (torch.bfloat16, "many starts")],
)
def test_is_as_precise_as_plain_pytorch(operator, backend, variant, dtype, time, starts):
    cases = [(operator, variant, dtype, time, seed, starts, backend in INTERPRETED) for seed in seeds_for(backend)]
    known = [example_with_truth(*case) for case in cases]
    examples, expected = zip(*known, strict=True)
    assert_as_precise_as_plain_pytorch(operator, backend, examples, STARTS[starts](time), expected)


def seeds_for(backend):
    """Of how many examples errors are averaged: one where kernels are interpreted."""
    return range(1 if backend in INTERPRETED else 3)


def heads_for(interpreted):
    """Heads of examples where one says as much as many: the interpreter takes one at a time."""
    return {"groups": 1, "heads": 1} if interpreted else {}


def in_pieces(operator, backend, variant, sizes, starts):
    """Results and gradients of an example that goes through the operator in pieces of these sizes."""
    in_time, time = over(operator, variant, "time"), sum(sizes)
    inputs, begins = learnable(example(operator, variant, time=time)), STARTS[starts](time)
    state, outputs, end = inputs["state"], [], 0
    for size in sizes:
        piece = slice(end, end := end + size)
        parts = select(inputs, in_time, (slice(None), piece)) | {"state": state}
        y, state = call(operator, backend, parts, None if begins is None else begins[:, piece])
        outputs.append(y)
    return with_gradients(inputs, (torch.cat(outputs, 1), state))


@interpreted_by_default()
@every
@pytest.mark.parametrize("starts", FEW_STARTS)
@pytest.mark.parametrize("sizes", [[1, 99], [64, 36], [37, 53, 1, 9], [2] * 9 + [82]], ids=lambda sizes: str(sizes[:4]))
def test_goes_on_from_its_state(operator, backend, variant, sizes, starts):
    """Any split is the reference's one call, gradients through the carried state included."""
    ours = in_pieces(operator, backend, variant, sizes, starts)
    assert_same(ours, truth_of(operator, variant, sum(sizes), starts, (), False))


@interpreted_by_default(starts=())
@others
@pytest.mark.parametrize("starts", ["no start", "start in the middle"])
def test_sequences_of_more_than_one_segment(operator, backend, variant, starts, monkeypatch):
    """Implementations may cut what is longer than a thousand tokens, to save memory."""
    time = 1200
    if backend == "triton" and operator in CUT_BY_CELLS:
        monkeypatch.setattr(f"seqzoo.kernels.{operator}.triton_op.CELLS", 1)  # segments as short as they can be
        time = 300
    whole, pieces = (in_pieces(operator, backend, variant, sizes, starts) for sizes in ([time], [time // 3] * 3))
    assert_same(whole, pieces, rtol=1e-9, atol=1e-9)


@interpreted_by_default()
@every
def test_documents_do_not_see_each_other(operator, backend, variant):
    """Packed side by side, a state in front, documents give what each gives alone."""
    lengths = [1, 66, 3, 30]
    inputs = example(operator, variant, time=sum(lengths))
    ends = torch.tensor(lengths).cumsum(0).tolist()
    starts = begin_at(sum(lengths))
    starts[:, [0, *ends[:-1]]] = True
    packed, state = call(operator, backend, inputs, starts)
    in_time = over(operator, variant, "time")
    for length, end, y in zip(lengths, ends, packed.split(lengths, 1), strict=True):
        document = select(without(inputs, "state"), in_time, (slice(None), slice(end - length, end)))
        alone, last = call(operator, backend, document)
        torch.testing.assert_close(y, alone, **EXACT)
    torch.testing.assert_close(state, last, **EXACT)


def strongly_decaying(operator, variant, where, amount, seed, **sizes):
    """An example that decays by ``amount`` at each token, or at one token in the middle of mild ones."""
    inputs = example(operator, variant, time=100, dtype=torch.float32, seed=seed, **sizes)
    (decay,) = inputs.keys() & DECAYS
    inputs[decay][:, slice(None) if where == "each token" else 40] = amount
    return inputs


@interpreted_by_default(operator=SINGLE, where=("one token",), amount=(-math.inf,))
@pytest.mark.parametrize("amount", [-50.0, -math.inf])
@pytest.mark.parametrize("where", ["each token", "one token"])
@gated
def test_stays_precise_under_strong_decay(operator, backend, variant, where, amount):
    heads = heads_for(backend in INTERPRETED)
    examples = [strongly_decaying(operator, variant, where, amount, seed, **heads) for seed in seeds_for(backend)]
    # What is not finite is not within any bound.
    assert_as_precise_as_plain_pytorch(operator, backend, examples)


@interpreted_by_default()
@forgetting
def test_a_strong_decay_forgets_all_before_it(operator, backend, variant):
    inputs = strongly_decaying(operator, variant, "one token", -math.inf, 0)
    if "a" in inputs:  # reads ahead of the decay, and writes what it read after it
        inputs["a"][:, 40] = 0
    y, state = call(operator, backend, inputs)
    later = select(without(inputs, "state"), over(operator, variant, "time"), (slice(None), slice(40, None)))
    alone, last = call(operator, backend, later)
    # With a bonus, a token reads what its own decay is about to remove.
    reads_first = int("bonus" in inputs)
    torch.testing.assert_close(y[:, 40 + reads_first :], alone[:, reads_first:], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(state, last, rtol=1e-5, atol=1e-6)


@parametrize(with_variants(pair for pair in EVERY if pair[0].endswith("scan")))
def test_scans_keep_to_the_equation_at_the_limits(operator, backend, variant):
    """Nothing kept, almost nothing, and all of it; the gates of the selective scan saturated both ways."""
    examples = []
    for seed in seeds_for(backend):
        inputs = example(operator, variant, time=100, dtype=torch.float32, seed=seed)
        if operator == "linear_scan":
            # The last axis is the one that a constant has as well.
            inputs["a"][..., :3] = torch.tensor([0, 1e-30, 1])
        else:
            inputs["dt"][:, ::7], inputs["dt"][:, 3::7] = 1e4, -1e4
            inputs["A"][:, 0] = -1e4
            if "gate" in inputs:
                inputs["gate"][:, ::5], inputs["gate"][:, 3::5] = 1e4, -1e4
        for name, tensor in differentiate(operator, backend, inputs).items():
            assert tensor.isfinite().all(), name
        examples.append(inputs)
    assert_as_precise_as_plain_pytorch(operator, backend, examples)


@interpreted_by_default()
@delta
def test_writes_with_strength_up_to_two(operator, backend, variant):
    time, heads = 70 if backend in INTERPRETED else 100, heads_for(backend in INTERPRETED)
    examples = []
    for seed in seeds_for(backend):
        inputs = example(operator, variant, time=time, dtype=torch.float32, seed=seed, **heads)
        inputs["beta"] = 2 * torch.rand(inputs["beta"].shape)
        inputs["beta"][:, ::3] = 2
        examples.append(inputs)
    assert_as_precise_as_plain_pytorch(operator, backend, examples)
    wide = convert(examples[0], torch.float64)
    assert_same(*(differentiate(operator, name, wide) for name in (backend, "reference")))


@interpreted_by_default(operator=SINGLE)
@delta
def test_repeated_keys_overwrite_each_other(operator, backend, variant):
    """The same key at each token, no decay: powers of the triangular matrix would pass 1e18."""
    time, heads = 70 if backend in INTERPRETED else 100, heads_for(backend in INTERPRETED)
    examples = []
    for seed in seeds_for(backend):
        inputs = example(operator, variant, time=time, dtype=torch.float32, seed=seed, **heads)
        inputs["k"] = inputs["k"][:, :1].expand_as(inputs["k"]).contiguous()
        inputs["beta"].fill_(1)
        if inputs.get("log_decay") is not None:
            inputs["log_decay"].zero_()
        examples.append(inputs)
    assert_as_precise_as_plain_pytorch(operator, backend, examples)
    if inputs["k"].shape == inputs["q"].shape:  # one write a token, so that what is read is what was written
        y, _ = call(operator, backend, inputs | {"q": inputs["k"]})
        torch.testing.assert_close(y, inputs["v"], rtol=1e-5, atol=1e-5)


@interpreted_by_default()
@every
def test_takes_strided_inputs_and_leaves_them_alone(operator, backend, variant):
    inputs, starts = example(operator, variant, time=70), STARTS["many starts"](70)
    truth = differentiate(operator, backend, inputs, starts)
    apart = tree_map_only(torch.Tensor, lambda x: torch.stack([x, x], -1)[..., 0], inputs)
    swapped = tree_map_only(
        torch.Tensor, lambda x: x.transpose(0, 1).contiguous().transpose(0, 1) if x.ndim > 1 else x, inputs
    )
    for strided in (apart, swapped):
        copies = tree_map_only(torch.Tensor, torch.clone, strided)
        with torch.no_grad():
            call(operator, backend, strided, starts)
        assert_same(named_tensors(strided), named_tensors(copies), rtol=0, atol=0)
        assert_same(differentiate(operator, backend, strided, starts.mT.contiguous().mT), truth)


@interpreted_by_default()
@every
def test_rows_are_independent(operator, backend, variant):
    inputs, starts = example(operator, variant, time=70), STARTS["many starts"](70)
    results = call(operator, backend, inputs, starts)
    row = select(inputs, over(operator, variant, "batch"), slice(1, None))
    expected = tree_map(lambda z: z[1:], results)
    torch.testing.assert_close(tree_leaves(call(operator, backend, row, starts[1:])), tree_leaves(expected), **EXACT)


@interpreted_by_default(operator=SINGLE)
@every
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_outputs_have_the_dtype_of_the_inputs_and_states_at_least_float32(operator, backend, variant, dtype):
    inputs = example(operator, variant, time=5, dtype=dtype)
    y, state = call(operator, backend, inputs)
    assert y.dtype == tree_leaves(inputs)[0].dtype
    assert [z.dtype for z in tree_leaves(state)] == [z.dtype for z in tree_leaves(inputs["state"])]
    # A convolution's state is inputs, not sums: nothing is lost by keeping it narrow.
    wide = dtype if operator.endswith("conv") else torch.promote_types(dtype, torch.float32)
    assert {z.real.dtype for z in tree_leaves(state) if not counts(z)} == {wide}


@interpreted_by_default()
@every
def test_autocast_changes_nothing(operator, backend, variant):
    inputs, starts = example(operator, variant, time=70, dtype=torch.float32), STARTS["many starts"](70)
    truth = differentiate(operator, backend, inputs, starts)
    inputs = learnable(inputs)
    with torch.autocast("cpu", torch.bfloat16):
        results = call(operator, backend, inputs, starts)
    assert_same(with_gradients(inputs, results), truth, rtol=0, atol=0)


def compare_compiled(operator, backend, variant, compiler, time):
    torch._dynamo.reset()
    inputs = learnable(example(operator, variant, time=time, **heads_for(backend in INTERPRETED)))
    starts = STARTS["many starts"](time)
    function = getattr(module(operator), operator)
    compiled = torch.compile(function, fullgraph=True, backend=compiler)
    results = (run(**inputs, starts=starts, backend=backend) for run in (compiled, function))
    assert_same(*(with_gradients(inputs, each) for each in results))


@interpreted_by_default(operator=SINGLE)
@parametrize(
    [(*pair, next(iter(equation(pair[0]).VARIANTS))) for pair in EVERY]
    + with_variants((operator, "auto") for operator in OPERATORS)
)
def test_compiles_in_one_graph(operator, backend, variant):
    compare_compiled(operator, backend, variant, "aot_eager", 3)


@pytest.mark.slow
@parametrize(with_variants((operator, "auto") for operator in OPERATORS))
def test_compiles_to_machine_code(operator, backend, variant):
    compare_compiled(operator, backend, variant, "inductor", 70)


@every
def test_refuses_a_shape_that_does_not_fit(operator, backend, variant, unchecked):
    inputs, starts = example(operator, variant, time=5), begin_at(5, 2)
    call(operator, backend, inputs, starts)
    for name, x in inputs.items():
        if not isinstance(x, torch.Tensor):
            continue
        # What the first input's shape says is taken for granted, so blame may fall on any other; any x is long enough.
        blame = "|".join(inputs) if name == next(iter(inputs)) else f"{name}|state"
        axes = (0, 2) if name == "x" else range(x.ndim)
        for wrong in [*(x.narrow(axis, 0, x.shape[axis] - 1) for axis in axes), x[None], x.flatten()[0]]:
            with pytest.raises(ValueError, match=rf"{operator}: .*\b({blame})\b.* expected [\[(]"):
                call(operator, backend, inputs | {name: wrong}, starts)
    for wrong in (starts[:, 1:], starts[:1], starts[0], starts[..., None]):
        with pytest.raises(ValueError, match=rf"{operator}: starts has shape .*; expected \(2, 5\)"):
            call(operator, backend, inputs, wrong)


@interpreted_by_default(operator=SINGLE)
@every
@pytest.mark.parametrize("time", [1, 70])
def test_an_empty_batch_gives_empty_answers(operator, backend, variant, time):
    inputs = example(operator, variant, time=time)
    expected = differentiate(operator, "reference", inputs)
    shared = tuple(f"gradient of ['{name}']" for name in inputs if name not in over(operator, variant, "batch"))
    empty = differentiate(operator, backend, select(inputs, over(operator, variant, "batch"), slice(0)))
    for name, tensor in expected.items():
        assert_same({name: empty[name]}, {name: torch.zeros_like(tensor) if name.startswith(shared) else tensor[:0]})


@every
def test_refuses_what_has_no_token(operator, backend, variant, unchecked):
    inputs = select(example(operator, variant), over(operator, variant, "time"), (slice(None), slice(0)))
    with pytest.raises(ValueError, match=rf"{operator}: \w+ has shape \(2, 0, .*; expected a time of 1 or more"):
        call(operator, backend, inputs)


@every
def test_refuses_what_kernels_would_misread(operator, backend, variant, unchecked):
    inputs, starts = example(operator, variant), begin_at(37, 2)
    for name, x in inputs.items():
        for wrong in [torch.int32, torch.float8_e4m3fn] if torch.is_tensor(x) and not x.is_complex() else []:
            with pytest.raises(ValueError, match=rf"{operator}: (\w+ is torch\.|.*dtype|.*expected all to be real)"):
                call(operator, backend, inputs | {name: x.to(wrong)}, starts)
    with pytest.raises(ValueError, match=rf"{operator}: starts is torch.uint8 on cpu; expected torch.bool on cpu"):
        call(operator, backend, inputs, starts.byte())


@parametrize([case for case in with_variants(EVERY) if "q" in example(case[0], case[2])])
def test_refuses_queries_of_another_dtype(operator, backend, variant, unchecked):
    inputs = example(operator, variant, dtype=torch.float32)
    with pytest.raises(ValueError, match=rf"{operator}: q is torch.float64 on cpu; expected .* torch.float32 on cpu"):
        call(operator, backend, inputs | {"q": inputs["q"].double()})


@parametrize(with_variants(EVERY, having=AT_MOST_ZERO))
def test_refuses_growth_when_ranges_are_checked(operator, backend, variant):
    inputs = example(operator, variant, time=1)
    with checked_ranges():
        call(operator, backend, inputs)
    for name in AT_MOST_ZERO:
        if inputs.get(name) is not None:
            growing = inputs | {name: inputs[name].clone().fill_(0.5)}
            with (
                checked_ranges(),
                pytest.raises(ValueError, match=rf"{operator}: .*{name} reaches 0.5; expected at most"),
            ):
                call(operator, backend, growing)
            call(operator, backend, growing)


@pytest.mark.parametrize("operator", OPERATORS)
def test_refuses_an_input_that_is_missing(operator, unchecked):
    parameters = inspect.signature(getattr(module(operator), operator)).parameters.values()
    needed = [x.name for x in parameters if x.default is inspect.Parameter.empty and "None" not in x.annotation]
    assert needed
    for name in needed:
        with pytest.raises(ValueError, match=rf"{operator}: {name} is None(Type)?; expected a "):
            call(operator, "auto", example(operator) | {name: None})


@every
def test_refuses_a_state_of_another_kind(operator, backend, variant, unchecked):
    inputs = example(operator, variant)
    for other in (tuple(inputs["state"]), [inputs["state"]]):
        with pytest.raises(ValueError, match=rf"{operator}: state is a (tuple|list); expected a \w+"):
            call(operator, backend, inputs | {"state": other})


@parametrize(
    [case for case in with_variants(EVERY) if "heads" in inspect.signature(equation(case[0]).example).parameters]
)
def test_refuses_what_has_no_heads(operator, backend, variant, unchecked):
    for none in ({"heads": 0}, {"groups": 0}, {"heads": 0, "groups": 0}):
        if none.keys() <= inspect.signature(equation(operator).example).parameters.keys():
            with pytest.raises(ValueError, match=rf"{operator}: .*\bheads?\b"):
                call(operator, backend, example(operator, variant, **none))


def test_short_conv_refuses_an_activation_that_it_does_not_have(unchecked):
    with pytest.raises(ValueError, match=r"activation='relu'; use silu or None"):
        call("short_conv", "auto", example("short_conv") | {"activation": "relu"})


@pytest.mark.parametrize("operator", OPERATORS)
def test_refuses_a_backend_that_does_not_exist(operator):
    names = ", ".join(["auto", *OPERATORS[operator]])
    with pytest.raises(ValueError, match=f"backend='magic' cannot run {operator}: .*; use {names}$"):
        call(operator, "magic", example(operator))


def test_the_names_of_all_backends_are_known():
    """Functions that run in plain PyTorch at a backend that only operators have refuse what none of them has."""
    assert set(backends.BACKENDS) == {name for names in (EVERY_OPERATOR | TOKENWISE).values() for name in names}


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
    first, *rest = module(operator).explain(time, "cpu", torch.float64).splitlines()
    assert first == f"{operator}, {time} token(s) of float64 on cpu: {chosen}"
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


@pytest.fixture
def without_native(monkeypatch):
    monkeypatch.setattr(native, "reason", lambda: "no library was built")
    backends._warn_that_native_is_missing.cache_clear()


@pytest.mark.parametrize("operator", [operator for operator, name in EVERY if name == "native"])
def test_auto_says_once_that_native_kernels_are_missing(operator, without_native):
    with pytest.warns(UserWarning, match="without its native kernels, many times slower: no library was built") as seen:
        for _ in range(2):
            call(operator, "auto", example(operator))
    assert len(seen) == 1
    assert "not native: no library was built" in module(operator).explain(5)
    with pytest.raises(ValueError, match=f"backend='native' cannot run {operator}: no library was built; use auto, "):
        call(operator, "native", example(operator))


@pytest.mark.parametrize(("time", "within"), [(1 << 13, True), (1 << 16, False)])
def test_heads_that_lie_too_far_apart_for_32_bits_are_copied(time, within):
    heads_first = torch.empty(1, 256, time, 512, device="meta").transpose(1, 2)
    x = triton_support.heads_within_reach(heads_first)
    assert x.shape == heads_first.shape and x.is_contiguous() != within
    assert triton_support.heads_within_reach(x) is x
