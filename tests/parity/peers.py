"""How a layer is compared with another project's: the same weights, then outputs, gradients, states and rounding."""

from __future__ import annotations

import contextlib
import copy
import importlib
import sys
from collections.abc import Callable, Mapping
from statistics import median
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("transformers", reason="the peers that layers are compared with are transformers' classes")

TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-10}
PRECISIONS = pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
TIMES = pytest.mark.parametrize("time", [1, 37, 100])

# How our parameter is found among the peer's: by name, or computed from all of them.
Names = Mapping[str, str | Callable[[Mapping[str, Tensor]], Tensor]]


def modeling(family: str) -> Any:
    """transformers' file for ``family``, bound to its own PyTorch code even where faster packages are installed."""
    hidden = ("fla", "mamba_ssm", "causal_conv1d")
    present = {name: sys.modules[name] for name in hidden if name in sys.modules}
    sys.modules.update(dict.fromkeys(hidden))
    try:
        return importlib.import_module(f"transformers.models.{family}.modeling_{family}")
    finally:
        for name in hidden:
            del sys.modules[name]
        sys.modules.update(present)


@contextlib.contextmanager
def widened(dtype: torch.dtype):
    """In float64, the peers' own casts to float32 mean float64: what they compute can then be compared exactly."""
    with pytest.MonkeyPatch.context() as patch:
        if dtype == torch.float64:
            patch.setattr(torch, "float32", torch.float64)
            patch.setattr(torch, "float", torch.float64)
            patch.setattr(Tensor, "float", Tensor.double)
        yield


class Pair(NamedTuple):
    """Our layer, the peer with the same weights, and how the peer is called: ``run(peer, x, cache) -> y``.

    Of a peer that keeps a cache, ``new_cache()`` is an empty one, ``state_from(cache, state)`` our state that says the
    same (``state`` is ours as it is, for what the cache does not hold), and ``later`` lengths of calls that go on.
    """

    ours: nn.Module
    peer: nn.Module
    names: Names
    run: Callable[[nn.Module, Tensor, Any], Tensor]
    new_cache: Callable[[], Any] | None = None
    state_from: Callable[[Any, Any], Any] | None = None
    later: tuple[int, ...] = (1, 1, 63)

    def call_peer(self, x: Tensor, cache: Any = None) -> Tensor:
        with widened(x.dtype):
            return self.run(self.peer, x, cache)

    def to(self, dtype: torch.dtype) -> Pair:
        """A copy whose weights are rounded to ``dtype``."""
        return self._replace(ours=copy.deepcopy(self.ours).to(dtype), peer=copy.deepcopy(self.peer).to(dtype))


def pair(
    ours: nn.Module, peer: nn.Module, names: Names, run: Callable[[nn.Module, Tensor, Any], Tensor], **cache: Any
) -> Pair:
    """Both in float64 with the same weights, none at a value that hides its effect; ``cache`` as in ``Pair``."""
    assert sum(p.numel() for p in ours.parameters()) == sum(p.numel() for p in peer.parameters())
    both = Pair(ours.double(), peer.double(), names, run, **cache)
    redraw(both)
    return both


@torch.no_grad()
def redraw(pair: Pair) -> None:
    """Move the peer's weights a little, and give ours the same; buffers stay."""
    for parameter in pair.peer.parameters():
        parameter.add_(torch.randn_like(parameter), alpha=0.1)
    weights = rename(pair.names, dict(pair.peer.named_parameters()))
    pair.ours.load_state_dict(pair.ours.state_dict() | weights)


