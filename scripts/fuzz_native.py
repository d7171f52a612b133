"""Fuzz the boundary of every native operator under AddressSanitizer: `python scripts/fuzz_native.py [operator ...]`.

Covered: all that has a native.cpp, forward and backward, on each instruction set that this CPU has (`--isa`).
Hypothesis draws sizes (empty, one, odd, around the widths of vectors and chunks), variants, dtypes, strides, document
starts, threads, and now and then an input that does not fit. Each call must give what the reference gives, gradients
included, or a ValueError; and the sanitizers, which the kernels are compiled with here, must have nothing to say.
Numbers are those of `example` (of functions beside the operators, of fuzz_examples.py): extreme ones are for the tests.
"""

from __future__ import annotations

import argparse
import importlib
import inspect
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fuzz_examples
import torch
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map, tree_map_only

from seqzoo.kernels import native
from seqzoo.kernels.native import build

SANITIZERS = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-fno-omit-frame-pointer", "-g", "-O1"]
KERNELS = Path(native.__file__).parent.parent
HOMES = {"split_short_conv": "short_conv"}  # of functions that have no folder of their own
FOLDERS = {source.parent.name for source in KERNELS.glob("*/native.cpp")} - {"native"}
NATIVE = sorted(FOLDERS | HOMES.keys())
SIZES = [1, 2, 3, 4, 5, 7, 8, 15, 16, 17, 24, 31, 32, 33, 48, 65]
# From a key of one number mLSTM's normalizer takes all of the query, and keys of length one all of it: the gradient is
# rounding. A norm of two numbers is a sign: what learns through it answers to the last place of its inputs.
SMALLEST = {("mlstm", "key"): 2, ("erasing_keys", "key"): 2, ("fast_weights", "key"): 4}
TIMES = [1, 2, 3, 4, 5, 15, 16, 17, 31, 32, 33, 63, 64, 65, 127, 130, 257, 300]
# Errors allowed, relative to a tensor's size: this looks for wrong numbers, tests/test_kernels.py for imprecise ones.
TOLERANCES = {torch.float64: 1e-8, torch.float32: 1e-3, torch.float16: 0.03, torch.bfloat16: 0.1}
MOST_TENSORS = 24  # among the inputs of an operator
LAYOUTS = ["contiguous", "turned", "part of a larger one", "one row for all", "misaligned"]


def tensors(tree: Any) -> list[Tensor]:
    return [x for x in tree_leaves(tree) if isinstance(x, Tensor)]


def equation(operator: str) -> Any:
    """What has the operator's ``example`` and ``VARIANTS``."""
    other = fuzz_examples.OTHERS.get(operator)
    return importlib.import_module(f"seqzoo.kernels.{operator}.reference") if other is None else other


def function(operator: str) -> Callable[..., Any]:
    return getattr(importlib.import_module(f"seqzoo.kernels.{HOMES.get(operator, operator)}"), operator)


def lay_out(x: Tensor, layout: str) -> Tensor:
    """A tensor of the same shape that lies in memory as ``layout`` says."""
    if layout == "turned" and x.ndim > 1:
        return x.transpose(0, -1).contiguous().transpose(0, -1)
    if layout == "part of a larger one" and x.ndim:
        larger = x.new_empty([size + 2 for size in x.shape])
        inner = larger[tuple(slice(1, -1) for _ in x.shape)]
        return inner.copy_(x)
    if layout == "one row for all" and x.ndim and len(x):
        return x[:1].expand_as(x)
    if layout == "misaligned":
        return x.new_empty(x.numel() + 1)[1:].view_as(x).copy_(x)
    return x


def spoil(x: Tensor, how: str, axis: int) -> Tensor:
    """An input that does not fit: a size less along an axis, one more axis, or another dtype."""
    if how == "narrow":
        axis %= max(x.ndim, 1)
        return x.narrow(axis, 0, x.shape[axis] - 1) if x.ndim and x.shape[axis] else x[None]
    return x[None] if how == "deepen" else x.to(getattr(torch, how))


