"""Shapes and types of the whole package are checked while tests run, and only then."""

from __future__ import annotations

import collections
import functools
import importlib
import importlib.util
import inspect
import os
import random
import sys

import jaxtyping
import pytest
import torch

if not torch.cuda.is_available() and importlib.util.find_spec("triton"):
    # Triton decides at the definition of a kernel whether it is compiled or interpreted.
    os.environ["TRITON_INTERPRET"] = "1"
    import interpreter

    interpreter.repair()

torch.set_num_threads(1)  # Tests are tiny: more threads only get in the way of parallel workers.

# Of a list beartype checks one item, drawn at random. It gets a generator of its own: runs must not depend on checks.
with pytest.MonkeyPatch.context() as patch:
    patch.setattr(random, "getrandbits", random.Random(0).getrandbits)
    importlib.import_module("beartype")

# Calls of each function that a test checks: the hundredth token is like those before it, and costs less than a check.
CALLS_CHECKED = 6

_jaxtyped = jaxtyping.jaxtyped
_checked = {}
_calls = collections.Counter()


def _jaxtyped_unless_compiling(fn=None, *, typechecker):
    """``jaxtyping.jaxtyped`` for functions of tensors that stands aside where ``torch.compile`` traces.

    In each test it checks a function's first calls. Functions of anything else refuse bad settings by themselves, with
    a message that the checks must not pre-empt.
    """
    if fn is None:
        return functools.partial(_jaxtyped_unless_compiling, typechecker=typechecker)
    if not inspect.isfunction(fn) or not any("Tensor" in str(hint) for hint in fn.__annotations__.values()):
        return fn
    if "<locals>" in fn.__qualname__:  # one place in the source, many functions
        return fn
    # Tracing reads all that a function closes over: so the checked twin, which it cannot read, is looked up instead.
    place = f"{fn.__code__.co_filename}:{fn.__code__.co_firstlineno}"
    _checked[place] = _jaxtyped(fn, typechecker=typechecker)

    @functools.wraps(fn)
    def call(*args, **kwargs):
        if torch.compiler.is_compiling():
            return fn(*args, **kwargs)
        _calls[place] += 1
        if _calls[place] > CALLS_CHECKED:
            return fn(*args, **kwargs)
        return _checked[place](*args, **kwargs)

    return call


assert "seqzoo" not in sys.modules, "seqzoo was imported before its shapes could be checked"
jaxtyping.jaxtyped = _jaxtyped_unless_compiling
jaxtyping.install_import_hook("seqzoo", "beartype.beartype")


@pytest.fixture(autouse=True)
def alike():
    """The same random numbers and the same checks in every test, whatever ran before."""
    torch.manual_seed(0)
    _calls.clear()


@pytest.fixture
def unchecked():
    """The package as users meet it: what a wrong shape does where nothing checks shapes but our own code."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


def pytest_configure(config):
    config.addinivalue_line("markers", "interpreted_by_default(**values): see tests/test_kernels.py")


def pytest_collection_modifyitems(items):
    """What takes minutes in Triton's interpreter is slow, unless the test says that these values run by default."""
    for item in items:
        mark = item.get_closest_marker("interpreted_by_default")
        if mark is not None and item.callspec.params.get("backend") == "triton" and not torch.cuda.is_available():
            wanted = mark.kwargs.items()
            if not wanted or any(item.callspec.params[name] not in values for name, values in wanted):
                item.add_marker(pytest.mark.slow)
