"""What the compile report counts, on machine code and layouts as compilers write them."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import compile_kernels
import pytest

LAYOUTS = """
#blocked = #ttg.blocked<{sizePerThread = [1, 8], threadsPerWarp = [8, 4], warpsPerCTA = [4, 1], order = [1, 0]}>
#mma = #ttg.nvidia_mma<{versionMajor = 2, versionMinor = 0, warpsPerCTA = [4, 1], instrShape = [16, 8]}>
#mma1 = #ttg.amd_mfma<{version = 3, warpsPerCTA = [2, 2], instrShape = [32, 32, 8], isTransposed = true}>
"""


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
    good = compile_kernels.Kernel("sm_80", "job", "kernel", "hash", matmuls=2, in_loops=4, instructions=8)
    assert good.failures() == []
    assert good._replace(spilled=4).failures() == ["spills 4 bytes"]
    assert good._replace(shared=163 * 1024).failures() == []
    for bad in ({"shared": 163 * 1024 + 1}, {"missed": 1}, {"instructions": 0}, {"error": "does not compile"}):
        assert len(good._replace(**bad).failures()) == 1


@pytest.mark.slow
@pytest.mark.parametrize("target", ["sm_80", "sm_90", "sm_100", "gfx942"])
def test_compiles_an_operator(target):
    pytest.importorskip("triton")
    script = Path(compile_kernels.__file__)
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, script, "--target", target, "--operator", "short_conv", "--mode", "decode"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=script.parents[1])
    assert done.returncode == 0, done.stderr
    assert re.search(r"short_conv\._forward .*\b0 +0 +0 +0 +0 +0 *$", done.stdout, re.MULTILINE), done.stdout
    assert "; 0 failures" in done.stdout