@st.composite
def calls(draw: Any, operator: str) -> dict[str, Any]:
    """Arguments of ``example``, and what is done to its inputs and around the call."""
    variants = equation(operator).VARIANTS
    variant = draw(st.sampled_from(sorted(variants)))
    parameters = inspect.signature(equation(operator).example).parameters
    sizes = {}
    for name, parameter in parameters.items():
        if name == "batch":
            sizes[name] = draw(st.sampled_from([1, 2, 3, 1, 2, 3, 0]))
        elif name == "time":
            sizes[name] = draw(st.sampled_from(TIMES))
        elif name == "heads":
            # Heads come after groups; they are a multiple of them, or now and then not.
            sizes[name] = sizes.get("groups", 1) * draw(st.sampled_from([1, 2, 3] * 6 + [0]))
            sizes[name] += draw(st.sampled_from([0] * 9 + [1]))
        elif name == "groups":
            sizes[name] = draw(st.sampled_from([1, 2, 3] * 6 + [0]))
        elif type(parameter.default) is int and name != "seed" and name not in variants[variant]:
            smallest = SMALLEST.get((operator, name), 1)
            sizes[name] = draw(st.sampled_from([*(size for size in SIZES if size >= smallest), 0]))
    if operator == "attention":
        sizes["before"] = draw(st.sampled_from([0, 0, *SIZES]))
        sizes["prefix"] = variants[variant].get("prefix", 0)  # nothing is forgotten beside one
        if "window" in variants[variant]:
            sizes |= {"window": draw(st.sampled_from(SIZES + TIMES)), "sinks": draw(st.integers(0, 5))}
    if operator == "fast_weights" and "value" in sizes and draw(st.integers(0, 9)):
        sizes["value"] = sizes["key"]  # as a norm has it
    return {
        "example": sizes | {"dtype": draw(st.sampled_from(list(TOLERANCES))), "seed": draw(st.integers(0, 9))},
        "variant": variant,
        "starts": draw(st.sampled_from([None, 0.0, 0.1, 0.5, 1.0])),
        "layouts": draw(st.lists(st.sampled_from(LAYOUTS), min_size=MOST_TENSORS, max_size=MOST_TENSORS)),
        "without state": draw(st.booleans()),
        "spoiled": draw(
            st.none()
            | st.tuples(
                st.integers(0, MOST_TENSORS),
                st.sampled_from(["narrow", "deepen", "float16", "bfloat16", "float32", "float64", "int32"]),
                st.integers(0, 3),
            )
        ),
        "no time": draw(st.sampled_from([False] * 19 + [True])),
        "learns": draw(st.sampled_from([True, True, False])),
        "threads": draw(st.integers(1, 3)),
    }


def make_inputs(operator: str, case: dict[str, Any]) -> dict[str, Any]:
    known = equation(operator)
    inputs = known.example(**known.VARIANTS[case["variant"]] | case["example"])
    if case["without state"]:
        inputs.pop("state", None)
    batch, time = case["example"]["batch"], case["example"]["time"]
    if case["no time"]:
        inputs = tree_map_only(Tensor, lambda x: x[:, :0] if x.ndim > 1 and x.shape[:2] == (batch, time) else x, inputs)
        time = 0
    if case["starts"] is not None and "starts" in inspect.signature(function(operator)).parameters:
        random = torch.Generator().manual_seed(case["example"]["seed"])
        inputs["starts"] = torch.rand(batch, time, generator=random) < case["starts"]
    layouts = iter(case["layouts"])
    inputs = tree_map_only(Tensor, lambda x: lay_out(x, next(layouts)), inputs)
    if case["spoiled"] is not None:
        chosen, how, axis = case["spoiled"]
        count = len(tensors(inputs))
        place = iter(range(count))
        inputs = tree_map_only(Tensor, lambda x: spoil(x, how, axis) if next(place) == chosen % count else x, inputs)
    return inputs


def run(operator: str, backend: str, inputs: dict[str, Any], learns: bool) -> list[Tensor]:
    """Outputs, states and, of a call that ``learns``, the gradients of all inputs that can have one."""
    if not learns:
        with torch.no_grad():
            return tensors(function(operator)(**inputs, backend=backend))
    inputs = tree_map(
        lambda x: x.detach().requires_grad_(x.is_floating_point() or x.is_complex()) if isinstance(x, Tensor) else x,
        inputs,
    )
    results = tensors(function(operator)(**inputs, backend=backend))
    random = torch.Generator().manual_seed(1)
    # Numbers of bfloat16, so that they are the same ones in every dtype.
    weights = [torch.randn(x.shape, generator=random).bfloat16().to(x.dtype) for x in results]
    sources = [x for x in tensors(inputs) if x.requires_grad]
    pairs = [(x, weight) for x, weight in zip(results, weights, strict=True) if x.requires_grad]
    gradients = torch.autograd.grad(
        [x for x, _ in pairs], sources, [w for _, w in pairs], allow_unused=True, materialize_grads=True
    )
    return [x.detach() for x in (*results, *gradients)]


