"""Mamba-3's turned queries and keys: the native kernel is the equation, with gradients, in any layout and dtype."""

from __future__ import annotations

import math

import pytest
import torch

from seqzoo.kernels import native
from seqzoo.kernels.turned_keys import turned_keys

STARTS = {"no starts": None, "few starts": 0.02, "many starts": 0.3, "all start": 1.0}
SIZES = {
    "one group": {"groups": 1, "heads": 3, "key": 16, "pairs": 4},
    "a group a head": {"groups": 2, "heads": 2, "key": 5, "pairs": 2, "channels": 3},
    "all turns": {"groups": 2, "heads": 4, "key": 6, "pairs": 3, "channels": 33},
}

starts = pytest.mark.parametrize("starts", STARTS.values(), ids=STARTS)
with_state = pytest.mark.parametrize("with_state", [True, False], ids=["state", "no state"])


def example(
    starts,
    with_state=True,
    dtype=torch.float64,
    batch=2,
    time=50,
    groups=2,
    heads=4,
    key=8,
    pairs=2,
    channels=5,
    seed=0,
):
    random = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(shape, generator=random, dtype=torch.float64).bfloat16().double()

    # Tokens of values lie apart, as slices of a wider projection do.
    narrow = {
        "write": draw(batch, time, groups, key),
        "read": draw(batch, time, groups, key),
        "values": draw(batch, time, 2 * heads * channels)[..., : heads * channels].unflatten(-1, (heads, channels)),
        "value": draw(batch, heads, channels),
    }
    wide = {
        "write_bias": draw(heads, key),
        "read_bias": draw(heads, key),
        "turn": draw(batch, time, pairs),
        "step": draw(batch, time, heads).exp(),
        "gain": draw(batch, time, heads),
        "angle": draw(batch, heads, pairs).abs(),
        "key": draw(batch, heads, key),
    }
    inputs = {name: x.to(dtype) for name, x in narrow.items()}
    inputs |= {name: x.to(torch.promote_types(dtype, torch.float32)) for name, x in wide.items()}
    if not with_state:
        for name in ("angle", "key", "value"):
            del inputs[name]
    return inputs, None if starts is None else torch.rand(batch, time, generator=random) < starts


def with_gradients(inputs, outputs):
    random = torch.Generator().manual_seed(1)
    weights = [torch.randn(y.shape, generator=random).bfloat16().to(y.dtype) for y in outputs.values()]
    gradients = torch.autograd.grad(list(outputs.values()), list(inputs.values()), weights, materialize_grads=True)
    results = {name: y.detach() for name, y in outputs.items()}
    return results | {f"gradient of {name}": x for name, x in zip(inputs, gradients, strict=True)}


def differentiate(inputs, starts, backend):
    inputs = {name: x.detach().requires_grad_() for name, x in inputs.items()}
    return with_gradients(inputs, turned_keys(**inputs, starts=starts, backend=backend)._asdict())


def token_by_token(
    write, read, write_bias, read_bias, turn, step, gain, values, angle=None, key=None, value=None, *, starts
):
    (batch, time, heads, channels), size = values.shape, write.shape[3]
    shared, pairs = heads // write.shape[2], turn.shape[2]
    angle = values.new_zeros(batch, heads, pairs) if angle is None else angle
    key = values.new_zeros(batch, heads, size) if key is None else key
    value = values.new_zeros(batch, heads, channels) if value is None else value
    steps = []
    for t in range(time):
        if starts is not None:
            begin = starts[:, t, None, None]
            angle, key, value = (z.masked_fill(begin, 0) for z in (angle, key, value))
        angle = angle + step[:, t, :, None] * turn[:, t, None]
        own_key = write[:, t].repeat_interleave(shared, 1) + write_bias
        query = read[:, t].repeat_interleave(shared, 1) + read_bias
        # Pairs are complex numbers.
        turned, q = (
            torch.cat(
                [
                    torch.view_as_real(
                        torch.view_as_complex(z[..., : 2 * pairs].unflatten(-1, (pairs, 2)).contiguous())
                        * torch.polar(torch.ones_like(angle), angle)
                    ).flatten(-2),
                    z[..., 2 * pairs :],
                ],
                -1,
            )
            for z in (own_key, query)
        )
        steps.append((q, gain[:, t, :, None] * key, value, (own_key * query).sum(-1)))
        key, value = turned, values[:, t]
    q, k, v, own = (torch.stack(z, 1) for z in zip(*steps, strict=True))
    return {"q": q, "k": k, "v": v, "own": own, "last_angle": angle % (2 * math.pi), "last_key": key}


def assert_same(ours, truth):
    assert ours.keys() == truth.keys()
    for name, tensor in truth.items():
        torch.testing.assert_close(ours[name], tensor, rtol=1e-10, atol=1e-10, msg=lambda text, n=name: f"{n}: {text}")


