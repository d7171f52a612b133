"""What native kernels stand on: vectors, small matrix products, the build, the loader, the calling of operators."""

from __future__ import annotations

import ctypes
import itertools
import os
import subprocess
import sys
from pathlib import Path

import fuzz_native
import pytest
import torch
import torch.nn.functional as F

from seqzoo.kernels import native
from seqzoo.kernels.native import build
from seqzoo.kernels.native.tensors import DTYPES, Function, dense, dense_rows
from seqzoo.kernels.torch_operators import define, differentiable

SOURCE = Path(__file__).with_name("native_checks.cpp")
# Those that this machine can run: the loader knows.
FITTING = [] if native.missing() else native.fitting()


def pointer(x):
    return x if not isinstance(x, torch.Tensor) else ctypes.c_void_p(x.data_ptr())


@pytest.fixture(scope="session", params=FITTING)
def check(request, tmp_path_factory):
    """Call a function of native_checks.cpp, compiled for one instruction set; ints are 64 bits wide."""
    path = tmp_path_factory.mktemp("native") / "checks.so"
    build.compile_library([SOURCE], path, build.instruction_sets()[request.param])
    library = ctypes.CDLL(str(path))
    kinds = {int: ctypes.c_int64, bool: ctypes.c_int64, float: ctypes.c_double}

    def call(name, *arguments):
        library[f"check_{name}"](*(kinds.get(type(x), lambda y: y)(pointer(x)) for x in arguments))

    return call


def test_this_machine_has_native_kernels():
    assert build.find_compiler() is None or native.missing() is None


OPERANDS = [torch.float64, torch.float32, "float32 as bfloat16", torch.bfloat16]
SIZES = [(1, 1, 1), (7, 5, 3), (16, 16, 16), (64, 64, 64), (37, 53, 29), (128, 96, 100), (65, 130, 127), (6, 64, 33)]


@pytest.mark.parametrize("sizes", SIZES, ids=str)
@pytest.mark.parametrize("kind", range(4), ids=[str(x) for x in OPERANDS])
def test_gemm(check, kind, sizes):
    for *flipped, accumulate in itertools.product([False, True], repeat=3):
        assert_gemm(check, kind, *sizes, flipped, accumulate)


def assert_gemm(check, kind, rows, columns, depth, flipped, accumulate):
    dtype = torch.float32 if kind == 2 else OPERANDS[kind]
    # Around each matrix stand numbers that must neither be used nor written over.
    shapes = [
        shape[::-1] if flip else shape for shape, flip in zip([(rows, depth), (depth, columns)], flipped, strict=True)
    ]
    a, b = (F.pad(torch.randn(shape).to(dtype), (0, 3), value=torch.nan)[:, :-3] for shape in shapes)
    whole = torch.full((rows, columns + 4), 7.0, dtype=torch.float64 if kind == 0 else torch.float32)
    c = whole[:, :columns]
    sides = [x for z, flip in zip((a, b), flipped, strict=True) for x in (z, z.stride(0), flip)]
    check("gemm", kind, rows, columns, depth, *sides, c, c.stride(0), -0.5, accumulate)

    a, b = ((x.bfloat16() if kind == 2 else x).double() for x in (a, b))
    truth = -0.5 * (a.T if flipped[0] else a) @ (b.T if flipped[1] else b) + 7 * accumulate
    tolerance = 1e-14 if kind == 0 else 2e-6
    torch.testing.assert_close(c.double(), truth, rtol=tolerance, atol=tolerance * depth**0.5)
    assert (whole[:, columns:] == 7).all()


@pytest.mark.parametrize("size", [1, 3, 15, 16, 17, 32, 40, 64, 100, 128])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_inverse_of_a_unit_lower_triangle(check, dtype, size):
    full = torch.randn(size, size + 2, dtype=dtype)[:, :-2] / size**0.5
    # What stands on and above the diagonal must not be read.
    m = torch.where(torch.ones_like(full).tril(-1).bool(), full, torch.nan).contiguous()
    x = torch.full((size, size + 1), torch.nan, dtype=dtype)[:, :-1]
    check("inverse", DTYPES[dtype], size, m, m.stride(0), x, x.stride(0))
    truth = torch.linalg.inv(torch.eye(size, dtype=torch.float64) + full.double().tril(-1))
    scale, tolerance = truth.abs().max(), 1e-13 if dtype == torch.float64 else 2e-6
    torch.testing.assert_close(x / scale, (truth / scale).to(dtype), rtol=0, atol=tolerance)


