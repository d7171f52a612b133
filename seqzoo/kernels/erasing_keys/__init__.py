"""RWKV-7's decays and keys: where memory is erased, how much is written back there, and what is written.

    log_decay = -e^{-1/2} sigmoid(decay + decay_bias),    a = sigmoid(rate + rate_bias)
    h = unit(k * key_scale),    written = k * (1 + (a - 1) * key_rate),    own = r . (bonus * written)

(Peng et al. 2025, https://arxiv.org/abs/2503.14456.) The memory is read at -h, and a * h is written back for it; h, of
length one, and own are those of each head.

No token sees another: so there is no state, and no place for it in ``OPERATORS``.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from seqzoo.kernels.backends import check_numbers, check_shape, dispatch_elementwise
from seqzoo.kernels.erasing_keys import native, reference

IMPLEMENTATIONS = {"reference": reference.erasing_keys, "native": native.erasing_keys}


class ErasingKeys(NamedTuple):
    """``written``, ``-h`` and ``a * h`` in the dtype of ``k``; log decays and ``own`` in float32 or better."""

    log_decay: Float[Tensor, "... head key"]
    written: Float[Tensor, "... head key"]
    erased: Float[Tensor, "... head key"]
    restored: Float[Tensor, "... head key"]
    own: Float[Tensor, "... head"]


def erasing_keys(
    r: Float[Tensor, "... dim"],
    k: Float[Tensor, "... dim"],
    decay: Float[Tensor, "... dim"],
    rate: Float[Tensor, "... dim"],
    decay_bias: Float[Tensor, " dim"],
    rate_bias: Float[Tensor, " dim"],
    key_scale: Float[Tensor, " dim"],
    key_rate: Float[Tensor, " dim"],
    bonus: Float[Tensor, "head key"],
    *,
    backend: str = "auto",
) -> ErasingKeys:
    """Make what the memory is erased at and written with.

    Args:
        r: queries.
        k: keys.
        decay: what decays are made from.
        rate: what the rates a are made from.
        decay_bias: added to ``decay``.
        rate_bias: added to ``rate``.
        key_scale: multiplies the keys at which memory is erased, before they are of length one.
        key_rate: how much of a the written keys take over.
        bonus: weights of a token's own key and query.
        backend: a layer's setting: ``native`` is the native kernel, ``auto`` the same where it can run, and all others
            are plain PyTorch.

    Raises:
        ValueError: shapes or dtypes do not fit together, or ``backend`` cannot serve.
    """
    per_token: dict[str, Any] = {"r": r, "decay": decay, "rate": rate}
    learned: dict[str, Any] = {
        "decay_bias": decay_bias,
        "rate_bias": rate_bias,
        "key_scale": key_scale,
        "key_rate": key_rate,
    }
    check_numbers("erasing_keys", None, k=k, **per_token, **learned, bonus=bonus)
    if bonus.ndim != 2 or k.ndim < 1 or k.shape[-1] != bonus.numel():
        raise ValueError(
            f"erasing_keys: k {tuple(k.shape)}, bonus {tuple(bonus.shape)} do not fit together; expected [..., dim] "
            "and [head, key] with dim = head * key"
        )
    for name, tensor in per_token.items():
        check_shape("erasing_keys", name, tensor, tuple(k.shape))
    for name, tensor in learned.items():
        check_shape("erasing_keys", name, tensor, (k.shape[-1],))
    dtype = k.dtype
    for tensor in per_token.values():
        dtype = torch.promote_types(dtype, tensor.dtype)
    wide = torch.promote_types(dtype, torch.float32)
    inputs = [z.to(dtype) for z in (r, k, decay, rate)]
    inputs += [z.to(wide) for z in (*learned.values(), bonus)]
    return ErasingKeys(*dispatch_elementwise("erasing_keys", IMPLEMENTATIONS, backend, inputs[0], *inputs))