@starts
@with_state
@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
@pytest.mark.parametrize("backend", ["reference", "native"])
def test_is_the_equation(backend, sizes, with_state, starts):
    inputs, begins = example(starts, with_state, **sizes)
    inputs = {name: x.detach().requires_grad_() for name, x in inputs.items()}
    truth = with_gradients(inputs, token_by_token(**inputs, starts=begins))
    assert_same(differentiate(inputs, begins, backend), truth)


@starts
@with_state
@pytest.mark.parametrize("time", [1, 2, 31, 32, 33, 64, 65, 300])
def test_any_number_of_tokens(time, with_state, starts):
    inputs, begins = example(starts, with_state, time=time)
    assert_same(differentiate(inputs, begins, "native"), differentiate(inputs, begins, "reference"))


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("batch", [0, 1, 3, 70])
def test_any_number_of_rows_and_threads(batch, threads):
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        inputs, begins = example(0.02, batch=batch, time=90, heads=8, key=40)
        assert_same(differentiate(inputs, begins, "native"), differentiate(inputs, begins, "reference"))
    finally:
        torch.set_num_threads(before)


@starts
@with_state
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_rounds_no_worse_than_plain_pytorch(dtype, with_state, starts):
    inputs, begins = example(starts, with_state, dtype, time=300, key=24, pairs=6, channels=16)
    exact = differentiate({name: x.double() for name, x in inputs.items()}, begins, "reference")
    ours, plain = (differentiate(inputs, begins, backend) for backend in ("native", "reference"))
    for name, truth in exact.items():
        assert ours[name].dtype == plain[name].dtype
        error, allowed = ((side[name].double() - truth).norm() for side in (ours, plain))
        assert error <= max(2 * allowed, 3 * torch.finfo(torch.float32).eps * truth.norm()), name


@pytest.mark.parametrize("scale", [0.0, 1e4, 1e15, 1e25])
def test_finite_however_fast_it_turns(scale):
    inputs, begins = example(0.02, dtype=torch.float32)
    inputs["step"] = inputs["step"] * scale
    for name, tensor in differentiate(inputs, begins, "native").items():
        assert tensor.isfinite().all(), name


def test_is_not_a_number_where_its_input_is_not():
    inputs, _ = example(None, with_state=False, batch=1)
    inputs["step"][0, 20, 1] = torch.nan
    q = turned_keys(**inputs, backend="native").q
    assert q[0, 20:, 1, :4].isnan().all() and q[0, :20].isfinite().all() and q[0, :, 0].isfinite().all()


@with_state
def test_is_an_operator_of_torch(with_state):
    inputs, begins = example(0.02, with_state, torch.float32)
    inputs = {name: x.detach().requires_grad_() for name, x in inputs.items()}
    compiled = torch.compile(turned_keys, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(**inputs, starts=begins), turned_keys(**inputs, starts=begins))
    names = ["write", "read", "write_bias", "read_bias", "turn", "step", "gain", "values", "angle", "key", "value"]
    arguments = (*(inputs.get(name) for name in names), begins)
    torch.library.opcheck(torch.ops.seqzoo.turned_keys_native.default, arguments)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"write": torch.ones(2, 50, 3, 8), "read": torch.ones(2, 50, 3, 8)}, "do not fit together"),
        ({"read": torch.ones(2, 50, 2, 6)}, r"read \(2, 50, 2, 6\), .* do not fit together"),
        ({"turn": torch.ones(2, 50, 5)}, "turn has 5 pairs; expected 1 or more, at most all of the 8 channels"),
        ({"turn": torch.ones(2, 50, 0)}, "turn has 0 pairs"),
        ({"write_bias": torch.ones(8)}, r"write_bias has shape \(8,\); expected \(4, 8\)"),
        ({"step": torch.ones(2, 50, 3)}, r"step has shape \(2, 50, 3\); expected \(2, 50, 4\)"),
        ({"angle": torch.ones(2, 4, 3)}, r"angle has shape \(2, 4, 3\); expected \(2, 4, 2\)"),
        ({"value": torch.ones(2, 4, 4)}, r"value has shape \(2, 4, 4\); expected \(2, 4, 5\)"),
        ({"starts": torch.ones(2, 3).bool()}, r"starts has shape \(2, 3\); expected \(2, 50\)"),
        ({"values": torch.ones(2, 50, 4, 5).bfloat16()}, "write is torch.float32"),
        ({"gain": torch.ones(2, 50, 4).long()}, "gain is torch.int64"),
        ({"step": None}, "step is None; expected a tensor"),
        ({"backend": "magic"}, "backend='magic' cannot run turned_keys: there is no such backend; use auto, reference"),
    ],
)
def test_refuses_what_does_not_fit(settings, message, unchecked):
    inputs, begins = example(0.02, dtype=torch.float32)
    with pytest.raises(ValueError, match=message):
        turned_keys(**{**inputs, "starts": begins} | settings)


def test_refuses_native_where_it_cannot_run(monkeypatch):
    monkeypatch.setattr(native, "reason", lambda: "no compiler was found")
    with pytest.raises(ValueError, match="cannot run turned_keys: no compiler was found; use auto or reference"):
        turned_keys(**example(None)[0], backend="native")