def check(operator: str, case: dict[str, Any]) -> str:
    """Run one call; returns what became of it. AssertionError where the answer is wrong."""
    try:
        inputs = make_inputs(operator, case)
    except (ArithmeticError, RuntimeError, ValueError):
        return "no such example"
    dtype = case["example"]["dtype"]
    exact = tree_map_only(
        Tensor,
        lambda x: x.to(torch.complex128) if x.is_complex() else x.double() if x.is_floating_point() else x,
        inputs,
    )
    torch.set_num_threads(case["threads"])
    legal = case["spoiled"] is None and not case["no time"] and all(x.numel() for x in tensors(inputs))
    try:
        ours = run(operator, "native", inputs, case["learns"])
    except ValueError as error:
        try:
            run(operator, "reference", inputs, case["learns"])
        except Exception:
            return "refused"
        assert not legal, f"a legal call was refused: {error}"
        return "refused"
    truth = run(operator, "reference", exact, case["learns"])
    assert len(ours) == len(truth)
    # A spoiled dtype may be legal for one of the inputs, and then bounds what can be expected.
    dtypes = {dtype, *(x.dtype for x in (*tensors(inputs), *ours))} & TOLERANCES.keys()
    tolerance = max(max(TOLERANCES[x] for x in dtypes), 10 * inputs.get("prune", 0.0))
    rounding = max(torch.finfo(x).eps for x in dtypes)  # is left where numbers of about 1 cancel
    for index, (x, y) in enumerate(zip(ours, truth, strict=True)):
        assert x.shape == y.shape, f"result {index} has shape {tuple(x.shape)}, the reference's {tuple(y.shape)}"
        if not (y.is_floating_point() or y.is_complex()):
            assert (x == y).all(), f"result {index} of {x.dtype} is wrong"
            continue
        root = y.numel() ** 0.5
        error, allowed = (x.to(y.dtype) - y).norm(), tolerance * max(y.norm(), 0.01 * root) + rounding * root
        assert error <= allowed, f"result {index} of {x.dtype} is {error / allowed:.1e} times as wrong as it may be"
    return "right"


def fuzz(operator: str, examples: int, first: int) -> None:
    outcomes: dict[str, int] = {}

    @seed(first)
    @settings(
        max_examples=examples,
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
        phases=[Phase.generate, Phase.shrink],
        report_multiple_bugs=False,
    )
    @given(calls(operator))
    def every(case: dict[str, Any]) -> None:
        outcome = check(operator, case)
        outcomes[outcome] = outcomes.get(outcome, 0) + 1

    every()
    print(operator, *(f"{count} {outcome}" for outcome, count in sorted(outcomes.items())), sep=", ", flush=True)


def build_with_sanitizers(folder: Path, instruction_set: str) -> dict[str, str]:
    """Compile the library into ``folder``; returns the environment in which Python can load it."""
    sources = sorted(KERNELS.glob("*/native.cpp"))
    flags = [*build.instruction_sets()[instruction_set], *SANITIZERS]
    build.compile_library(sources, folder / f"{instruction_set}.so", flags, jobs=os.cpu_count() or 1)
    compiler = build.find_compiler()
    assert compiler is not None
    runtimes = [
        subprocess.run([*compiler, f"-print-file-name={name}"], capture_output=True, text=True).stdout.strip()
        for name in ("libasan.so", "libubsan.so", "libstdc++.so.6")
    ]
    return {
        "LD_PRELOAD": " ".join(runtimes),
        # Python and torch leave memory to the end of the process.
        "ASAN_OPTIONS": "detect_leaks=0:abort_on_error=0",
        "UBSAN_OPTIONS": "print_stacktrace=1",
        native.FORCE: instruction_set,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("operators", nargs="*", default=NATIVE, metavar="operator", help=f"of {', '.join(NATIVE)}")
    parser.add_argument("--examples", type=int, default=300, help="calls of each operator")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--isa", nargs="+", default=native.fitting(), help="instruction sets, one after the other")
    parser.add_argument("--library", type=Path, help=argparse.SUPPRESS)  # given where the sanitizers are in place
    arguments = parser.parse_args()
    if unknown := set(arguments.operators) - set(NATIVE):
        parser.error(f"no native implementation of {', '.join(sorted(unknown))}; there are {', '.join(NATIVE)}")
    if arguments.library:
        native.LIBRARIES = arguments.library
        for operator in arguments.operators:
            fuzz(operator, arguments.examples, arguments.seed)
        return
    for instruction_set in arguments.isa:
        with tempfile.TemporaryDirectory() as folder:
            environment = os.environ | build_with_sanitizers(Path(folder), instruction_set)
            print(f"{instruction_set}:", flush=True)
            options = ["--library", folder, "--examples", str(arguments.examples), "--seed", str(arguments.seed)]
            command = [sys.executable, __file__, *arguments.operators, *options]
            if code := subprocess.run(command, env=environment).returncode:
                sys.exit(code)


if __name__ == "__main__":
    main()
