"""Adapters of other people's GPU kernels: what they pass exists in what is installed, and arrives where it should."""

from __future__ import annotations

import functools
import importlib
import inspect
import sys
import types
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F

from seqzoo.kernels import OPERATORS
from seqzoo.kernels.adapters import PACKAGES, by_documents, missing
from seqzoo.kernels.gated_delta_rule.reference import example as delta_example
from seqzoo.kernels.gated_delta_rule.reference import gated_delta_rule

# What each adapter calls, for every variant of its operator: in the kernel's words, what our arguments are.
DELTA = {"q": "q", "k": "k", "v": "v", "beta": "beta"}
GLA = {"q": "q", "k": "k", "v": "v"}
RWKV6 = {"r": "q", "k": "k", "v": "v", "u": "bonus"}
FLA = {
    ("gated_delta_rule", "scalar decay"): ("ops.gated_delta_rule.chunk_gated_delta_rule", DELTA | {"g": "log_decay"}),
    ("gated_delta_rule", "decay per channel"): ("ops.kda.chunk_kda", DELTA | {"g": "log_decay"}),
    ("gated_delta_rule", "no decay"): ("ops.delta_rule.chunk_delta_rule", DELTA),
    ("gated_linear_attention", "scalar decay"): ("ops.simple_gla.chunk_simple_gla", GLA | {"g": "log_decay"}),
    ("gated_linear_attention", "decay per channel"): ("ops.gla.chunk_gla", GLA | {"g": "log_decay"}),
    ("gated_linear_attention", "no decay"): ("ops.simple_gla.chunk_simple_gla", GLA),
    ("gated_linear_attention", "bonus, scalar decay"): ("ops.rwkv6.chunk_rwkv6", RWKV6),
    ("gated_linear_attention", "bonus, decay per channel"): ("ops.rwkv6.chunk_rwkv6", RWKV6 | {"w": "log_decay"}),
    ("gated_linear_attention", "bonus, no decay"): ("ops.rwkv6.chunk_rwkv6", RWKV6),
    ("gated_linear_attention", "scalar decay, weights and a skip"): (  # its values are weighted before
        "ops.simple_gla.chunk_simple_gla",
        {"q": "q", "k": "k", "g": "log_decay"},
    ),
    ("dplr_delta_rule", "decay per channel"): (
        "ops.generalized_delta_rule.chunk_dplr_delta_rule",
        GLA | {"a": "a", "b": "b", "gk": "log_decay"},
    ),
    ("short_conv", "no activation"): ("modules.causal_conv1d.causal_conv1d", {"x": "x", "weight": "weight"}),
    ("short_conv", "silu"): ("modules.causal_conv1d.causal_conv1d", {"x": "x", "bias": "bias"}),
    ("short_conv", "no bias"): ("modules.causal_conv1d.causal_conv1d", {"x": "x", "weight": "weight"}),
}


def equation(operator):
    return importlib.import_module(f"seqzoo.kernels.{operator}.reference")


def positional(operator, inputs, starts):
    names = inspect.signature(getattr(equation(operator), operator)).parameters
    return [starts if name == "starts" else inputs.get(name) for name in names]


def test_every_variant_of_an_operator_with_fla_is_checked():
    made_of_others = ("gated_delta_product", "mlstm")
    own = [operator for operator, names in OPERATORS.items() if "fla" in names and operator not in made_of_others]
    assert set(FLA) == {(operator, variant) for operator in own for variant in equation(operator).VARIANTS}


@pytest.mark.parametrize("starts", ["no starts", "starts"])
@pytest.mark.parametrize(("operator", "variant"), FLA)
def test_flas_functions_take_what_is_passed(operator, variant, starts, monkeypatch):
    place, meaning = FLA[operator, variant]
    module, name = place.rsplit(".", 1)
    module = pytest.importorskip(f"fla.{module}")
    real = inspect.signature(getattr(module, name)).parameters
    calls = []

    @functools.wraps(getattr(module, name))
    def spy(*args, **kwargs):
        assert not args, "by position, an upgrade could take an argument for another"
        for given in kwargs:
            # Kernels that take any keyword would drop a renamed one in silence.
            assert given in real and real[given].kind is not inspect.Parameter.VAR_KEYWORD
        calls.append(kwargs)
        rows = 1 if kwargs["initial_state"] is None else len(kwargs["initial_state"])
        last = kwargs["initial_state"] if rows > 1 else torch.zeros(2, *inputs["state"].shape[1:])
        return (kwargs["v"] if "v" in kwargs else kwargs["x"]), last

    monkeypatch.setattr(module, name, spy)
    inputs = equation(operator).example(dtype=torch.bfloat16, **equation(operator).VARIANTS[variant])
    begins = torch.rand(2, 37) < 0.1 if starts == "starts" else None
    OPERATORS[operator]["fla"](*positional(operator, inputs, begins))
    (call,) = calls
    assert call.get("scale", 1.0) == 1.0 and call["output_final_state"]
    for theirs, ours in meaning.items():
        expected = inputs[ours]
        if ours in ("q", "k") and "groups" in inspect.signature(equation(operator).example).parameters:
            expected = expected.repeat_interleave(2, 2)
        flat = expected if begins is None or ours in ("weight", "bias", "bonus") else expected.flatten(0, 1)[None]
        torch.testing.assert_close(call[theirs].to(flat.dtype), flat, rtol=0, atol=0)
    if begins is not None:
        begins[:, 0] = True
        assert call["cu_seqlens"].tolist() == [*begins.flatten().nonzero()[:, 0].tolist(), 74]


