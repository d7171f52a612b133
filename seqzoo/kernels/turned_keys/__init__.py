"""Mamba-3's queries, keys and values, as gated linear attention takes them: turned, and those that write a token late.

    phi_t = phi_{t-1} + step_t turn_t  (mod 2 pi),    B_t = write_t + write_bias,    C_t = read_t + read_bias
    q_t = rotate(C_t, phi_t),    b_t = rotate(B_t, phi_t),    own_t = B_t . C_t
    k_t = gain_t b_{t-1},    v_t = u_{t-1}

(Lahoti et al. 2026, https://arxiv.org/abs/2603.15569.) ``rotate`` turns each of the first channel pairs (2i, 2i + 1) by
its angle. At a document's start phi, b and u before it are 0. Angles are summed in float64, and come back in [0, 2 pi).

Nothing but a sum of angles goes from token to token, and its outputs are several: so it has no place in ``OPERATORS``.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from seqzoo.kernels.backends import check_kind, check_numbers, check_shape, dispatch_elementwise, share_evenly
from seqzoo.kernels.turned_keys import native, reference

IMPLEMENTATIONS = {"reference": reference.turned_keys, "native": native.turned_keys}


class Turned(NamedTuple):
    """Queries, keys and values; what a token's own key and query give; the last phi and b, in float32 or better."""

    q: Float[Tensor, "batch time head key"]
    k: Float[Tensor, "batch time head key"]
    v: Float[Tensor, "batch time head value"]
    own: Float[Tensor, "batch time head"]
    last_angle: Float[Tensor, "batch head pair"]
    last_key: Float[Tensor, "batch head key"]


def turned_keys(
    write: Float[Tensor, "batch time group key"],
    read: Float[Tensor, "batch time group key"],
    write_bias: Float[Tensor, "head key"],
    read_bias: Float[Tensor, "head key"],
    turn: Float[Tensor, "batch time pair"],
    step: Float[Tensor, "batch time head"],
    gain: Float[Tensor, "batch time head"],
    values: Float[Tensor, "batch time head value"],
    angle: Float[Tensor, "batch head pair"] | None = None,
    key: Float[Tensor, "batch head key"] | None = None,
    value: Float[Tensor, "batch head value"] | None = None,
    starts: Bool[Tensor, "batch time"] | None = None,
    *,
    backend: str = "auto",
) -> Turned:
    """Turn queries and keys, and let keys and values of a token write at the next.

    Args:
        write: what keys are made of, shared by the consecutive heads of a group.
        read: what queries are made of, likewise.
        write_bias: added for each head.
        read_bias: added for each head.
        turn: radians a unit of ``step``, for all heads.
        step: how long a token lasts.
        gain: multiplies the key that writes at this token, that of the token before.
        values: u.
        angle: phi of the token before the first; None is 0.
        key: b of that token; None is 0.
        value: u of that token; None is 0.
        starts: True where a new document begins.
        backend: a layer's setting: ``native`` is the native kernel, ``auto`` the same where it can run, and all others
            are plain PyTorch with the angles summed by ``linear_scan``.

    Returns:
        Queries, keys and values in the dtype of ``values``, all else in float32 or better.

    Raises:
        ValueError: shapes or dtypes do not fit together, or ``backend`` cannot serve.
    """
    learned: dict[str, Any] = {"write_bias": write_bias, "read_bias": read_bias}
    given: dict[str, Any] = {"turn": turn, "step": step, "gain": gain}
    kept = {"angle": angle, "key": key, "value": value}
    check_numbers("turned_keys", starts, kept, write=write, read=read, values=values, **learned, **given)
    batch, time, heads, channels = values.shape if values.ndim == 4 else (0, 0, 0, 0)
    if values.ndim != 4 or write.ndim != 4 or write.shape != read.shape or not share_evenly(write.shape[2], heads):
        raise ValueError(
            f"turned_keys: write {tuple(write.shape)}, read {tuple(read.shape)}, values {tuple(values.shape)} do not "
            "fit together; expected [batch, time, group, key] twice and [batch, time, head, value] with head a "
            "multiple of group"
        )
    size, pairs = write.shape[3], turn.shape[-1]
    if not 2 <= 2 * pairs <= size:
        raise ValueError(f"turned_keys: turn has {pairs} pairs; expected 1 or more, at most all of the {size} channels")
    expected = {
        "write": (batch, time, write.shape[2], size),
        "write_bias": (heads, size),
        "read_bias": (heads, size),
        "turn": (batch, time, pairs),
        "step": (batch, time, heads),
        "gain": (batch, time, heads),
        "angle": (batch, heads, pairs),
        "key": (batch, heads, size),
        "value": (batch, heads, channels),
        "starts": (batch, time),
    }
    for name, tensor in ({"write": write} | learned | given | kept | {"starts": starts}).items():
        check_shape("turned_keys", name, tensor, expected[name])
    check_kind("turned_keys", "values", values, write=write, read=read)
    wide = torch.promote_types(values.dtype, torch.float32)
    write_bias, read_bias, turn, step, gain = (z.to(wide) for z in (write_bias, read_bias, turn, step, gain))
    inputs = write, read, write_bias, read_bias, turn, step, gain, values, angle, key, value, starts
    return Turned(*dispatch_elementwise("turned_keys", IMPLEMENTATIONS, backend, values, *inputs))
