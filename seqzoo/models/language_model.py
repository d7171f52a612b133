"""The only stack: embedding, a flat list of ``x + mixer(norm(x))``, norm, head.

A Transformer is the pattern ``[attention, mlp]``, Mamba-2 is ``[mamba]``, a hybrid is a longer list.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from difflib import get_close_matches
from typing import Any, Literal, cast, final

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from seqzoo.mixer import Mixer, reset_parameters
from seqzoo.parts.settings import check_positive

HEAD_STD = 0.02
IGNORED = -100
"""The label of a position where nothing is asked, as in ``torch.nn.functional.cross_entropy``."""

NORMS: dict[str, type[nn.Module]] = {"rms": nn.RMSNorm, "layer": nn.LayerNorm}


@final
class LanguageModel(nn.Module):
    """A causal language model whose sublayers are listed, not coded.

    ``pattern`` is repeated ``repeats`` times; each of its names is looked up in ``layers`` and builds one sublayer.
    Output projections are scaled by one over the root of the number of sublayers, so that the residual stream starts
    at the same scale at any depth. Embeddings start as random vectors of length one: a tied head gives logits of unit
    scale, and the first sublayers neither drown nor miss them.

    Args:
        vocab_size: number of tokens; 256 for bytes.
        dim: width of the residual stream.
        pattern: names of the sublayers of one period, in order.
        layers: what each name builds: a mixer class, or one with some of its settings given.
        repeats: how many times the pattern is repeated.
        reads: which name reads which: each sublayer of the one is given what the nearest of the other below it shares.
        norm: ``rms`` or ``layer``, before every sublayer and before the head.
        norm_eps: added to the mean square (or variance) in those norms.
        tie_embeddings: the head uses the embedding's weights.

    Raises:
        ValueError: a size is below 1, the pattern is empty or names a missing layer, a layer refuses its settings, or
            one that reads cannot, or has nothing below to read.
    """

    def __init__(
        self,
        *,
        pattern: list[str],
        layers: dict[str, Callable[[int], Mixer]],
        vocab_size: int = 256,
        dim: int = 256,
        repeats: int = 1,
        reads: dict[str, str] | None = None,
        norm: Literal["rms", "layer"] = "rms",
        norm_eps: float = 1e-5,
        tie_embeddings: bool = False,
    ) -> None:
        super().__init__()
        for name, value in {"vocab_size": vocab_size, "dim": dim, "repeats": repeats}.items():
            if value < 1:
                raise ValueError(f"{name}={value}: use 1 or more")
        check_positive("norm_eps", norm_eps)
        if norm not in NORMS:
            raise ValueError(f"norm={norm!r}: use {' or '.join(map(repr, NORMS))}")
        if not pattern:
            raise ValueError(f"pattern=[] is empty; list names of layers: {', '.join(layers)}")
        for name in pattern:
            if name not in layers:
                near = get_close_matches(name, layers, n=1)
                hint = f"did you mean {near[0]!r}?" if near else f"layers has {', '.join(layers) or 'no entries'}"
                raise ValueError(f"pattern names {name!r}, which layers does not define; {hint}")
        self._settings = {
            "vocab_size": vocab_size,
            "dim": dim,
            "pattern": list(pattern),
            "repeats": repeats,
            "reads": reads and dict(reads),
            "norm": norm,
            "norm_eps": norm_eps,
            "tie_embeddings": tie_embeddings,
        }
        self._layers = dict(layers)
        self.vocab_size, self.dim = vocab_size, dim
        self.names = [name for _ in range(repeats) for name in pattern]
        self.sources = _find_sources(self.names, reads or {})
        self.embedding = nn.Embedding(vocab_size, dim)
        self.norms = nn.ModuleList(NORMS[norm](dim, eps=norm_eps) for _ in self.names)
        self.mixers = nn.ModuleList(_build(name, layers[name], dim) for name in self.names)
        for name, mixer, source in zip(self.names, self.mixers, self.sources, strict=True):
            if source is not None and "source" not in inspect.signature(mixer.forward).parameters:
                raise ValueError(f"reads has {name!r}, but a {type(mixer).__name__} takes no source to read")
        self.norm = NORMS[norm](dim, eps=norm_eps)
        self.unembedding = nn.Linear(dim, vocab_size, bias=False)
        if tie_embeddings:
            self.unembedding.weight = self.embedding.weight
        self._scale_parameters()

    def sublayers(self) -> list[Mixer]:
        """The mixers from the bottom up, each built by the name at its place in ``names``."""
        return [cast(Mixer, mixer) for mixer in self.mixers]

    def reset_parameters(self) -> None:
        """Draw every parameter anew, in place."""
        if self._settings["tie_embeddings"]:
            self.unembedding.weight = self.embedding.weight  # Module.to_empty() unties them
        for child in (self.embedding, *self.norms, *self.mixers, self.norm, self.unembedding):
            reset_parameters(child)
        self._scale_parameters()

    def _scale_parameters(self) -> None:
        nn.init.normal_(self.unembedding.weight, std=HEAD_STD)
        nn.init.normal_(self.embedding.weight, std=self.dim**-0.5)
        for mixer in self.sublayers():
            mixer.scale_output(len(self.mixers) ** -0.5)

    def forward(
        self,
        tokens: Int[Tensor, "batch time"],
        state: tuple[Any, ...] | None = None,
        starts: Bool[Tensor, "batch time"] | None = None,
    ) -> tuple[Float[Tensor, "batch time vocab"], tuple[Any, ...]]:
        """Next-token logits, and the state to go on from: one entry a sublayer.

        Args:
            tokens: ids below ``vocab_size``.
            state: what an earlier call returned, handed over; None at the start of a sequence.
            starts: True where a new document begins; nothing flows across a start.
        """
        hidden, state = self.hidden(tokens, state, starts)
        return self.head(hidden), state

    def hidden(
        self,
        tokens: Int[Tensor, "batch time"],
        state: tuple[Any, ...] | None = None,
        starts: Bool[Tensor, "batch time"] | None = None,
    ) -> tuple[Float[Tensor, "batch time dim"], tuple[Any, ...]]:
        """``forward`` without the head, for losses that need the logits of a few positions only."""
        if state is not None and len(state) != len(self.mixers):
            raise ValueError(f"state has {len(state)} entries; this model has {len(self.mixers)} sublayers")
        x = self.embedding(tokens)
        states, shared = [], {}
        for index, (norm, mixer) in enumerate(zip(self.norms, self.sublayers(), strict=True)):
            h, old, source = norm(x), None if state is None else state[index], self.sources[index]
            y, new = mixer(h, old, starts) if source is None else mixer(h, old, starts, source=shared[source])
            if index in self.sources:
                shared[index] = mixer.share(h, old, starts, new)
            x = x + y
            states.append(new)
        return self.norm(x), tuple(states)

    def head(self, hidden: Float[Tensor, "... dim"]) -> Float[Tensor, "... vocab"]:
        """Logits of the next token."""
        return self.unembedding(hidden)

    def state_bytes(self, length: int, *, dtype: torch.dtype = torch.float32) -> int:
        """Bytes of one sequence's state after one call over ``length`` tokens."""
        return sum(mixer.state_bytes(length, dtype=dtype) for mixer in self.sublayers())

    def num_parameters(self) -> int:
        """Number of learned numbers, shared ones counted once."""
        return sum(parameter.numel() for parameter in self.parameters())

    def config(self) -> dict[str, Any]:
        """The settings as plain data, enough to build this model again from a config file.

        Raises:
            ValueError: a layer was given as a function, whose settings cannot be read.
        """
        layers = {name: _describe(name, factory) for name, factory in self._layers.items()}
        return self._settings | {"layers": layers}