@pytest.mark.parametrize("with_state", [True, False])
def test_documents_are_packed_and_unpacked(with_state):
    """The equation, run on one document after another by the bounds, is the equation with starts."""
    inputs = delta_example(batch=3, time=20)
    state = inputs.pop("state") if with_state else None
    starts = torch.rand(3, 20) < 0.2
    starts[0, 0], starts[1, 0] = True, False

    def run(*tensors, initial_state, cu_seqlens):
        pieces = []
        for number, (begin, end) in enumerate(pairwise(cu_seqlens)):
            before = None if initial_state is None else initial_state[number, None]
            pieces.append(gated_delta_rule(*(x[:, begin:end] for x in tensors), before, None))
        outputs, states = zip(*pieces, strict=True)
        return torch.cat(outputs, 1), torch.cat(states)

    tensors = tuple(inputs[name] for name in ("q", "k", "v", "log_decay", "beta"))
    ours = by_documents(run, tensors, state, starts)
    torch.testing.assert_close(ours, gated_delta_rule(*tensors, state, starts), rtol=1e-10, atol=1e-10)


def test_causal_conv1d_gets_channels_in_front_of_time(monkeypatch):
    def causal_conv1d_fn(*, x, weight, bias, initial_states, return_final_states, activation):
        """As the package documents it."""
        assert x.stride(1) == 1 and initial_states.stride(1) == 1 and return_final_states
        seen = torch.cat([initial_states, x], 2)
        y = F.conv1d(seen, weight[:, None], bias, groups=len(weight))
        return F.silu(y) if activation == "silu" else y, seen[:, :, x.shape[2] :]

    monkeypatch.setitem(sys.modules, "causal_conv1d", types.SimpleNamespace(causal_conv1d_fn=causal_conv1d_fn))
    for settings in equation("short_conv").VARIANTS.values():
        inputs = equation("short_conv").example(**settings)
        arguments = positional("short_conv", inputs, None)
        truth = equation("short_conv").short_conv(*arguments)
        torch.testing.assert_close(OPERATORS["short_conv"]["causal_conv1d"](*arguments), truth)
    with pytest.raises(ValueError, match="takes no starts"):
        OPERATORS["short_conv"]["causal_conv1d"](*positional("short_conv", inputs, torch.ones(2, 37).bool()))


def test_mamba_ssm_gets_channels_in_front_of_time(monkeypatch):
    def selective_scan_fn(*, u, delta, A, B, C, D, z, delta_bias, delta_softplus, return_last_state):
        """As the package documents it."""
        assert delta_softplus and return_last_state
        across = (None if x is None else x.mT for x in (u, delta, B, C, z))
        x, dt, B, C, gate = across
        y, last = equation("selective_scan").selective_scan(x, dt, A, B, C, D, gate, delta_bias, None, None)
        return y.mT, last

    interface = types.SimpleNamespace(selective_scan_fn=selective_scan_fn)
    monkeypatch.setitem(sys.modules, "mamba_ssm.ops.selective_scan_interface", interface)
    for settings in equation("selective_scan").VARIANTS.values():
        inputs = equation("selective_scan").example(dtype=torch.float32, **settings)
        arguments = positional("selective_scan", {**inputs, "state": None}, None)
        truth = equation("selective_scan").selective_scan(*arguments)
        torch.testing.assert_close(OPERATORS["selective_scan"]["mamba_ssm"](*arguments), truth)
    with pytest.raises(ValueError, match="takes no state"):
        OPERATORS["selective_scan"]["mamba_ssm"](*positional("selective_scan", inputs, None))


@pytest.mark.parametrize("package", PACKAGES)
def test_an_adapter_that_cannot_run_says_why(package):
    assert missing(package, torch.device("cpu"), torch.float32) is not None
    why = missing(package, torch.device("cuda"), torch.float64)
    assert why.endswith("not installed") or "float64" in why