def rename(names: Names, theirs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The peer's parameters, or their gradients, under our names and in our shapes."""
    return {name: theirs[source] if isinstance(source, str) else source(theirs) for name, source in names.items()}


def draw(time: int, dtype: torch.dtype, *, dim: int = 32, seed: int = 0) -> Tensor:
    return torch.randn(2, time, dim, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def run_ours(pair: Pair, x: Tensor, cut: int = 0) -> dict[str, Tensor]:
    """Outputs and all gradients of our layer, the first ``cut`` tokens read by a call of their own."""
    x = x.detach().requires_grad_()
    outputs, state = [], None
    for piece in x.split([cut, x.shape[1] - cut] if cut else [x.shape[1]], 1):
        y, state = pair.ours(piece, state)
        outputs.append(y)
    parameters = dict(pair.ours.named_parameters())
    output = torch.cat(outputs, 1)
    return {"output": output.detach()} | differentiate(output, {"x": x} | parameters)


def run_peer(pair: Pair, x: Tensor) -> dict[str, Tensor]:
    """Outputs and all gradients of the peer, under our names."""
    x = x.detach().requires_grad_()
    y = pair.call_peer(x)
    gradients = differentiate(y, {"x": x} | dict(pair.peer.named_parameters()))
    return {"output": y.detach(), "x": gradients.pop("x")} | rename(pair.names, gradients)


def differentiate(y: Tensor, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    weight = torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).bfloat16().to(y.dtype)
    return dict(zip(inputs, torch.autograd.grad(y, list(inputs.values()), weight), strict=True))


def error(ours: Tensor, truth: Tensor) -> float:
    """The size of the difference relative to the truth's; both are Euclidean norms."""
    assert ours.shape == truth.shape
    difference = (ours.double() - truth.double()).norm().item()
    return difference / (truth.double().norm().item() or 1)  # one key alone has no gradient, but for rounding


def assert_agree(ours: Mapping[str, Tensor], theirs: Mapping[str, Tensor], dtype: torch.dtype) -> None:
    assert ours.keys() == theirs.keys()
    for name, ours_ in ours.items():
        assert ours_.dtype == theirs[name].dtype and ours_.dtype in (dtype, torch.int64), name  # integers are counts
        assert (apart := error(ours_, theirs[name])) <= TOLERANCE[dtype], f"{name} are {apart:.2e} apart"


def assert_rounds_no_worse(pair: Pair, time: int = 100, draws: int = 9) -> None:
    """In bfloat16 our errors are at most twice the peer's, the truth being our float64 on the same rounded numbers.

    Errors are medians over draws of weights and inputs: once in a while a norm divides by almost nothing.
    """
    ours, theirs = {}, {}
    for seed in range(draws):
        both = pair.to(torch.float64)
        redraw(both)
        narrow, x = both.to(torch.bfloat16), draw(time, torch.bfloat16, seed=seed)
        truth = run_ours(narrow.to(torch.float64), x.double())
        for errors, result in ((ours, run_ours(narrow, x)), (theirs, run_peer(narrow, x))):
            for name, tensor in result.items():
                errors.setdefault(name, []).append(error(tensor, truth[name]))
    for name in ours:
        typical, allowed = median(ours[name]), median(theirs[name])
        assert typical <= 2 * allowed, f"{name}: error {typical:.2e}, the peer's is {allowed:.2e}"


class Agreement:
    """What a layer with a peer is tested for: a module's ``class Test...(Agreement)`` takes its pair from the module's
    fixture ``both``."""

    @PRECISIONS
    @TIMES
    def test_values_and_gradients(self, both: Pair, dtype: torch.dtype, time: int) -> None:
        both, x = both.to(dtype), draw(time, dtype)
        assert_agree(run_ours(both, x), run_peer(both, x), dtype)

    @PRECISIONS
    @pytest.mark.parametrize("cut", [1, 37, 99])
    def test_gradients_through_the_state(self, both: Pair, dtype: torch.dtype, cut: int) -> None:
        both, x = both.to(dtype), draw(100, dtype)
        assert_agree(run_ours(both, x, cut), run_peer(both, x), dtype)


class CacheAgreement(Agreement):
    """The same for a peer that keeps a cache."""

    @PRECISIONS
    @pytest.mark.parametrize("first", [2, 37])
    @torch.no_grad()
    def test_goes_on_from_the_peers_cache(self, both: Pair, dtype: torch.dtype, first: int) -> None:
        both = both.to(dtype)
        assert both.new_cache is not None and both.state_from is not None
        cache, state = both.new_cache(), None
        for time in (first, *both.later):
            x = draw(time, dtype, seed=time)
            theirs = both.call_peer(x, cache)
            y, state = both.ours(x, state)
            expected = both.state_from(cache, state)
            assert_agree({"y": y, **state._asdict()}, {"y": theirs, **expected._asdict()}, dtype)
            state = expected
