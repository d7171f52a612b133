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

from seqzoo.kernels.backends import (
    check_attention,
    check_index,
    check_kind,
    check_shape,
    check_tensor,
    choose,
    explained,
)
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
    check_attention("landmark_attention", q, k, v)
    check_tensor("landmark_attention", "landmarks", landmarks)
    check_tensor("landmark_attention", "place", place)
    check_shape("landmark_attention", "landmarks", landmarks, tuple(k.shape))
    check_shape("landmark_attention", "place", place, tuple(k.shape[:2]))
    check_kind("landmark_attention", "q", q, landmarks=landmarks)
    check_index("landmark_attention", "place", place, q)
    if block < 1 or (top_k is not None and top_k < 1):
        raise ValueError(f"landmark_attention: block={block}, top_k={top_k}; expected 1 or more, top_k may be None")
    run = IMPLEMENTATIONS[choose("landmark_attention", IMPLEMENTATIONS, backend, q, time=2)]  # never the reference
    with torch.autocast(q.device.type, enabled=False):
        return run(q, k, v, landmarks, place, block, top_k, q.shape[3] ** -0.5 if scale is None else scale)
