"""The one contract: ``y, state = mixer(x, state, starts)``, and what every state can do.

Axes in shape annotations: ``batch time dim``, and inside layers ``head key value``. A state is a NamedTuple of
tensors, batch first, and nothing else, so ``torch.utils._pytree.tree_map`` moves, detaches and reorders any of them.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, ClassVar, NamedTuple, TypeVar

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from seqzoo.parts.call_checks import checked
from seqzoo.parts.glu import GatedLinear

State = TypeVar("State")


class NoState(NamedTuple):
    """The state of a sublayer that remembers nothing (an MLP)."""


class Mixer(nn.Module):
    """Base of every sublayer: a map from a sequence to a sequence of the same width, with an explicit state.

    A subclass takes ``dim`` first and keyword-only settings after it, writes its output through ``self.out``, and
    fills in the class attributes below. ``forward`` serves training, prefill, continuation and decoding alike; its
    inputs are checked before it runs.

    Args:
        dim: width of the input and output; None where only what the mixer is made of knows it.

    Raises:
        ValueError: ``dim`` is below 1.

    Attributes:
        causal: False for a mixer that also looks forward; the reason stands in its docstring.
        constant_state: True when the state's size does not depend on how much was read; settings may change it.
        state_formula: the state's size per sequence, in numbers, as a formula in the layer's own settings.
        operators: the operators of ``seqzoo.kernels`` that the layer stands on.
        no_weight_decay: names of parameters with two or more axes that must not decay (vectors never do).
    """

    causal: ClassVar[bool] = True
    constant_state: bool = True
    state_formula: ClassVar[str] = "0"
    operators: ClassVar[tuple[str, ...]] = ()
    no_weight_decay: frozenset[str] = frozenset()

    def __init_subclass__(cls, **settings: Any) -> None:
        super().__init_subclass__(**settings)
        if "forward" in vars(cls):
            cls.forward = checked(cls.forward)

    def __init__(self, dim: int | None = None) -> None:
        super().__init__()
        if dim is not None and dim < 1:
            raise ValueError(f"dim={dim}: a layer is 1 or more wide")
        self.input_width = dim

    def input_weight(self) -> Tensor | None:
        """A parameter of the dtype that inputs must have: the output projection's; None for any dtype."""
        # Not `self.out.weight`: a weight that torch.nn.utils.parametrize makes would be computed for it.
        out = self._modules.get("out")
        return None if out is None else out._parameters.get("weight")

    def forward(
        self,
        x: Float[Tensor, "batch time dim"],
        state: Any = None,
        starts: Bool[Tensor, "batch time"] | None = None,
    ) -> tuple[Float[Tensor, "batch time dim"], Any]:
        """Mix ``x`` along time.

        Args:
            x: inputs; any ``time >= 1``.
            state: what an earlier call returned, to go on from there; None at the start of a sequence. Passing a
                state hands it over: with autograd off it may be updated in place (``clone_state`` keeps a snapshot).
            starts: True where a new document begins; nothing flows across a start.

        Raises:
            ValueError: ``x``, ``state`` or ``starts`` do not fit the mixer or each other.

        Returns:
            Outputs of the same shape as ``x``, and the state after the last token.
        """
        raise NotImplementedError(f"{type(self).__name__} does not define forward()")

    def share(
        self,
        x: Float[Tensor, "batch time dim"],
        state: Any,
        starts: Bool[Tensor, "batch time"] | None,
        last: Any,
    ) -> Any:
        """What a layer above that reads this one is called with, as ``source``: this one's state, unless it says else.

        Args:
            x: what ``forward`` was called with.
            state: the same; where it may be updated in place, it is spent by now.
            starts: the same.
            last: the state that ``forward`` returned.
        """
        return last

    def state_bytes(self, length: int, *, dtype: torch.dtype = torch.float32) -> int:
        """Bytes of one sequence's state after one call over ``length`` tokens of ``dtype`` activations."""
        raise NotImplementedError(f"{type(self).__name__} does not define state_bytes()")

    def reset_parameters(self) -> None:
        """Draw every parameter anew, in place; what makes a mixer that was built on the meta device usable."""
        for child in self.children():
            reset_parameters(child)

    @torch.no_grad()
    def scale_output(self, factor: float) -> None:
        """Multiply the output projection by ``factor``: how the stack keeps deep residual streams at unit scale."""
        out = getattr(self, "out", None)
        if isinstance(out, GatedLinear):
            return out.scale_output(factor)
        if not isinstance(out, nn.Linear):
            raise ValueError(
                f"{type(self).__name__} has no output projection 'self.out' (an nn.Linear) to scale with depth; "
                "name its last projection 'out', or override scale_output()"
            )
        for parameter in out.parameters():
            parameter.mul_(factor)


