"""What the contract promises apart from the layers: what an import costs, and helpers for states and starts."""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
from typing import NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from seqzoo import LanguageModel, Mixer, clone_state, detach_state, measure_state, starts_from_cu_seqlens
from seqzoo.layers import SwiGLU
from seqzoo.mixer import NoState, named_mixers, positions_from_starts, reset_parameters

# The import.

HEAVY = ("triton", "transformers", "lightning", "matplotlib", "jsonargparse", "torch._dynamo")
IMPORT = """
import gc, sys, time
import torch
gc.disable()  # a collection of torch's objects, 0.15 s, falls into the import or not, by chance
before = time.process_time()
import seqzoo
print(time.process_time() - before, *sys.modules)
"""


@pytest.fixture(scope="module")
def imports():
    """Seconds that ``import seqzoo`` takes once torch is there, and the modules loaded after it, in fresh processes.

    The first run may compile sources to bytecode, as happens once where the package is installed.
    """
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    runs = [
        subprocess.run([sys.executable, "-c", IMPORT], capture_output=True, text=True, check=True, env=environment)
        for _ in range(3)
    ]
    assert all(not run.stderr for run in runs)
    return [(float(seconds), modules) for seconds, *modules in (run.stdout.split() for run in runs)]


def test_import_adds_little_time_to_that_of_torch(imports):
    assert statistics.median(seconds for seconds, _ in imports) < 0.3


def test_import_loads_no_heavy_optional_packages(imports):
    assert not set(imports[0][1]) & set(HEAVY)


# Starts.


@pytest.mark.parametrize(
    ("cu_seqlens", "expected"),
    [
        ([0, 3, 7], [1, 0, 0, 1, 0, 0, 0]),
        ([0, 1], [1]),
        ([0, 1, 2, 3], [1, 1, 1]),
        ([0, 0, 2, 2, 2, 3, 3], [1, 0, 1]),
        ([0, 0], []),
    ],
)
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64], ids=str)
def test_starts_stand_where_documents_that_are_not_empty_begin(cu_seqlens, expected, dtype):
    starts = starts_from_cu_seqlens(torch.tensor(cu_seqlens, dtype=dtype))
    assert starts.dtype == torch.bool and starts.tolist() == [[bool(begin) for begin in expected]]


@pytest.mark.parametrize("cu_seqlens", [[], [0], [1, 3], [-1, 3], [0, 3, 2], [[0, 3]]], ids=str)
def test_lengths_that_are_not_cumulative_are_refused(unchecked, cu_seqlens):
    with pytest.raises(ValueError, match=r"cu_seqlens=.*begins at 0 and never decreases, such as"):
        starts_from_cu_seqlens(torch.tensor(cu_seqlens, dtype=torch.int64))


def count_positions(starts, offsets):
    """``positions_from_starts`` for lists, as anybody would count."""
    rows = []
    for row, position in zip(starts, offsets, strict=True):
        counted = []
        for begin in row:
            position = 0 if begin else position
            counted.append(position)
            position += 1
        rows.append(counted)
    return rows


@pytest.mark.parametrize("time", [1, 2, 40])
def test_positions_count_the_tokens_since_the_last_start_or_before_the_call(time):
    random = torch.Generator().manual_seed(time)
    starts = torch.rand(5, time, generator=random) < 0.2
    offset = torch.randint(100, (5,), generator=random)
    none = torch.zeros_like(starts)
    zero = torch.zeros_like(offset)
    device = torch.device("cpu")
    for given_starts, actual_starts in ((starts, starts), (None, none)):
        for given_offset, actual_offset in ((offset, offset), (None, zero)):
            positions = positions_from_starts(given_starts, given_offset, time, device)
            assert positions.dtype == torch.int64
            assert positions.expand(5, -1).tolist() == count_positions(actual_starts.tolist(), actual_offset.tolist())


# States.


class Pair(NamedTuple):
    memory: Tensor
    inner: tuple


@pytest.fixture
def state():
    memory = torch.randn(2, 3, requires_grad=True) * 2
    return Pair(memory, (NoState(), torch.arange(2), memory[:, 1:].to(torch.bfloat16)))


def test_a_cloned_state_is_equal_keeps_gradients_and_shares_nothing(state):
    copy = clone_state(state)
    torch.testing.assert_close(copy, state)
    assert isinstance(copy, Pair) and isinstance(copy.inner[0], NoState) and copy.memory.requires_grad
    with torch.no_grad():
        tree_map(lambda leaf: leaf.fill_(0), state)
    assert copy.memory.all() and copy.inner[1].any() and copy.inner[2].all()


def test_a_detached_state_is_equal_and_has_no_gradients(state):
    detached = detach_state(state)
    torch.testing.assert_close(detached, tree_map(torch.detach, state))
    assert isinstance(detached, Pair) and not detached.memory.requires_grad and not detached.inner[2].requires_grad


def test_the_size_of_a_state_counts_every_row_and_dtype(state):
    assert measure_state(state) == 2 * (3 * 4 + 8 + 2 * 2)
    assert measure_state(None) == measure_state(NoState()) == measure_state(()) == 0


# A mixer of one's own.


class Unfinished(Mixer):
    pass


class RunningMean(Mixer):
    """The mean of all inputs so far: the smallest mixer with a memory."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.inner = nn.Sequential(nn.Linear(dim, dim), nn.LayerNorm(dim))
        self.out = nn.Linear(dim, dim)

    def forward(self, x, state=None, starts=None):
        total = self.inner(x).cumsum(1) + (0 if state is None else state.memory[:, None])
        count = torch.arange(1, x.shape[1] + 1) + (0 if state is None else state.inner[0][:, None])
        count = count.expand(len(x), -1)
        return self.out(total / count[..., None]), Pair(total[:, -1], (count[:, -1],))


def test_what_a_mixer_does_not_define_is_named():
    with pytest.raises(NotImplementedError, match=r"Unfinished does not define forward\(\)"):
        Unfinished()(torch.zeros(1, 1, 1))
    with pytest.raises(NotImplementedError, match=r"Unfinished does not define state_bytes\(\)"):
        Unfinished().state_bytes(1)


def test_a_mixer_without_an_output_projection_is_told_how_to_join_a_stack():
    with pytest.raises(
        ValueError, match=r"Unfinished has no output projection 'self\.out' .* override scale_output\(\)"
    ):
        LanguageModel(pattern=["own"], layers={"own": lambda dim: Unfinished()}, dim=8)


def test_a_mixer_of_ones_own_joins_a_stack():
    net = LanguageModel(pattern=["own", "mlp"], layers={"own": RunningMean, "mlp": SwiGLU}, dim=8, vocab_size=5)
    tokens = torch.arange(12).reshape(2, 6) % 5
    whole, _ = net(tokens)
    first, state = net(tokens[:, :4])
    rest, _ = net(tokens[:, 4:], state)
    torch.testing.assert_close(torch.cat([first, rest], 1), whole)
    assert [name for name, _ in named_mixers(net)] == ["mixers.0", "mixers.1"]


def test_reset_parameters_reaches_children_that_have_none_of_their_own():
    mixer = RunningMean(4)
    for parameter in mixer.parameters():
        nn.init.constant_(parameter, torch.nan)
    mixer.reset_parameters()
    assert all(parameter.isfinite().all() for parameter in mixer.parameters())
    bare = nn.ModuleList([nn.Sequential(nn.Linear(3, 3))])
    nn.init.constant_(bare[0][0].weight, torch.nan)
    reset_parameters(bare)
    assert bare[0][0].weight.isfinite().all()
