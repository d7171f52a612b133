"""What the compile report counts, on machine code and layouts as compilers write them."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import compile_kernels
import pytest

LAYOUTS = """
#blocked = #ttg.blocked<{sizePerThread = [1, 8], threadsPerWarp = [8, 4], warpsPerCTA = [4, 1], order = [1, 0]}>
#mma = #ttg.nvidia_mma<{versionMajor = 2, versionMinor = 0, warpsPerCTA = [4, 1], instrShape = [16, 8]}>
#mma1 = #ttg.amd_mfma<{version = 3, warpsPerCTA = [2, 2], instrShape = [32, 32, 8], isTransposed = true}>
"""
JOB = compile_kernels.Job("sm_80", "gated_delta_rule", "scalar decay", (("key", 64), ("value", 64)), "train")


def dot(layout):
    operand = f"tensor<64x64xbf16, #ttg.dot_op<{{opIdx = 0, parent = #{layout}, kWidth = 2}}>>"
    return f"  %x = tt.dot %a, %b, %c : {operand} * {operand} -> tensor<64x64xf32, #{layout}> loc(#loc1)\n"


@pytest.mark.parametrize(("layout", "missed"), [("mma", 0), ("mma1", 0), ("blocked", 1)])
def test_matmuls_that_miss_tensor_cores(layout, missed):
    assert compile_kernels.matmuls(LAYOUTS + dot(layout)) == (1, missed)
    assert compile_kernels.matmuls(LAYOUTS + dot("mma") + dot(layout)) == (2, missed)
    assert compile_kernels.matmuls(LAYOUTS + "  %y = ttng.warp_group_dot %a, %b, %c : x -> tensor<1xf32, #mma>") == (
        1,
        0,
    )


@pytest.mark.parametrize(
    "code",
    [
        [("0x0", "HMMA A"), ("0x10", "MOV"), ("0x20", "HMMA B"), ("0x30", "@P0 BRA 0x10"), ("0x40", "BRA 0x40")],
        [("", "HMMA A"), (".LBB0_1", "HMMA B"), (".LBB0_1", "s_cbranch_scc1 .LBB0_1"), (".LBB0_2", "s_branch .LBB0_3")],
    ],
)
def test_instructions_in_loops(code):
    assert compile_kernels.count_in_loops(code, re.compile("HMMA")) == (1, 2)


def test_failures():
    good = compile_kernels.Kernel("sm_80", JOB, "kernel", "hash", matmuls=2, in_loops=4, instructions=8)
    assert good.failures() == []
    assert good._replace(spilled=4).failures() == ["spills 4 bytes"]
    assert good._replace(shared=163 * 1024).failures() == []
    for bad in ({"shared": 163 * 1024 + 1}, {"missed": 1}, {"instructions": 0}, {"error": "does not compile"}):
        assert len(good._replace(**bad).failures()) == 1


def test_quick_calls_reach_every_variant_and_size():
    operators = ["gated_linear_attention", "short_conv"]
    whole, quick = (
        compile_kernels.collect_jobs("sm_90", operators, ["train", "packed", "decode"], quick=quick, compare_fla=False)
        for quick in (False, True)
    )
    assert set(quick) < set(whole)
    assert {job[:4] for job in quick} == {job[:4] for job in whole}
    assert {job[:3] for job in quick if job.mode == "decode"} == {job[:3] for job in whole}
    both = compile_kernels.collect_jobs("sm_90", ["linear_scan", "short_conv"], ["decode"], True, compare_fla=True)
    assert {(job.operator, job.backend) for job in both} == {
        ("linear_scan", "triton"), ("short_conv", "triton"), ("short_conv", "fla")
    }  # fmt: skip


def test_calls_of_both_sides():
    small = compile_kernels.Kernel("sm_80", JOB, "a", "1", registers=40, spilled=8, shared=64, instructions=3)
    large = small._replace(name="b", identity="2", registers=90, shared=32)
    theirs = JOB._replace(backend="fla")
    refused = compile_kernels.Kernel("sm_80", theirs, "-", "3", error="does not take it")
    calls = {JOB: [small, large, small], theirs: [refused], JOB._replace(mode="decode"): [small]}
    table = compile_kernels.show_calls("sm_80", calls)
    columns = {column.header: list(column.cells) for column in table.columns}
    assert columns["side"] == ["seqzoo", "fla"]
    assert columns["kernels"] == ["2", "does not take it"]
    assert [columns[name][0] for name in ("registers", "spilled", "shared", "all")] == ["90", "16", "64", "6"]


def test_remembers_what_the_assembler_said(tmp_path, monkeypatch):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    kernel = SimpleNamespace(hash="abc")
    assert compile_kernels.remember(kernel, "Used 40 registers") == "Used 40 registers"
    assert compile_kernels.remember(kernel, None) == "Used 40 registers"


@pytest.mark.slow
@pytest.mark.parametrize("target", ["sm_80", "sm_90", "sm_100", "gfx942"])
def test_compiles_an_operator(target):
    pytest.importorskip("triton")
    script = Path(compile_kernels.__file__)
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, script, "--target", target, "--operator", "short_conv", "--mode", "decode"]
    command += ["--compare-fla"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=script.parents[1])
    assert done.returncode == 0, done.stderr
    assert re.search(r"short_conv\._forward .*\b0 +0 +0 +0 +0 +0 *$", done.stdout, re.MULTILINE), done.stdout
    assert "3 kernels of 3 calls" in done.stdout
    assert "; 0 failures" in done.stdout
    assert re.search(r"silu.* seqzoo +1 .*\n.*silu.* fla +\d ", done.stdout), done.stdout
    assert f"{target} 6/6" in done.stderr