def reset_parameters(module: nn.Module) -> None:
    """Call ``reset_parameters`` on ``module``, or on the nearest descendants that have one."""
    reset = getattr(module, "reset_parameters", None)
    if callable(reset):
        reset()
    else:
        for child in module.children():
            reset_parameters(child)


def clone_state(state: State) -> State:
    """A copy of ``state`` that later calls cannot change."""
    return tree_map(torch.clone, state)


def detach_state(state: State) -> State:
    """The same state, cut from the autograd graph."""
    return tree_map(torch.detach, state)


def measure_state(state: Any) -> int:
    """Bytes that the tensors of ``state`` take, over all its batch rows."""
    return sum(leaf.nbytes for leaf in tree_leaves(state) if isinstance(leaf, Tensor))


def named_mixers(module: nn.Module) -> Iterator[tuple[str, Mixer]]:
    """Every mixer inside ``module`` with its name, outermost first."""
    return ((name, child) for name, child in module.named_modules() if isinstance(child, Mixer))


def starts_from_cu_seqlens(cu_seqlens: Int[Tensor, " documents_plus_one"]) -> Bool[Tensor, "1 time"]:
    """The ``starts`` of documents packed in one row, from the cumulative lengths of varlen APIs.

    Args:
        cu_seqlens: 0, the ends of all documents but the last, and the total length; non-decreasing.

    Raises:
        ValueError: the lengths do not begin at 0 or decrease.
    """
    if cu_seqlens.ndim != 1 or len(cu_seqlens) < 2 or cu_seqlens[0] != 0 or (cu_seqlens.diff() < 0).any():
        raise ValueError(
            f"cu_seqlens={cu_seqlens.tolist()}: expected a vector of cumulative lengths that begins at 0 "
            "and never decreases, such as [0, 3, 7]"
        )
    total = int(cu_seqlens[-1])
    starts = torch.zeros(1, total, dtype=torch.bool, device=cu_seqlens.device)
    begins = cu_seqlens[:-1]
    starts[0, begins[begins < total].long()] = True
    return starts


def positions_from_starts(
    starts: Bool[Tensor, "batch time"] | None, offset: Int[Tensor, " batch"] | None, time: int, device: torch.device
) -> Int[Tensor, "batch time"]:
    """How many tokens of its own document stand before each token.

    Args:
        starts: True where a document begins; None when none does.
        offset: tokens of the open document that earlier calls have read; None for none.
        time: number of tokens.
        device: where the result lives.

    Raises:
        ValueError: ``offset`` is no vector of int64.

    Returns:
        ``[batch, time]``, or ``[1, time]`` where all rows agree.
    """
    if offset is not None and (offset.ndim != 1 or offset.dtype != torch.int64):
        raise ValueError(
            f"state.position is {offset.dtype} {tuple(offset.shape)}; expected torch.int64 (batch,), how many "
            "tokens each open document has"
        )
    index = torch.arange(time, device=device)[None]
    running = index if offset is None else index + offset[:, None]
    if starts is None:
        return running
    last_start = torch.where(starts, index, -1).cummax(1).values
    return torch.where(last_start >= 0, index - last_start, running)
