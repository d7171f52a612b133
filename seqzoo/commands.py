"""What ``seqzoo layers | show | generate`` do: each a function of plain settings."""

from __future__ import annotations

import inspect
import re

from rich.console import Console

from seqzoo.mixer import Mixer


def layers() -> None:
    """List the mixers that a config can name."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    from seqzoo.kernels import EVERY_OPERATOR
    from seqzoo.layers import FAMILIES

    table = Table("layer and family", "paper, numbers in a sequence's state, operators and kernels", box=SIMPLE_HEAD)
    for column in table.columns:
        column.overflow = "fold"
    for family, members in FAMILIES.items():
        for layer in members:
            facts = [", ".join(cite(layer)[1:]), f"state: {layer.state_formula}"]
            facts += [f"{name}: {', '.join(EVERY_OPERATOR[name])}" for name in layer.operators]
            table.add_row(f"{layer.__name__}\n{family}", "\n".join(facts), end_section=True)
    Console().print(table)


def show(name: str) -> None:
    """Print one layer's idea, equation, settings with their defaults, and state.

    Args:
        name: a layer of the catalogue, such as GatedDeltaNet.
    """
    from seqzoo import layers as catalogue
    from seqzoo.kernels import EVERY_OPERATOR

    try:
        layer = getattr(catalogue, name)
    except AttributeError as error:
        raise ValueError(str(error)) from error
    if layer not in catalogue.LAYERS:
        raise ValueError(f"{name!r} is not a layer; there are {', '.join(each.__name__ for each in catalogue.LAYERS)}")
    say = Console(highlight=False, markup=False, soft_wrap=True).print
    say(f"seqzoo.layers.{name}\n\n{inspect.getdoc(inspect.getmodule(layer))}\n\n{inspect.getdoc(layer)}\n\nDefaults:")
    for parameter in list(inspect.signature(layer).parameters.values())[1:]:
        say(f"    {parameter.name}: {parameter.annotation} = {parameter.default!r}")
    constant = "constant" if layer(32).constant_state else "grows with the tokens read (T)"
    say(f"\nState: {layer.state_formula} numbers a sequence; with the defaults it is {constant}.")
    for operator in layer.operators:
        say(f"Operator: {operator} ({', '.join(EVERY_OPERATOR[operator])})")


def generate(
    checkpoint: str,
    prompt: str = "def ",
    max_new_tokens: int = 300,
    temperature: float = 0.8,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int = 0,
) -> None:
    """Continue a prompt with a byte-level model and print the text as it comes.

    Args:
        checkpoint: a .ckpt or .safetensors file, or a run's folder, of which the newest checkpoint is taken.
        prompt: text to continue; at least one character.
        max_new_tokens: bytes to draw.
        temperature: divides the logits; 0 takes the most likely byte.
        top_k: draw among the k most likely bytes only.
        top_p: draw among the most likely bytes that together reach this probability.
        seed: of the draw.
    """
    import codecs

    import torch

    from seqzoo.models import load_model, stream

    net = load_model(checkpoint)
    if net.vocab_size != 256:
        raise ValueError(f"checkpoint {checkpoint} has vocab_size={net.vocab_size}; text needs a model of bytes, 256")
    tokens = stream(
        net,
        [torch.tensor(list(prompt.encode()), dtype=torch.long)],
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        generator=torch.Generator().manual_seed(seed),
    )
    print(prompt, end="", flush=True)
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    for token in tokens:
        print(decoder.decode(bytes([int(token)])), end="", flush=True)
    print()


def cite(layer: type[Mixer]) -> tuple[str, str, str]:
    """The idea, the authors and year, and the link that the first line of a layer's file gives."""
    first = (inspect.getdoc(inspect.getmodule(layer)) or "").partition("\n")[0]
    found = re.fullmatch(r"(.+) \((.+ \d{4}), (https?://\S+)\)\.", first)
    if not found:
        raise ValueError(f"{layer.__module__} opens with {first!r}; expected 'Idea (Authors YEAR, https://link).'")
    return found[1], found[2], found[3]
