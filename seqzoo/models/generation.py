"""Sampling text from a model, one token at a time, for many prompts of different lengths at once."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor

from seqzoo.models.language_model import LanguageModel


def stream(
    net: LanguageModel,
    prompts: Sequence[Int[Tensor, " _"]],
    *,
    max_new_tokens: int,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    prefill_chunk: int = 2048,
    generator: torch.Generator | None = None,
) -> Iterator[Int[Tensor, " batch"]]:
    """Yield the next token of every prompt, ``max_new_tokens`` times.

    Shorter prompts are padded on the left; a document's start after the padding keeps it out of sight.

    Args:
        net: the model; it is switched to evaluation while the stream runs, and back after.
        prompts: token ids, at least one a prompt.
        max_new_tokens: tokens to draw, 0 or more.
        temperature: divides the logits; 0 takes the most likely token.
        top_k: draw among the k most likely tokens only; None for all.
        top_p: draw among the most likely tokens that together reach this probability, in (0, 1]; None for all.
        prefill_chunk: tokens of the prompt that are read in one call, which bounds memory.
        generator: source of randomness; None for torch's own.

    Raises:
        ValueError: a setting is out of range, or a prompt is empty or holds ids that the model does not have.
    """
    _check(net, prompts, max_new_tokens, temperature, top_k, top_p, prefill_chunk)
    return _stream(net, prompts, max_new_tokens, temperature, top_k, top_p, prefill_chunk, generator)


def generate(
    net: LanguageModel, prompts: Sequence[Int[Tensor, " _"]], *, max_new_tokens: int, **sampling
) -> Int[Tensor, "batch new"]:
    """All tokens of ``stream`` at once; same arguments, same errors."""
    tokens = list(stream(net, prompts, max_new_tokens=max_new_tokens, **sampling))
    return torch.stack(tokens, 1) if tokens else torch.empty(len(prompts), 0, dtype=torch.long)


def _stream(net, prompts, max_new_tokens, temperature, top_k, top_p, prefill_chunk, generator):
    device = net.embedding.weight.device
    longest = max(map(len, prompts))
    tokens = torch.zeros(len(prompts), longest, dtype=torch.long, device=device)
    starts = torch.zeros(len(prompts), longest, dtype=torch.bool, device=device)
    for row, prompt in enumerate(prompts):
        tokens[row, longest - len(prompt) :] = prompt.to(device)
        starts[row, longest - len(prompt)] = True
    ragged = any(len(prompt) < longest for prompt in prompts)
    was_training = net.training
    net.eval()
    try:
        state, logits = None, None
        for piece, begins in zip(tokens.split(prefill_chunk, 1), starts.split(prefill_chunk, 1), strict=True):
            with torch.inference_mode():
                hidden, state = net.hidden(piece, state, begins if ragged else None)
                logits = net.head(hidden[:, -1])
        assert logits is not None
        for index in range(max_new_tokens):
            with torch.inference_mode():
                token = sample(logits, temperature=temperature, top_k=top_k, top_p=top_p, generator=generator)
            yield token.clone()  # made outside inference mode, so that it may be trained on
            if index + 1 < max_new_tokens:
                with torch.inference_mode():
                    hidden, state = net.hidden(token[:, None], state)
                    logits = net.head(hidden[:, -1])
    finally:
        net.train(was_training)


def sample(
    logits: Float[Tensor, "batch vocab"],
    *,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    generator: torch.Generator | None = None,
) -> Int[Tensor, " batch"]:
    """Draw one token a row; arguments as in ``stream``."""
    if temperature == 0:
        return logits.argmax(-1)
    logits = logits.float() / temperature
    if top_k is not None and top_k < logits.shape[-1]:
        values, kept = logits.topk(top_k)
        logits = torch.full_like(logits, -torch.inf).scatter(1, kept, values)
    if top_p is not None and top_p < 1:
        ordered, order = logits.sort(descending=True)
        likely = ordered.softmax(-1)
        # A token stays if those before it do not reach top_p yet, so that one always does.
        drop = likely.cumsum(-1) - likely >= top_p
        logits = logits.masked_fill(torch.zeros_like(drop).scatter(1, order, drop), -torch.inf)
    return torch.multinomial(logits.softmax(-1), 1, generator=generator)[:, 0]


def _check(net, prompts, max_new_tokens, temperature, top_k, top_p, prefill_chunk) -> None:
    if not prompts or any(prompt.ndim != 1 or len(prompt) == 0 for prompt in prompts):
        raise ValueError("prompts: give at least one, each a vector of at least one token id")
    for prompt in prompts:
        wrong = prompt[(prompt < 0) | (prompt >= net.vocab_size)]
        if len(wrong):
            raise ValueError(f"a prompt holds token {int(wrong[0])}; ids run from 0 to {net.vocab_size - 1}")
    if max_new_tokens < 0:
        raise ValueError(f"max_new_tokens={max_new_tokens}: use 0 or more")
    if not temperature >= 0:
        raise ValueError(f"temperature={temperature}: use 0 (the most likely token) or more")
    if top_k is not None and top_k < 1:
        raise ValueError(f"top_k={top_k}: use 1 or more, or None for all tokens")
    if top_p is not None and not 0 < top_p <= 1:
        raise ValueError(f"top_p={top_p}: use a probability in (0, 1], or None for all tokens")
    if prefill_chunk < 1:
        raise ValueError(f"prefill_chunk={prefill_chunk}: use 1 or more")
