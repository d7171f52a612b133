"""The equation, one token at a time, with the state in float32 or better."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from seqzoo.kernels.backends import accumulation_dtype

VARIANTS = {
    "real": {},
    "real, constant": {"decay": "constant"},
    "complex": {"numbers": "complex"},
    "complex, constant": {"numbers": "complex", "decay": "constant"},
}


def linear_scan(a, b, state, starts):
    dtype = accumulation_dtype(b)
    a = a.to(dtype).expand(b.shape)
    if starts is not None:
        a = a.masked_fill(starts[..., None], 0)
    h = b.new_zeros(b.shape[0], b.shape[2], dtype=dtype) if state is None else state.to(dtype)
    outputs = []
    for a_t, b_t in zip(a.unbind(1), b.to(dtype).unbind(1), strict=True):
        h = a_t * h + b_t
        outputs.append(h)
    return torch.stack(outputs, 1).to(b.dtype), h


def example(
    batch: int = 2,
    time: int = 37,
    channels: int = 6,
    dtype: torch.dtype = torch.float64,
    seed: int = 0,
    *,
    decay: Literal["token", "constant"] = "token",
    numbers: Literal["real", "complex"] = "real",
) -> dict[str, Tensor]:
    """Random inputs in legal ranges, as keyword arguments of the operator.

    Half precision has no complex numbers: with ``numbers="complex"`` it stands for complex64.
    """
    random = torch.Generator().manual_seed(seed)
    wide = torch.promote_types(dtype, torch.float32)

    def draw(*shape: int) -> Tensor:
        x = torch.randn(shape, generator=random, dtype=torch.float64)
        return x if numbers == "real" else torch.complex(x, torch.randn(shape, generator=random, dtype=torch.float64))

    shape = (batch, time, channels) if decay == "token" else (channels,)
    # Half-lives from a token to a few hundred, turned by any angle where numbers are complex.
    size = torch.exp(-torch.exp(3 * torch.randn(shape, generator=random, dtype=torch.float64) - 2))
    turn = draw(*shape)
    a = size if numbers == "real" else size * turn / turn.abs()
    inputs = {"b": draw(batch, time, channels), "a": a, "state": draw(batch, channels)}
    if numbers == "complex":
        dtype = wide = wide.to_complex()
    return {name: x.to(dtype if name == "b" else wide) for name, x in inputs.items()}
