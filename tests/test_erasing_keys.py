"""RWKV-7's decays and keys: the native kernel is the equation, with gradients, in any layout and dtype."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from seqzoo.kernels import native
from seqzoo.kernels.erasing_keys import erasing_keys

SIZES = {"one head": (1, 37), "heads": (6, 16), "small heads": (5, 3)}

sizes = pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)


def example(sizes, dtype=torch.float64, tokens=(2, 50), seed=0):
    random = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(shape, generator=random, dtype=torch.float64).bfloat16().double()

    dim = math.prod(sizes)
    # Tokens lie apart, as slices of a wider projection do.
    inputs = {name: draw(*tokens, 2 * dim)[..., dim:].to(dtype) for name in ("r", "k", "decay", "rate")}
    learned = {name: draw(dim) for name in ("decay_bias", "rate_bias", "key_scale", "key_rate")} | {
        "bonus": draw(*sizes)
    }
    return inputs | {name: x.to(torch.promote_types(dtype, torch.float32)) for name, x in learned.items()}


def with_gradients(inputs, outputs):
    random = torch.Generator().manual_seed(1)
    weights = [torch.randn(y.shape, generator=random).bfloat16().to(y.dtype) for y in outputs.values()]
    gradients = torch.autograd.grad(list(outputs.values()), list(inputs.values()), weights)
    return {name: y.detach() for name, y in outputs.items()} | dict(zip(inputs, gradients, strict=True))


def differentiate(inputs, backend):
    inputs = {name: x.detach().requires_grad_() for name, x in inputs.items()}
    return with_gradients(inputs, erasing_keys(**inputs, backend=backend)._asdict())


def written_out(r, k, decay, rate, decay_bias, rate_bias, key_scale, key_rate, bonus):
    a = (rate + rate_bias).sigmoid().unflatten(-1, bonus.shape)
    h = F.normalize((k * key_scale).unflatten(-1, bonus.shape), dim=-1)
    written = k.unflatten(-1, bonus.shape) * (1 + (a - 1) * key_rate.view_as(bonus))
    return {
        "log_decay": -(math.e**-0.5) * (decay + decay_bias).sigmoid().unflatten(-1, bonus.shape),
        "written": written,
        "erased": -h,
        "restored": a * h,
        "own": (r.unflatten(-1, bonus.shape) * bonus * written).sum(-1),
    }


def assert_same(ours, truth):
    assert ours.keys() == truth.keys()
    for name, tensor in truth.items():
        torch.testing.assert_close(ours[name], tensor, rtol=1e-10, atol=1e-10, msg=lambda text, n=name: f"{n}: {text}")


@sizes
@pytest.mark.parametrize("backend", ["reference", "native"])
def test_is_the_equation(backend, sizes):
    inputs = example(sizes)
    ours = differentiate(inputs, backend)
    inputs = {name: x.detach().requires_grad_() for name, x in inputs.items()}
    assert_same(ours, with_gradients(inputs, written_out(**inputs)))


@sizes
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_rounds_no_worse_than_plain_pytorch(dtype, sizes):
    inputs = example(sizes, dtype, tokens=(4, 300))
    exact = differentiate({name: x.double() for name, x in inputs.items()}, "reference")
    ours, plain = (differentiate(inputs, backend) for backend in ("native", "reference"))
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
        inputs = example(SIZES["heads"], tokens=tokens)
        assert_same(differentiate(inputs, "native"), differentiate(inputs, "reference"))
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("scale", [0.0, 1e-15, 1e4])
def test_finite_at_hostile_inputs(scale):
    inputs = {name: x * scale if x.ndim > 2 else x for name, x in example(SIZES["heads"], torch.float32).items()}
    for name, tensor in differentiate(inputs, "native").items():
        assert tensor.isfinite().all(), name


def test_is_an_operator_of_torch():
    inputs = {name: x.detach().requires_grad_() for name, x in example(SIZES["heads"], torch.float32).items()}
    compiled = torch.compile(erasing_keys, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(**inputs), erasing_keys(**inputs))
    torch.library.opcheck(torch.ops.seqzoo.erasing_keys_native.default, tuple(inputs.values()))


def test_one_answer_in_mixed_precision():
    inputs = example(SIZES["heads"], torch.float32)
    mixed = erasing_keys(**inputs | {"rate": inputs["rate"].bfloat16()})
    torch.testing.assert_close(mixed, erasing_keys(**inputs))


@pytest.mark.parametrize(
    ("name", "tensor", "message"),
    [
        ("bonus", torch.ones(2, 3), r"k \(2, 8\), bonus \(2, 3\) do not fit together"),
        ("bonus", torch.ones(8), "do not fit together"),
        ("rate", torch.ones(2, 4), r"rate has shape \(2, 4\); expected \(2, 8\)"),
        ("key_rate", torch.ones(4), r"key_rate has shape \(4,\); expected \(8,\)"),
        ("decay_bias", torch.ones(8).long(), "decay_bias is torch.int64"),
    ],
)
def test_refuses_what_does_not_fit(name, tensor, message, unchecked):
    inputs = {name: x[0, :2] if x.ndim > 2 else x for name, x in example((4, 2), torch.float32).items()}
    with pytest.raises(ValueError, match=message):
        erasing_keys(**inputs | {name: tensor})


def test_refuses_native_where_it_cannot_run(monkeypatch):
    monkeypatch.setattr(native, "reason", lambda: "no compiler was found")
    with pytest.raises(ValueError, match="cannot run erasing_keys: no compiler was found; use auto or reference"):
        erasing_keys(**example(SIZES["heads"]), backend="native")