FUNCTIONS = {
    "copy": lambda x: x,
    "exp": torch.exp,
    "expm1": torch.expm1,
    "log1p": torch.log1p,
    "softplus": lambda x: F.relu(x) + torch.log1p(torch.exp(-x.abs())),
    "sigmoid": torch.sigmoid,
    "silu": F.silu,
    "tanh": torch.tanh,
    "exp below 0": torch.exp,
    "expm1 below 0": torch.expm1,
}
HOSTILE = torch.tensor([-torch.inf, -1e30, -1e4, -100, 0, 100, 1e4, 1e30, torch.inf, torch.nan])


def legal(name, x):
    """Those numbers that the function takes, and NaN."""
    outside = {"log1p": x < 0, "exp below 0": x > 0, "expm1 below 0": x > 0}
    return x[~outside[name]] if name in outside else x


def apply(check, name, x):
    y = torch.full_like(x, 12)
    check("function", DTYPES[x.dtype], list(FUNCTIONS).index(name), len(x), x, y)
    return y


@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_functions_are_exact_to_the_last_places(check, dtype, name):
    x = torch.cat([torch.linspace(-87, 88, 50001), torch.linspace(-1, 1, 20001), torch.randn(1000) * 1e-4]).to(dtype)
    x = legal(name, x)
    truth, y = FUNCTIONS[name](x.double()), apply(check, name, x)
    # float32's last place in size of the truth; float64 goes through the C library, as torch's truth does.
    units = torch.maximum(truth.abs() * torch.finfo(dtype).eps / 2, torch.tensor(torch.finfo(torch.float32).tiny))
    assert ((y.double() - truth).abs() / units).max() < 8


@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_functions_are_right_at_hostile_numbers(check, dtype, name):
    x = legal(name, HOSTILE)
    truth = FUNCTIONS[name](x.to(dtype).double()).to(dtype)
    torch.testing.assert_close(apply(check, name, x.to(dtype)), truth, equal_nan=True)


