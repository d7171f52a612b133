"""Operators against other people's PyTorch code, on the cases that `scripts/bench.py` times: outputs and gradients."""

from __future__ import annotations

import pytest
import torch
from operator_cases import CASES, draw, operator_of
from peers import widened

# Smaller heads; times that every peer's chunks divide.
SMALL = {"channels": 6, "size": 4, "groups": 2, "heads": 2, "key": 8, "value": 6}
TIME = 128
# xlstm adds 1e-6 to the denominator of mLSTM, minGRU's scan passes through logarithms.
TOLERANCE = {"xlstm_mlstm": 2e-5, "mingru_scan": 1e-8}


@pytest.fixture(autouse=True)
def wide():
    """Peers that allocate without naming a dtype do it in float64."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def small(case):
    return case._replace(sizes={name: SMALL.get(name, size) for name, size in case.sizes.items()})


def outputs_and_gradients(run, inputs):
    inputs = {name: x.clone().requires_grad_() if isinstance(x, torch.Tensor) else x for name, x in inputs.items()}
    y = run(**inputs)
    y = y if isinstance(y, torch.Tensor) else y[0]
    weight = torch.randn(y.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(y.dtype)
    learned = [x for x in inputs.values() if isinstance(x, torch.Tensor)]
    return [y.detach(), *torch.autograd.grad(y, learned, weight)]


PAIRS = [(case, peer) for case in CASES for peer in case.peers]


@pytest.mark.parametrize("backend", ["chunked", "auto"])
@pytest.mark.parametrize(("case", "peer"), PAIRS, ids=[f"{case.name}-{peer.__name__}" for case, peer in PAIRS])
def test_agrees_with(case, peer, backend):
    inputs = draw(small(case), TIME, torch.float64)
    ours = outputs_and_gradients(operator_of(case, backend), inputs)
    with widened(torch.float64):
        theirs = outputs_and_gradients(peer, inputs)
    tolerance = TOLERANCE.get(peer.__name__, 1e-10)
    for name, mine, other in zip(["output", *inputs], ours, theirs, strict=False):
        error = (mine - other).norm() / other.norm()
        assert error < tolerance, f"{name}: relative difference {error:.1e}"
