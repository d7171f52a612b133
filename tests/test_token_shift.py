"""RWKV's token shift: the native kernel is the equation, with gradients, in any layout and dtype."""

from __future__ import annotations

import pytest
import torch

from seqzoo.kernels import native
from seqzoo.kernels.token_shift import token_shift

NARROW = [torch.float32, torch.bfloat16, torch.float16]
STARTS = {"no starts": None, "starts": 0.2, "all start": 1.0}
OPTIONAL = {"alone": (), "last": ("last",), "last and more": ("last", "more"), "more": ("more",)}

starts = pytest.mark.parametrize("starts", STARTS.values(), ids=STARTS)
optional = pytest.mark.parametrize("optional", OPTIONAL.values(), ids=OPTIONAL)


def example(starts, optional, dtype=torch.float64, batch=2, time=50, dim=37, glances=3, seed=0):
    random = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(shape, generator=random, dtype=torch.float64).bfloat16().to(dtype)

    inputs = {"x": draw(batch, time, 2 * dim)[..., dim:], "mix": draw(glances, dim)}
    more = {"last": draw(batch, dim), "more": draw(glances, batch, time, dim)}
    inputs |= {name: more[name] for name in optional}
    return inputs, None if starts is None else torch.rand(batch, time, generator=random) < starts


def differentiate(inputs, starts, backend, dtype=None):
    inputs = {name: x.detach().requires_grad_() for name, x in inputs.items()}
    glances = token_shift(**inputs, starts=starts, dtype=dtype, backend=backend)
    random = torch.Generator().manual_seed(1)
    weights = [torch.randn(y.shape, generator=random).bfloat16().to(y.dtype) for y in glances]
    gradients = torch.autograd.grad(glances, list(inputs.values()), weights)
    return {f"glance {z}": y.detach() for z, y in enumerate(glances)} | dict(zip(inputs, gradients, strict=True))


def token_by_token(x, mix, last=None, more=None, *, starts):
    outputs = []
    before = torch.zeros_like(x[:, 0]) if last is None else last
    for t, now in enumerate(x.unbind(1)):
        if starts is not None:
            before = before.masked_fill(starts[:, t, None], 0)
        whole = mix[:, None] if more is None else mix[:, None] + more[:, :, t]
        outputs.append(now + (before - now) * whole)
        before = now
    return torch.stack(outputs, 2).unbind(0)


def assert_same(ours, truth):
    assert ours.keys() == truth.keys()
    for name, tensor in truth.items():
        torch.testing.assert_close(ours[name], tensor, rtol=1e-10, atol=1e-10, msg=lambda text, n=name: f"{n}: {text}")


@starts
@optional
@pytest.mark.parametrize("backend", ["reference", "native"])
@pytest.mark.parametrize("time", [1, 2, 50])
def test_is_the_equation(backend, starts, optional, time):
    inputs, begins = example(starts, optional, time=time)
    inputs = {name: x.requires_grad_() for name, x in inputs.items()}
    glances = token_by_token(**inputs, starts=begins)
    random = torch.Generator().manual_seed(1)
    weights = [torch.randn(y.shape, generator=random).bfloat16().to(y.dtype) for y in glances]
    gradients = torch.autograd.grad(glances, list(inputs.values()), weights)
    truth = {f"glance {z}": y for z, y in enumerate(glances)} | dict(zip(inputs, gradients, strict=True))
    assert_same(differentiate(inputs, begins, backend), truth)


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("glances", [1, 6])
@pytest.mark.parametrize("batch", [0, 1, 3, 70])
def test_any_number_of_rows_and_glances(batch, glances, threads):
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        inputs, begins = example(0.2, ("last", "more"), batch=batch, time=90, glances=glances)
        assert_same(differentiate(inputs, begins, "native"), differentiate(inputs, begins, "reference"))
    finally:
        torch.set_num_threads(before)


@starts
@optional
@pytest.mark.parametrize("glances", NARROW, ids=str)
@pytest.mark.parametrize("dtype", NARROW, ids=str)
def test_rounds_no_worse_than_plain_pytorch(dtype, glances, starts, optional):
    inputs, begins = example(starts, optional, dtype, time=300)
    exact = differentiate({name: x.double() for name, x in inputs.items()}, begins, "reference")
    ours, plain = (differentiate(inputs, begins, backend, glances) for backend in ("native", "reference"))
    for name, truth in exact.items():
        assert ours[name].dtype == plain[name].dtype == (glances if name.startswith("glance") else dtype)
        error, allowed = ((side[name].double() - truth).norm() for side in (ours, plain))
        assert error <= max(2 * allowed, 3 * torch.finfo(torch.float32).eps * truth.norm()), name


@optional
def test_is_an_operator_of_torch(optional):
    inputs, begins = example(0.2, optional, torch.float32)
    inputs = {name: x.requires_grad_() for name, x in inputs.items()}
    compiled = torch.compile(token_shift, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(**inputs, starts=begins), token_shift(**inputs, starts=begins))
    arguments = [inputs["x"], inputs["mix"], inputs.get("last"), inputs.get("more"), begins, True]
    arguments[3] = None if arguments[3] is None else arguments[3].detach().bfloat16().requires_grad_()
    torch.library.opcheck(torch.ops.seqzoo.token_shift_native.default, tuple(arguments))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"mix": torch.ones(2, 4)}, r"x \(2, 3, 8\), mix \(2, 4\) do not fit together"),
        ({"mix": torch.ones(0, 8)}, r"mix \(0, 8\) do not fit together"),
        ({"last": torch.ones(2, 4)}, r"last has shape \(2, 4\); expected \(2, 8\)"),
        ({"starts": torch.ones(2, 4).bool()}, r"starts has shape \(2, 4\); expected \(2, 3\)"),
        ({"starts": torch.ones(2, 3)}, "starts is torch.float32"),
        ({"more": torch.ones(1, 2, 3, 8)}, r"more has shape \(1, 2, 3, 8\); expected \(2, 2, 3, 8\)"),
        ({"mix": torch.ones(2, 8).long()}, "mix is torch.int64"),
        ({"x": torch.ones(2, 0, 8), "starts": None}, "no token"),
        ({"mix": None}, "mix is None; expected a tensor"),
        ({"backend": "magic"}, "backend='magic' cannot run token_shift: there is no such backend; use auto, reference"),
    ],
)
def test_refuses_what_does_not_fit(settings, message, unchecked):
    with pytest.raises(ValueError, match=message):
        token_shift(**{"x": torch.ones(2, 3, 8), "mix": torch.ones(2, 8)} | settings)


def test_refuses_native_where_it_cannot_run(monkeypatch):
    monkeypatch.setattr(native, "reason", lambda: "no compiler was found")
    with pytest.raises(ValueError, match="cannot run token_shift: no compiler was found; use auto or reference"):
        token_shift(torch.ones(2, 3, 8), torch.ones(2, 8), backend="native")
