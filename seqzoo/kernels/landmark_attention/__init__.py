"""Attention that reaches past blocks of tokens through their landmarks.

    s_ij = scale q_i . k_j,   l_ib = scale q_i . landmark_b,   b(j) the block of slot j
    g_i  = softmax over the slots j <= i of i's own block, by s_ij, and all earlier blocks b of the document, by l_ib
    o_i  = sum_{j in i's block} g_ij v_j + sum_{b earlier} g_ib sum_{j in b} softmax_{j in b}(s_ij) v_j

Blocks count from the document's start. With ``top_k`` only the earlier blocks with the largest l_ib are there. No state
is carried: the layer keeps keys and values, and so it has no place in ``OPERATORS``.
"""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor

from seqzoo.kernels.backends import FLOATS, choose, explained
from seqzoo.kernels.landmark_attention import chunked, reference

IMPLEMENTATIONS = {"reference": reference.landmark_attention, "chunked": chunked.landmark_attention}


def explain(time: int, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32) -> str:
    """Which implementation ``backend="auto"`` takes for ``time`` tokens, and why not the others: always ``chunked``."""
    said = explained("landmark_attention", IMPLEMENTATIONS)(2, device, dtype)
    return said.replace("2 token(s)", f"{time} token(s)", 1)


def landmark_attention(
    q: Float[Tensor, "batch time head key"],
    k: Float[Tensor, "batch slot group key"],
    v: Float[Tensor, "batch slot group value"],
    landmarks: Float[Tensor, "batch slot group key"],
    place: Int[Tensor, "batch slot"],
    *,
    block: int,
    top_k: int | None = None,
    scale: float | None = None,
    backend: str = "auto",
) -> Float[Tensor, "batch time head value"]:
    """Look up, for each token, values of its own block, and of earlier blocks by way of their landmarks.

    Args:
        q: queries of the last ``time`` slots.
        k: keys, each shared by ``head / group`` consecutive query heads; ``slot >= time``.
        v: values, of the dtype of ``q`` and ``k``.
        landmarks: the key of each block, in the slot of its last token; other slots are not read.
        place: how many tokens of its document stand before each slot; grows by 1 or falls to 0.
        block: tokens of a block.
        top_k: earlier blocks that each query and head looks into, those that tie for the last place included; None for
            all.
        scale: of the logits; None for ``key ** -0.5``.
        backend: ``auto`` or a name in ``IMPLEMENTATIONS``.

    Returns:
        o in the dtype of ``v``.

    Raises:
        ValueError: shapes, dtypes or settings do not fit together, or ``backend`` cannot serve.
    """
    ranks = q.ndim == k.ndim == v.ndim == 4
    if not ranks or k.shape[:3] != v.shape[:3] or q.shape[0] != k.shape[0] or q.shape[3] != k.shape[3]:
        raise ValueError(
            f"landmark_attention: q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)} do not fit together; "
            "expected [batch, time, head, key], [batch, slot, group, key] and [batch, slot, group, value]"
        )
    if not 1 <= q.shape[1] <= k.shape[1] or k.shape[2] < 1 or q.shape[2] % k.shape[2]:
        raise ValueError(
            f"landmark_attention: q {tuple(q.shape)}, k {tuple(k.shape)}: expected a time of 1 or more, at least as "
            "many slots, and heads that are a multiple of groups"
        )
    for name, tensor, expected in (("landmarks", landmarks, k.shape), ("place", place, k.shape[:2])):
        if tensor.shape != expected:
            raise ValueError(f"landmark_attention: {name} has shape {tuple(tensor.shape)}; expected {tuple(expected)}")
    for name, tensor in {"q": q, "k": k, "v": v, "landmarks": landmarks}.items():
        if tensor.dtype not in FLOATS or tensor.dtype != v.dtype or tensor.device != v.device:
            raise ValueError(
                f"landmark_attention: {name} is {tensor.dtype} on {tensor.device}; expected what v is, {v.dtype} on "
                f"{v.device}, which must be floats"
            )
    if place.dtype != torch.int64 or place.device != q.device:
        raise ValueError(
            f"landmark_attention: place is {place.dtype} on {place.device}; expected torch.int64 on {q.device}"
        )
    if block < 1 or (top_k is not None and top_k < 1):
        raise ValueError(f"landmark_attention: block={block}, top_k={top_k}; expected 1 or more, top_k may be None")
    run = IMPLEMENTATIONS[choose("landmark_attention", IMPLEMENTATIONS, backend, q, time=2)]  # never the reference
    with torch.autocast(q.device.type, enabled=False):
        return run(q, k, v, landmarks, place, block, top_k, q.shape[3] ** -0.5 if scale is None else scale)
