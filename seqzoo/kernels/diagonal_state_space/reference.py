"""The equation, one token at a time, with the state in complex64 or better."""

from __future__ import annotations

import torch
from torch import Tensor

from seqzoo.kernels.backends import accumulation_dtype

VARIANTS = {"complex": {}}


def diagonal_state_space(x, exponent, write, read, state, starts):
    dtype = torch.promote_types(accumulation_dtype(x), torch.complex64)
    kept, write, read = exponent.to(dtype).exp(), write.to(dtype), read.to(dtype)
    h = kept.new_zeros(len(x), *kept.shape) if state is None else state.to(dtype)
    outputs = []
    for t, x_t in enumerate(x.to(dtype).unbind(1)):
        if starts is not None:
            h = h.masked_fill(starts[:, t, None, None], 0)
        h = kept * h + write * x_t[..., None]
        outputs.append((read * h).sum(-1).real)
    return torch.stack(outputs, 1).to(x.dtype), h


def example(
    batch: int = 2,
    time: int = 37,
    channels: int = 6,
    size: int = 8,
    dtype: torch.dtype = torch.float64,
    seed: int = 0,
) -> dict[str, Tensor]:
    """Random inputs in legal ranges, as keyword arguments of the operator: steps of 0.001 to 0.1, rates as S4D's.

    Half precision has no complex numbers: it stands for float32.
    """
    random = torch.Generator().manual_seed(seed)
    wide = torch.promote_types(dtype, torch.float32)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=random, dtype=torch.float64)

    def draw_complex(*shape: int) -> Tensor:
        return torch.complex(draw(*shape), draw(*shape))

    step = 10 ** (2 * torch.rand(channels, 1, generator=random, dtype=torch.float64) - 3)
    rate = torch.complex(-draw(channels, size).exp() / 2, torch.pi * torch.arange(size).double().expand(channels, -1))
    inputs = {
        "x": draw(batch, time, channels),
        "exponent": rate * step,
        "write": draw_complex(channels, size),
        "read": draw_complex(channels, size) * size**-0.5,
        "state": draw_complex(batch, channels, size),
    }
    return {name: x.to(wide if name == "x" else wide.to_complex()) for name, x in inputs.items()}
