"""The check for the day a GPU is there, in small and in Triton's interpreter."""

from __future__ import annotations

import sys

import gpu_check
import pytest
import torch

from seqzoo.kernels import OPERATORS

pytest.importorskip("triton")
IN_TIME = float("inf")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_says_in_one_line_that_there_is_no_gpu(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(sys, "argv", ["gpu_check.py", "--out", str(tmp_path / "page.md")])
    assert gpu_check.main() == 2
    said = capsys.readouterr()
    assert said.out == "" and said.err == "gpu_check: no GPU that torch can use is here\n"
    assert not (tmp_path / "page.md").exists()


def test_right_kernels_pass_and_wrong_ones_are_named(monkeypatch):
    arguments = ("cpu", IN_TIME, ["short_conv"], (torch.bfloat16,), (20,))
    rows, right = gpu_check.check_numbers(*arguments)
    assert right and len(rows) == 5 and all("bfloat16" in row for row in rows[2:])

    def slightly_wrong(*inputs):
        y, state = right_one(*inputs)
        return 1.1 * y, state

    right_one = OPERATORS["short_conv"]["triton"]
    monkeypatch.setitem(OPERATORS["short_conv"], "triton", slightly_wrong)
    rows, right = gpu_check.check_numbers(*arguments)
    assert not right and all("**wrong**" in row for row in rows[2:])

    monkeypatch.setitem(
        OPERATORS["short_conv"], "triton", lambda *inputs: tuple(torch.nan * x for x in right_one(*inputs))
    )
    rows, right = gpu_check.check_numbers(*arguments)
    assert not right and all("**wrong** inf" in row for row in rows[2:])

    def broken(*inputs):
        raise RuntimeError("out of shared memory")

    monkeypatch.setitem(OPERATORS["short_conv"], "triton", broken)
    rows, right = gpu_check.check_numbers(*arguments)
    assert not right and all("**fails** | RuntimeError: out of shared memory" in row for row in rows[2:])
    rows, right = gpu_check.check_numbers("cpu", 0, *arguments[2:])
    assert right and all("not reached in time" in row for row in rows[2:])


def test_times_every_backend_that_can_run():
    (case,) = (
        case._replace(sizes=case.sizes | {"channels": 8}) for case in gpu_check.CASES if case.operator == "short_conv"
    )
    rows = gpu_check.check_speed("cpu", IN_TIME, 2, 64, [case])
    for side in (f"{case.name} | triton", f"{case.name} | chunked", "softmax attention | torch SDPA"):
        assert any(row.startswith(f"| {side} | ") for row in rows), rows
    assert not any("Error" in row for row in rows)