def test_bfloat16_is_rounded_as_torch_rounds_it(check):
    bits = torch.randint(-(2**31), 2**31, (10000,)).int()
    nans = torch.tensor([0x7FFFFFFF, -1, 0x7F800001, 0x7FC00000, 0x7F7FFFFF, 0x00007FFF, 0x3F808000, 0x3F818000]).int()
    x = torch.cat([bits, nans]).view(torch.float32)
    # x as the 1 x n left operand of a product with 1: what comes out is x rounded.
    for operand in x.split(512):
        y = torch.empty(len(operand), 1)
        check("gemm", 2, len(operand), 1, 1, operand, 1, False, torch.ones(1), 1, False, y, 1, 1.0, False)
        truth = operand.bfloat16().float()
        # The dot product instruction takes numbers below the normal range for 0.
        torch.testing.assert_close(y[:, 0], truth, rtol=0, atol=torch.finfo(torch.float32).tiny, equal_nan=True)
    copied = x.bfloat16()
    torch.testing.assert_close(apply(check, "copy", copied), copied, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_reductions(check, dtype):
    x = torch.randn(64).to(dtype)
    sums, maxima = torch.full((2, 64), torch.nan, dtype=torch.float64)
    check("reductions", DTYPES[dtype], len(x), x, sums, maxima)
    rows = x.double().view(int(sums.isfinite().sum()), -1)  # as many as there were vectors
    torch.testing.assert_close(sums[: len(rows)], rows.sum(1), rtol=1e-5, atol=1e-5)
    assert torch.equal(maxima[: len(rows)], rows.amax(1))


@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize("count", [0, 1, 2, 100])
def test_as_many_threads_work_as_are_asked_for(check, threads, count):
    together, visits = torch.zeros(1, dtype=torch.int64), torch.zeros(max(count, 1), dtype=torch.int64)
    check("threads", threads, count, together, visits)
    assert together.item() == threads
    assert visits[:count].eq(1).all()


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_brings_no_second_openmp_runtime():
    script = """
import torch
def runtimes():
    return {line.split()[-1] for line in open("/proc/self/maps") if "omp" in line.rpartition("/")[2]}
torch.randn(300, 300) @ torch.randn(300, 300)
before = runtimes()
from seqzoo.kernels import native
assert native.library().native_has_threads()
assert before and runtimes() == before, (before, runtimes())
"""
    subprocess.run([sys.executable, "-c", script], check=True)


@pytest.fixture
def fresh():
    """The loader as it is before its first use."""
    native._load.cache_clear()
    yield
    native._load.cache_clear()


@pytest.mark.parametrize("name", FITTING)
def test_an_instruction_set_can_be_forced(name, fresh, monkeypatch):
    monkeypatch.setenv(native.FORCE, name)
    assert native.missing() is None
    assert Path(native.library()._name).stem == name


def test_refuses_an_instruction_set_that_does_not_fit(fresh, monkeypatch):
    monkeypatch.setenv(native.FORCE, "mmx")
    with pytest.raises(ValueError, match=f"SEQZOO_NATIVE_ISA='mmx' cannot serve .* use {', '.join(FITTING)}$"):
        native.missing()


def test_says_that_nothing_was_built(fresh, monkeypatch, tmp_path):
    monkeypatch.setattr(native, "LIBRARIES", tmp_path)
    assert "were not built" in native.missing()
    with pytest.raises(RuntimeError, match="native kernels are missing: they were not built"):
        native.library()


def test_says_that_a_library_does_not_load(fresh, monkeypatch, tmp_path):
    (tmp_path / "baseline.so").write_text("no library")
    monkeypatch.setattr(native, "LIBRARIES", tmp_path)
    assert "could not be loaded" in native.missing()


def test_says_that_a_library_is_older_than_its_sources():
    with pytest.raises(RuntimeError, match=r"older than their sources: not_there .*native\.build"):
        Function("not_there")(1)


@pytest.mark.parametrize("compiler", [None, "false", "no-such-compiler"])
def test_without_a_compiler_the_build_says_so_and_goes_on(compiler, monkeypatch, tmp_path, capfd):
    monkeypatch.setenv("PATH", os.environ["PATH"] if compiler == "false" else "")
    monkeypatch.delenv("CXX", raising=False)
    if compiler:
        monkeypatch.setenv("CXX", compiler)
    assert build.build(tmp_path) == []
    (line,) = capfd.readouterr().err.splitlines()
    assert line.startswith(
        f"seqzoo: no native kernels for {', '.join(build.instruction_sets())}, slower ones will serve: "
    )
    assert list(tmp_path.iterdir()) == []


def test_objects_are_kept_until_a_source_changes(tmp_path):
    source, objects = tmp_path / "tiny" / "native.cpp", tmp_path / "objects"
    source.parent.mkdir()
    source.write_text("int f() { return 1; }")
    made = objects / "tiny_native.o"

    def age_after_build():
        build.compile_library([source], tmp_path / "tiny.so", objects=objects)
        return made.stat().st_mtime_ns

    first = age_after_build()
    assert age_after_build() == first
    os.utime(source, ns=(first + 1, first + 1))
    assert age_after_build() > first


def test_an_openmp_pragma_is_refused(tmp_path):
    source = tmp_path / "native.cpp"
    source.write_text("void f() {\n#pragma omp parallel for\n    for (int i = 0; i < 3; i++) {}\n}")
    with pytest.raises(RuntimeError, match=r"failed: .*error"):
        build.compile_library([source], tmp_path / "out.so")


def test_dense_copies_only_where_it_must():
    x = torch.randn(3, 4)
    same, turned, none = dense(x, x.T, None)
    assert same is x and turned.is_contiguous() and torch.equal(turned, x.T) and none is None
    with pytest.raises(AssertionError, match="strides"):
        Function("anything")(x.T)


def test_dense_rows_copies_only_what_is_not_dense_in_a_row():
    buffer = torch.randn(3, 9, 4, 5)
    slice_of_slots, few_heads, turned = buffer[:, 2:7], buffer[:, :, :2], buffer.transpose(2, 3)
    first, batch, step, *others = dense_rows(slice_of_slots, few_heads, turned)
    assert (first.data_ptr(), batch, step) == (slice_of_slots.data_ptr(), 9 * 20, 20) and first.is_contiguous()
    assert (others[0].data_ptr(), *others[1:3]) == (few_heads.data_ptr(), 9 * 20, 20)
    assert others[3].data_ptr() != turned.data_ptr() and others[4:] == [9 * 20, 20]
    assert torch.equal(others[3], turned)


def _scale(x, factor, bias):
    return x * factor + (0 if bias is None else bias), factor.clone()


def _scale_backward(y_grad, same_grad, x, factor, bias):
    return y_grad * factor, (y_grad * x).sum(0) + same_grad, y_grad.sum(0)


@pytest.fixture(scope="session")
def scale():
    """An operator that does what the recipe in torch_operators.py says: x factor + bias, and factor itself."""
    forward = define(
        "test_scale(Tensor x, Tensor factor, Tensor? bias) -> (Tensor y, Tensor same)",
        _scale,
        lambda x, factor, bias: (x.new_empty(x.shape), factor.new_empty(factor.shape)),
        device="CPU",
    )
    gradient = "y_grad, same_grad, x, factor, bias -> x, factor, bias"
    differentiable(forward, gradient, _scale_backward, device="CPU")
    return forward


@pytest.fixture(params=["with bias", "without bias"])
def scaled(request):
    x, factor, bias = (torch.randn(s, dtype=torch.float64, requires_grad=True) for s in [(5, 4), (4,), (4,)])
    return x, factor, bias if request.param == "with bias" else None


def test_a_defined_operator_is_a_good_one(scale, scaled):
    assert set(torch.library.opcheck(scale, scaled).values()) == {"SUCCESS"}
    torch.autograd.gradcheck(scale, scaled)


def test_a_defined_operator_refuses_second_derivatives(scale, scaled):
    (y, _), x = scale(*scaled), scaled[0]
    with pytest.raises(RuntimeError, match="test_scale has no gradient of its gradient; use backend='chunked'"):
        torch.autograd.grad(y.sum(), x, create_graph=True)


def test_gradients_that_nobody_sends():
    sent = []

    def backward(y_grad, z_grad, kept, times):
        sent.append(z_grad)
        return [y_grad * times if z_grad is None else y_grad * times + z_grad]

    forward = define(
        "test_part(Tensor x, int times) -> (Tensor y, Tensor z, Tensor kept)",
        lambda x, times: (x * times, x + times, x.clone()),
        lambda x, times: tuple(x.new_empty(x.shape) for _ in range(3)),
        device="CPU",
    )
    differentiable(forward, "y_grad, z_grad?, kept, times -> kept", backward, device="CPU")
    x = torch.randn(3, requires_grad=True)
    for chosen, slope in (([0], 5), ([1], 1), ([0, 1], 6)):
        results = forward(x, 5)
        assert not results[2].requires_grad
        (x_grad,) = torch.autograd.grad([results[index].sum() for index in chosen], x)
        torch.testing.assert_close(x_grad, torch.full_like(x, slope))
    assert sent[0] is None and all(z_grad is not None for z_grad in sent[1:])


@pytest.mark.parametrize("compiler", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_a_defined_operator_compiles_in_one_graph(scale, scaled, compiler):
    def loss(x, factor, bias):
        y, same = scale(x.sin(), factor, bias)
        return y.cos().sum() + same.sum()

    torch._dynamo.reset()
    compiled = torch.compile(loss, fullgraph=True, backend=compiler)
    for x, truth in zip(*(torch.autograd.grad(f(*scaled), scaled[:2]) for f in (compiled, loss)), strict=True):
        torch.testing.assert_close(x, truth)
    with torch.inference_mode():
        torch.testing.assert_close(compiled(*scaled), loss(*scaled))


@pytest.mark.parametrize("operator", fuzz_native.NATIVE)
def test_every_operator_can_be_fuzzed(operator):
    known = fuzz_native.equation(operator)
    for settings in known.VARIANTS.values():
        inputs = known.example(dtype=torch.float32, **settings)
        fuzz_native.function(operator)(**inputs, backend="native")