def _build(name: str, factory: Callable[[int], Mixer], dim: int) -> Mixer:
    try:
        mixer = factory(dim)
    except ValueError as error:
        raise ValueError(f"layer {name!r}: {error}") from error
    if not isinstance(mixer, Mixer):
        raise ValueError(f"layer {name!r} builds a {type(mixer).__name__}; expected a subclass of seqzoo.Mixer")
    return mixer


def _find_sources(names: list[str], reads: dict[str, str]) -> list[int | None]:
    """For each sublayer of ``names``, the index of the one that it reads."""
    for name in {**reads, **dict.fromkeys(reads.values())}:
        if name not in names:
            raise ValueError(
                f"reads names {name!r}, which the pattern does not; it has {', '.join(dict.fromkeys(names))}"
            )
    nearest, sources = {}, []
    for index, name in enumerate(names):
        if name in reads and reads[name] not in nearest:
            raise ValueError(f"reads has {name!r} read {reads[name]!r}, but none stands below sublayer {index}")
        sources.append(nearest[reads[name]] if name in reads else None)
        nearest[name] = index
    return sources


def _describe(name: str, factory: Callable[[int], Mixer]) -> dict[str, Any]:
    # A partial holds the mixer's class as its function, or, when a config file made it, among its arguments.
    parts = (factory.func, *factory.args) if isinstance(factory, functools.partial) else (factory,)
    for part in parts:
        if isinstance(part, type) and issubclass(part, Mixer):
            settings = dict(factory.keywords) if isinstance(factory, functools.partial) else {}
            return {"class_path": f"{part.__module__}.{part.__qualname__}", "init_args": settings}
    raise ValueError(
        f"layer {name!r} is given as a function; pass a mixer class or a functools.partial of one to save it"
    )
