"""Softmax attention: every implementation is the equation, with gradients, whatever is visible and in any dtype."""

from __future__ import annotations

import math
from functools import cache

import pytest
import torch
import torch.nn.functional as F

from seqzoo.kernels import attention as module
from seqzoo.kernels import checked_ranges
from seqzoo.kernels.attention import IMPLEMENTATIONS, attention

EXACT = {"rtol": 1e-10, "atol": 1e-10}
OTHERS = [name for name in IMPLEMENTATIONS if name not in ("reference", "sdpa")]
# Tokens, slots, query heads, key heads.
SIZES = {"one token": (1, 1, 2, 2), "decoding": (1, 300, 6, 2), "short": (70, 70, 2, 2), "goes on": (100, 231, 6, 2)}
SIZES |= {"one key head": (180, 180, 4, 1)}
SETTINGS = {
    "all": {},
    "window": {"window": 5},
    "wide window": {"window": 150},
    "window and sinks": {"window": 100, "sinks": 3},
    "cap": {"soft_cap": 2.0, "scale": 0.7},
    "all at once": {"window": 150, "sinks": 2, "soft_cap": 3.0},
}
EXTRAS = {"plain": (), "documents": ("first",), "forgetting": ("log_forget",), "sink": ("sink",)}
EXTRAS |= {"everything": ("first", "log_forget", "sink")}

sizes = pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
settings = pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
extras = pytest.mark.parametrize("extras", EXTRAS.values(), ids=EXTRAS)
others = pytest.mark.parametrize("backend", OTHERS)
# Of Triton's interpreter, which takes seconds for each of these: see tests/test_kernels.py.
interpreted_by_default = pytest.mark.interpreted_by_default
# Several blocks of queries and slots, all of them ragged.
BLOCKS = {
    "all": ((70, 70, 2, 2), (), {}),
    "goes on": ((40, 75, 4, 2), EXTRAS["everything"], {"window": 40, "sinks": 2, "soft_cap": 3.0}),
    "documents": ((100, 100, 2, 1), ("first",), {}),
    "documents with sinks": ((100, 100, 2, 1), ("first",), {"window": 9, "sinks": 3}),
    "far sinks": ((90, 140, 1, 1), ("sink",), {"window": 20, "sinks": 40}),
    "forgetting": ((70, 100, 2, 1), ("log_forget",), {"scale": 0.7}),
    "documents behind a prefix": ((80, 120, 2, 1), ("first", "sink"), {"window": 9, "prefix": 40}),
    "all behind a prefix": ((40, 90, 1, 1), (), {"prefix": 3}),
    "sinks behind a prefix": ((90, 160, 1, 1), (), {"window": 20, "sinks": 35, "prefix": 20}),
}


def example(sizes, extras, dtype=torch.float64, seed=0, key=10, value=7, prefix=0):
    random = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(shape, generator=random, dtype=torch.float64).bfloat16().to(dtype)

    time, slots, heads, groups = sizes
    inputs = {"q": draw(2, time, heads, key), "k": draw(2, slots, groups, key), "v": draw(2, slots, groups, value)}
    wide = torch.promote_types(dtype, torch.float32)
    if "log_forget" in extras:
        inputs["log_forget"] = F.logsigmoid(draw(2, slots, heads).to(wide) + 1)
    if "sink" in extras:
        inputs["sink"] = draw(heads).to(wide)
    if "first" in extras:
        begins = torch.rand(2, slots, generator=random) < 0.03
        last = torch.where(begins, torch.arange(slots), 0).cummax(1).values
        inputs["first"] = last[:, slots - time :].clamp(min=prefix)
    return inputs


def differentiate(inputs, settings, backend):
    inputs = {name: x.detach().requires_grad_(x.is_floating_point()) for name, x in inputs.items()}
    o = attention(**inputs, **settings, backend=backend)
    weight = torch.randn(o.shape, generator=torch.Generator().manual_seed(1)).bfloat16().to(o.dtype)
    learned = {name: x for name, x in inputs.items() if x.requires_grad}
    return {"o": o.detach()} | dict(zip(learned, torch.autograd.grad(o, list(learned.values()), weight), strict=True))


@cache
def truth_of(sizes, extras, settings):
    return differentiate(example(sizes, extras), dict(settings), "reference")


