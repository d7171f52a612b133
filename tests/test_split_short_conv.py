"""The short convolution whose output comes in several tensors: the same numbers, and gradients of each part alone."""

from __future__ import annotations

import pytest
import torch

from seqzoo.kernels.short_conv import native, reference, short_conv, split_short_conv

# Neither in whole vectors nor in whole blocks of channels, as C++ walks them.
WIDTHS = (7, 261, 1, 31)
STARTS = {"no starts": 0.0, "starts": 0.2, "all start": 1.0}
EVERY_RESULT = tuple(range(len(WIDTHS) + 1))
BACKENDS = ["native", "chunked"]

variants = pytest.mark.parametrize("variant", reference.VARIANTS.values(), ids=reference.VARIANTS)


def example(variant, starts=0.2, time=70, dtype=torch.float64):
    """Inputs, x as a slice of a wider tensor, and where documents start."""
    inputs = reference.example(time=time, channels=sum(WIDTHS), dtype=torch.float64, **variant)
    inputs = {name: x.bfloat16().to(dtype) if torch.is_tensor(x) else x for name, x in inputs.items()}
    inputs["x"] = torch.cat([inputs["x"][..., :5], inputs["x"], inputs["x"][..., :3]], -1)[..., 5:-3]
    return inputs, (torch.rand(2, time, generator=torch.Generator().manual_seed(0)) < starts) if starts else None


def differentiate(inputs, run, read=EVERY_RESULT):
    """Parts, the last state, and the gradients from those of them, by number, that are ``read``."""
    inputs = {name: x.detach().requires_grad_() if torch.is_tensor(x) else x for name, x in inputs.items()}
    parts, last = run(**inputs)
    results, random = [*parts, last], torch.Generator().manual_seed(1)
    weights = [torch.randn(y.shape, generator=random).bfloat16().to(y.dtype) for y in results]
    sources = {name: x for name, x in inputs.items() if torch.is_tensor(x)}
    gradients = torch.autograd.grad(
        [results[index] for index in read], list(sources.values()), [weights[index] for index in read]
    )
    return dict(enumerate(results)) | dict(zip(sources, gradients, strict=True))


def split(backend, starts):
    return lambda **inputs: split_short_conv(widths=WIDTHS, starts=starts, backend=backend, **inputs)


def cut(backend, starts):
    def run(**inputs):
        y, last = short_conv(starts=starts, backend=backend, **inputs)
        return y.split(WIDTHS, -1), last

    return run


def assert_same(ours, truth, tolerance=1e-10):
    assert ours.keys() == truth.keys()
    for name, tensor in truth.items():
        torch.testing.assert_close(
            ours[name], tensor, rtol=tolerance, atol=tolerance, msg=lambda text, n=name: f"{n}: {text}"
        )


@variants
@pytest.mark.parametrize("starts", STARTS.values(), ids=STARTS)
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("time", [1, 3, 70])
def test_is_the_equation_cut(backend, time, starts, variant):
    inputs, begins = example(variant, starts, time)
    truth = differentiate(inputs, cut("reference", begins))
    assert_same(differentiate(inputs, split(backend, begins)), truth)
    del inputs["state"]
    assert_same(differentiate(inputs, split(backend, begins)), differentiate(inputs, cut("reference", begins)))


@variants
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_the_native_kernel_gives_the_same_numbers_cut_or_not(dtype, variant):
    inputs, begins = example(variant, time=600, dtype=dtype)
    ours, plain = (differentiate(inputs, form("native", begins)) for form in (split, cut))
    assert_same(ours, plain, 0)
    assert all(x.is_contiguous() for x in ours.values())


@pytest.mark.parametrize("read", [[0], [1, 3], [2, 4]], ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_parts_that_nobody_reads_have_no_gradient(backend, read):
    inputs, begins = example({"activation": "silu"})
    truth = differentiate(inputs, cut("reference", begins), read)
    assert_same(differentiate(inputs, split(backend, begins), read), truth)


@pytest.mark.parametrize("batch", [0, 1, 3])
@pytest.mark.parametrize("threads", [1, 3])
def test_any_number_of_sequences_and_threads(batch, threads):
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        inputs, _ = example({}, time=300)
        for name in ("x", "state"):
            inputs[name] = inputs[name][:1].expand(batch, -1, -1)
        assert_same(differentiate(inputs, split("native", None)), differentiate(inputs, cut("chunked", None)))
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("time", [1, 5])
@pytest.mark.parametrize("compiler", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_is_an_operator_of_torch(time, compiler):
    inputs, begins = example({"activation": "silu"}, time=time, dtype=torch.float32)
    torch._dynamo.reset()
    compiled = torch.compile(split("native", begins), fullgraph=True, backend=compiler)
    assert_same(differentiate(inputs, compiled), differentiate(inputs, split("native", begins)), 1e-6)
    tensors = [inputs[name].requires_grad_() for name in ("x", "weight", "bias", "state")]
    torch.library.opcheck(native.SPLIT_FORWARD, (*tensors, begins, WIDTHS, True))


@pytest.mark.parametrize(
    ("widths", "message"),
    [
        ([5, 4], r"widths=\[5, 4\] do not cut 8 channels; expected numbers of 1 or more with that sum"),
        ([9, -1], r"widths=\[9, -1\] do not cut 8 channels"),
        ([8, 0], r"widths=\[8, 0\] do not cut 8 channels"),
        ([], r"widths=\[\] do not cut 8 channels"),
    ],
)
def test_refuses_widths_that_do_not_fit(widths, message):
    with pytest.raises(ValueError, match=f"short_conv: {message}"):
        split_short_conv(torch.ones(2, 3, 8), widths, torch.ones(8, 4))
