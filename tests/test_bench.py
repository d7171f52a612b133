"""The benchmarks of layers: what they cover, and what is made of their measurements."""

from __future__ import annotations

import sys

import bench
import cost_bench
import layer_bench
import operator_cases
import pytest
import results
import share_bench
import torch
from layer_cases import CASES, module_side
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from seqzoo.layers import FAMILIES


def test_every_mixer_of_the_catalogue_is_timed():
    mixers = {layer.__name__ for family, kinds in FAMILIES.items() if family != "feed-forward" for layer in kinds}
    assert {case.name for case in CASES} == mixers
    drawn = [family for families in cost_bench.PANELS.values() for family in families]
    assert {*drawn, "attention", "feed-forward"} == FAMILIES.keys()


@pytest.mark.parametrize("name", ["Mamba2", "GatedDeltaNet", "S4D"])
def test_shares_are_of_the_whole(name):
    layer = next(case for case in CASES if case.name == name).build(64)
    with share_bench.marked(layer):
        both = module_side(layer, 64, torch.float32).both
        both()
        spent = share_bench.split_time(both)
    assert sum(spent.values()) == pytest.approx(1, abs=0.05)
    assert spent["operator"] > 0 and spent["products"] > 0 and spent["rest"] > 0
    assert (spent["convolution"] > 0) == ("short_conv" in layer.operators)


def test_peers_keep_to_the_dtype_that_is_asked_for(monkeypatch, capsys):
    timed = set()

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            results = func(*args, **(kwargs or {}))
            timed.update(x.dtype for x in tree_leaves((args, kwargs, results)) if isinstance(x, Tensor))
            return results

    def medians(sides, *_):
        with Watch():
            return {name: 1.0 for name, run in sides.items() if run() is not None}

    monkeypatch.setattr(sys, "argv", ["bench.py", "peers", "--only", "short", "--length", "64", "--dtype", "float32"])
    monkeypatch.setattr(bench, "THREADS", torch.get_num_threads())
    monkeypatch.setattr(bench, "medians", medians)
    bench.main()
    assert timed == {torch.float32}
    shown = capsys.readouterr().out
    assert "torch_conv1d" in shown and "float32" in shown and "bfloat16" not in shown


def test_verdicts_and_tables():
    case = next(case for case in CASES if case.name == "Mamba2")
    times = {"seqzoo": [1.0, 2.0], "a_peer": [1.5, 3.5], "b_peer": [0.9, 9.0], layer_bench.SOFTMAX: [0.1, 4.0]}
    assert layer_bench.best_peer(times, 1) == ("a_peer", 1.75)
    assert layer_bench.against_target(case, times, "float32") == "1.7x: forward missed"
    assert layer_bench.against_target(case, times | {"b_peer": [1.0, 9.0]}, "float32") == "1.7x: met"
    kept = {"Mamba2": {"float32": times, "bfloat16": {name: times[name] for name in ("seqzoo", layer_bench.SOFTMAX)}}}
    assert "| `Mamba2` | 2000 | 1.8 (a) | 2.0 | 2000 |  | 2.0 |" in layer_bench.summary(kept)
    assert "b_peer" in layer_bench.details(kept)


def test_operators_are_held_to_their_targets():
    convolution = next(case for case in operator_cases.CASES if case.name == "short convolution")
    times = {"seqzoo": 1.0, "a_peer": 9.0, "b_peer": 20.0}
    assert bench.against_target(convolution, "float32", times, times) == "8x: forward missed"
    assert bench.against_target(convolution, "float32", times | {"a_peer": 10.0}, times) == "8x: met"
    assert bench.against_target(convolution, "float32", {"seqzoo": 1.0}, {"seqzoo": 1.0}) == ""


def test_the_picture_and_table_of_costs(tmp_path):
    points = {str(n): {"seconds": 1e-4 * n, "bytes": 1e5 * n} for n in cost_bench.LENGTHS}
    measured = {case.title: points for case in CASES} | {"Attention": {"4096": {"seconds": 1.0, "bytes": 1e6}}}
    cost_bench.draw(measured, tmp_path / "costs.png")
    assert (tmp_path / "costs.png").stat().st_size > 10_000
    assert "| Mamba2 | 410 | 2.4 | 391 MiB | 6554 |  | 6.1 GiB |" in cost_bench.table(measured)


def test_text_between_marks(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("a\n<!-- b -->\nold\n<!-- end -->\nc\n<!-- d -->\n<!-- end -->\n")
    assert results.filled(page, "b", "new") == "a\n<!-- b -->\nnew\n<!-- end -->\nc\n<!-- d -->\n<!-- end -->\n"
    with pytest.raises(ValueError, match="0 places"):
        results.filled(page, "e", "new")