def assert_same(ours, truth, **tolerance):
    for name, expected in truth.items():
        torch.testing.assert_close(
            ours[name], expected, **(tolerance or EXACT), msg=lambda text, name=name: f"{name}: {text}"
        )


@pytest.mark.parametrize("backend", ["reference", "chunked", "native"])
def test_an_empty_batch_gives_empty_answers(backend):
    inputs = example((5, 9, 4, 2), EXTRAS["everything"])
    empty = differentiate({name: x if name == "sink" else x[:0] for name, x in inputs.items()}, {}, backend)
    for name, tensor in differentiate(inputs, {}, "reference").items():
        assert_same({name: empty[name]}, {name: torch.zeros_like(tensor) if name == "sink" else tensor[:0]})


def written_out(
    q, k, v, log_forget=None, sink=None, first=None, *, window=None, sinks=0, prefix=0, soft_cap=None, scale=None
):
    """The equation pair by pair, in Python numbers where that is possible."""
    batch, time, heads, key = q.shape
    slots, shared = k.shape[1], heads // k.shape[2]
    scale = 1 / math.sqrt(key) if scale is None else scale
    rows = []
    for b in range(batch):
        for t in range(time):
            own, since = slots - time + t, prefix if first is None else int(first[b, t])
            seen = [j for j in range(since, own + 1) if window is None or own - j < window or j - since < sinks]
            seen = [*range(prefix), *seen]
            for h in range(heads):
                logits = torch.stack([scale * (q[b, t, h] * k[b, j, h // shared]).sum() for j in seen])
                if soft_cap is not None:
                    logits = soft_cap * torch.tanh(logits / soft_cap)
                if log_forget is not None:
                    logits = logits + torch.stack([log_forget[b, j + 1 : own + 1, h].sum() for j in seen])
                weights = logits.exp()
                total = weights.sum() + (0 if sink is None else sink[h].exp())
                rows.append(sum(w * v[b, j, h // shared] for w, j in zip(weights / total, seen, strict=True)))
    return torch.stack(rows).view(batch, time, heads, -1)


@settings
@extras
def test_the_reference_is_the_equation(settings, extras):
    inputs = example((6, 11, 4, 2), extras)
    settings = {name: min(value, 3) if name == "window" else value for name, value in settings.items()}
    torch.testing.assert_close(
        attention(**inputs, **settings, backend="reference"), written_out(**inputs, **settings), **EXACT
    )


PREFIXES = {"all": {}, "window": {"window": 5}, "wide window": {"window": 150}, "cap": {"soft_cap": 2.0}}
PREFIXES |= {"sinks": {"window": 4, "sinks": 3}}
prefixes = pytest.mark.parametrize("settings", PREFIXES.values(), ids=PREFIXES)
behind = pytest.mark.parametrize("extras", [(), ("first",), ("first", "sink")], ids=str)


@prefixes
@behind
def test_the_reference_is_the_equation_with_a_prefix(settings, extras):
    inputs, settings = example((6, 14, 4, 2), extras, prefix=3), settings | {"prefix": 3}
    torch.testing.assert_close(
        attention(**inputs, **settings, backend="reference"), written_out(**inputs, **settings), **EXACT
    )


@pytest.mark.parametrize("sizes", [(1, 200, 4, 2), (70, 220, 2, 2), (200, 205, 6, 2)], ids=str)
@prefixes
@behind
@interpreted_by_default()
@others
def test_equals_the_reference_with_a_prefix(backend, sizes, settings, extras):
    for prefix in (5, min(150, sizes[1] - sizes[0])):
        inputs = example(sizes, extras, prefix=prefix)
        truth = differentiate(inputs, settings | {"prefix": prefix}, "reference")
        assert_same(differentiate(inputs, settings | {"prefix": prefix}, backend), truth)


@sizes
@settings
@extras
@interpreted_by_default()
@others
def test_equals_the_reference(backend, sizes, settings, extras):
    truth = truth_of(sizes, extras, tuple(settings.items()))
    assert_same(differentiate(example(sizes, extras), settings, backend), truth)


@pytest.mark.parametrize(("sizes", "extras", "settings"), BLOCKS.values(), ids=BLOCKS)
def test_blocks_of_the_gpus_kernels(sizes, extras, settings):
    inputs = example(sizes, extras, prefix=settings.get("prefix", 0))
    truth = differentiate(inputs, settings, "reference")
    assert_same(differentiate(inputs, settings, "triton"), truth)


def test_gpus_kernels_do_not_read_what_is_pruned():
    inputs = example((100, 100, 2, 1), ())
    inputs["q"] = inputs["q"] / 50
    inputs["log_forget"] = torch.full((2, 100, 2), -2.0, dtype=torch.float64)
    truth = differentiate(inputs, {}, "reference")
    # Less than all digits hold.
    assert_same(differentiate(inputs, {"prune": 1e-12}, "triton"), truth)
    inputs["v"][:, :30] = torch.nan
    assert attention(**inputs, prune=1e-12, backend="triton")[:, 64:].isfinite().all()


@pytest.mark.parametrize("sizes", [(1, 300, 6, 2), (70, 70, 6, 2), (1, 1, 2, 2)], ids=str)
def test_pytorchs_kernels_are_the_equation(sizes):
    inputs = example(sizes, (), dtype=torch.float32)
    truth = differentiate(inputs, {"scale": 0.3}, "reference")
    assert_same(differentiate(inputs, {"scale": 0.3}, "sdpa"), truth, rtol=1e-4, atol=1e-5)


def test_pytorchs_kernels_see_a_prefix_of_one_token():
    inputs, settings = example((1, 40, 6, 2), ("first",), torch.float32, prefix=3), {"window": 9, "prefix": 3}
    truth = differentiate(inputs, settings, "reference")
    assert_same(differentiate(inputs, settings, "sdpa"), truth, rtol=1e-4, atol=1e-5)


@settings
@interpreted_by_default(settings=(SETTINGS["cap"],))
@others
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_rounds_no_worse_than_plain_pytorch(backend, settings, dtype):
    sizes = (40, 200, 2, 1) if backend == "triton" else (200, 300, 4, 2)
    inputs = example(sizes, EXTRAS["everything"], dtype)
    wide = {name: x.double() if x.is_floating_point() else x for name, x in inputs.items()}
    exact = differentiate(wide, settings, "reference")
    ours, plain = (differentiate(inputs, settings, name) for name in (backend, "reference"))
    for name, truth in exact.items():
        assert ours[name].dtype == plain[name].dtype
        error, allowed = ((side[name].double() - truth).norm() / truth.norm() for side in (ours, plain))
        # Fused kernels round weights to the inputs' precision before they meet values, where tensor cores want that.
        fused = backend == "triton" or (backend == "native" and dtype == torch.bfloat16)
        floor = torch.finfo(dtype).eps if fused and dtype != torch.float32 else 3 * torch.finfo(torch.float32).eps
        assert error <= max(2 * allowed, floor), (name, error, allowed)


@pytest.mark.parametrize("threads", [1, 7])
def test_any_number_of_threads(threads):
    """More threads than heads share one head's slots."""
    inputs, before = example((300, 300, 4, 1), EXTRAS["everything"]), torch.get_num_threads()
    truth = differentiate(inputs, {}, "reference")
    torch.set_num_threads(threads)
    try:
        assert_same(differentiate(inputs, {}, "native"), truth)
    finally:
        torch.set_num_threads(before)


@interpreted_by_default()
@others
def test_reads_slices_of_larger_tensors(backend):
    """A buffer with room for more slots, a projection's output, one query for all tokens."""
    inputs = example((40, 50, 4, 2), ("log_forget",))
    truth = differentiate(inputs, {}, "reference")

    def roomy(x):
        buffer = torch.full((2, 90, 3, x.shape[3] + 1), torch.nan, dtype=x.dtype)[:, 20:70, :2, : x.shape[3]]
        return buffer.copy_(x)

    both = torch.cat([inputs["k"].flatten(2), inputs["v"].flatten(2)], 2)
    of_projection = (z.unflatten(2, (2, -1)) for z in both.split([20, 14], 2))
    for k, v in ([roomy(inputs[name]) for name in "kv"], of_projection):
        assert not k.is_contiguous() and not v.is_contiguous()
        assert_same(differentiate(inputs | {"k": k, "v": v}, {}, backend), truth)
    one = {"q": inputs["q"][:, :1].expand(-1, 40, -1, -1)}
    truth = differentiate(inputs | {"q": one["q"].contiguous()}, {}, "reference")
    assert_same(differentiate(inputs | one, {}, backend), truth)


@interpreted_by_default()
@others
def test_goes_on_as_if_all_came_at_once(backend):
    inputs = example((150, 150, 4, 2), EXTRAS["everything"])
    whole = attention(**inputs, window=40, sinks=2, backend=backend)
    for cut in (1, 60, 149):
        later = inputs | {"q": inputs["q"][:, cut:], "first": inputs["first"][:, cut:]}
        torch.testing.assert_close(attention(**later, window=40, sinks=2, backend=backend), whole[:, cut:], **EXACT)


@interpreted_by_default()
@others
@pytest.mark.parametrize("prune", [1e-3, 1e-8])
def test_pruning_takes_no_more_weight_than_it_may(backend, prune):
    inputs = example((400, 400, 4, 2), ("log_forget",))
    inputs["q"] = inputs["q"] / 4
    whole, pruned = (attention(**inputs, prune=p, backend=backend) for p in (None, prune))
    difference = (whole - pruned).abs().max()
    assert difference <= 2 * prune * inputs["v"].abs().max()
    if prune == 1e-3 and backend != "triton":  # whose test with NaN stands above
        assert difference > 0


@interpreted_by_default(dtype=(torch.float32,))
@others
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_nothing_is_left_of_what_is_forgotten_and_all_digits_of_what_is_not(backend, dtype):
    inputs = example((50, 50, 4, 2), ("log_forget",), dtype)
    inputs["log_forget"][:, 20] = -1e4
    later = attention(**{name: x[:, 20:].double() for name, x in inputs.items()})
    found = differentiate(inputs, {}, backend)
    torch.testing.assert_close(found["o"][:, 20:].double(), later, rtol=1e-5, atol=1e-5)
    truth = differentiate({name: x.double() for name, x in inputs.items()}, {}, "reference")
    assert_same({name: x.double() for name, x in found.items()}, truth, rtol=1e-5, atol=1e-5)


@interpreted_by_default(scale=(1e4,))
@others
@pytest.mark.parametrize("scale", [0.0, 1e4])
def test_finite_at_hostile_inputs(backend, scale):
    inputs = example((130, 130, 2, 1), EXTRAS["everything"], torch.float32)
    inputs |= {name: inputs[name] * scale for name in ("q", "k")}
    inputs["log_forget"] = inputs["log_forget"] * 1e4
    for name, tensor in differentiate(inputs, {"window": 40}, backend).items():
        assert tensor.isfinite().all(), name


# Tokens and slots of calls that compile to one graph.
LENGTHS = [((20, 20), (33, 33)), ((1, 20), (1, 33)), ((8, 33), (20, 41))]


@pytest.mark.parametrize(
    ("backend", "lengths"),
    [("sdpa", x) for x in LENGTHS[:2]] + [("native", x) for x in LENGTHS] + [("triton", x) for x in LENGTHS[1:]],
    ids=str,
)
def test_one_graph_serves_other_lengths(backend, lengths):
    extras, settings = EXTRAS["everything"], {"window": 6, "sinks": 1, "soft_cap": 2.0}
    if backend == "sdpa":
        extras, settings = (), {}
    compiled = torch.compile(attention, fullgraph=True, backend="aot_eager", dynamic=True)
    torch._dynamo.reset()
    with torch._dynamo.config.patch(error_on_recompile=True):
        for time, slots in lengths:
            inputs = example((time, slots, 2, 1), extras, torch.float32)
            inputs = {name: x.requires_grad_(x.is_floating_point()) for name, x in inputs.items()}
            ours, truth = (f(**inputs, **settings, backend=backend) for f in (compiled, attention))
            torch.testing.assert_close(ours, truth)


@pytest.mark.parametrize("sizes", [(20, 20, 2, 1), (1, 33, 2, 1), (7, 12, 2, 2)], ids=str)
@pytest.mark.parametrize("backend", ["native", "triton"])
def test_is_an_operator_of_torch(backend, sizes):
    inputs = example(sizes, EXTRAS["everything"], torch.float32)
    inputs = {name: x.requires_grad_(x.is_floating_point()) for name, x in inputs.items()}
    decay = torch.randn(2, sizes[2], sizes[1], dtype=torch.float64).requires_grad_()
    given = [inputs["q"], inputs["k"], inputs["v"], decay, inputs["sink"], inputs["first"], None]
    operator = getattr(torch.ops.seqzoo, f"attention_{backend}").default
    torch.library.opcheck(operator, (*given, 6, 1, 0, 2.0, 0.3))
    torch.library.opcheck(operator, (*given[:3], None, None, None, None, 0, 0, 0, 0.0, 0.3))


def test_explains_what_auto_runs():
    assert module.explain(5, "cpu", torch.float32).startswith("attention, 5 token(s) of float32 on cpu: native")


def bad(**changes):
    inputs = example((3, 5, 4, 2), ("log_forget", "sink", "first"), torch.float32)
    return inputs | {name: change(inputs.get(name)) for name, change in changes.items()}


@pytest.mark.parametrize(
    ("inputs", "settings", "message"),
    [
        (bad(q=lambda x: x[0]), {}, "do not fit together"),
        (bad(k=lambda x: x[..., :3]), {}, r"k \(2, 5, 2, 3\), v .* do not fit together"),
        (bad(k=lambda x: x[:, :2], v=lambda x: x[:, :2]), {}, "at least as many slots"),
        (bad(q=lambda x: x[:, :, :3]), {}, "heads that are a multiple of groups"),
        (bad(log_forget=lambda x: x[:, 1:]), {}, r"log_forget has shape \(2, 4, 4\); expected \(2, 5, 4\)"),
        (bad(sink=lambda x: x[1:]), {}, r"sink has shape \(3,\); expected \(4,\)"),
        (bad(first=lambda x: x.int()), {}, "first is torch.int32 on cpu; expected torch.int64"),
        (bad(q=lambda x: x.double()), {}, "k is torch.float32 on cpu; expected what q is, torch.float64 on cpu"),
        (bad(v=lambda x: x.long()), {}, "v is torch.int64 on cpu; expected one of float32, bfloat16, float16, float64"),
        (bad(sink=lambda x: x.long()), {}, "sink is torch.int64 on cpu; expected one of float32, "),
        (bad(), {"window": 0}, "window=0; a token sees at least itself"),
        (bad(), {"sinks": 2}, "sinks=2 with window=None"),
        (bad(), {"soft_cap": 0.0}, "soft_cap=0.0; expected a finite number above 0"),
        (bad(log_forget=lambda x: None), {"prefix": 3}, "prefix=3 with 2 slots in front of the tokens'"),
        (bad(), {"prefix": 1}, "prefix=1 .*log_forget given; expected 0 to 2, and 0 where something is forgotten"),
        (bad(), {"prune": 1.5}, "prune=1.5; expected a number between 0 and 1"),
        (bad(), {"backend": "sdpa"}, "backend='sdpa' cannot run attention: PyTorch has no forgetting"),
        (
            bad(v=lambda x: x.repeat(1, 1, 1, 37)),
            {"backend": "triton"},
            "keys of 10 and values of 259; its kernels take 256 or fewer; use auto, chunked or reference",
        ),
        (bad(k=lambda x: None), {}, "attention: k is None; expected a tensor"),
        (bad(q=lambda x: x[:, :, :0]), {}, r"q \(2, 3, 0, 10\), .* heads that are a multiple of groups"),
        (bad(), {"backend": "magic"}, "backend='magic' cannot run attention"),
    ],
)
def test_refuses_what_does_not_fit(inputs, settings, message, unchecked):
    with pytest.raises(ValueError, match=message):
        attention(**inputs, **settings)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda x: x * 0 + 4, "up to 2 slots after a token's own"),  # its slots are 2, 3 and 4
        (lambda x: x - 9, "below 0 or falls"),
        (lambda x: torch.tensor([[1, 2, 1]] * 2), "below 0 or falls"),
    ],
)
def test_refuses_documents_that_hide_a_token_when_ranges_are_checked(change, message):
    with checked_ranges():
        attention(**bad())
        with pytest.raises(ValueError, match=f"first is {message}"):
            attention(**bad(first=change))


@pytest.mark.parametrize(("value", "message"), [(0.5, "at most 0"), (-math.inf, "finite numbers")])
def test_refuses_growth_and_infinities_when_ranges_are_checked(value, message):
    with checked_ranges(), pytest.raises(ValueError, match=rf"log_forget reaches {value}; expected {message}"):
        attention(**bad(log_forget=lambda x: torch.full_like(x, value)))
