"""Softmax attention over what came before: all of it or a window, with sinks, a prefix, with forgetting.

    l_ij = cap(scale q_i . k_j) + sum_{j < n <= i} log_forget_n,    cap(x) = soft_cap tanh(x / soft_cap)
    o_i  = sum_j exp(l_ij) v_j / (exp(sink) + sum_j exp(l_ij)),    first_i <= j <= i,
           where i - j < window or j - first_i < sinks; and all j < prefix

The last keys are those of the tokens themselves, in order; what stands in front of them was read before. No state is
carried: the layers keep keys and values, and so it has no place in ``OPERATORS``.
"""

from __future__ import annotations

import math

import torch
from jaxtyping import Float, Int
from torch import Tensor

from seqzoo.kernels.attention import chunked, native, reference, sdpa, triton_op
from seqzoo.kernels.backends import (
    check_attention,
    check_index,
    check_log_decay,
    check_numbers,
    check_shape,
    checks_ranges,
    choose,
    explained,
)

IMPLEMENTATIONS = {
    "reference": reference.attention,
    "chunked": chunked.attention,
    "sdpa": sdpa.attention,
    "native": native.attention,
    "triton": triton_op.attention,
}


def explain(time: int, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32) -> str:
    """Which implementation ``backend="auto"`` takes for ``time`` tokens, and why not the others."""
    lines = explained("attention", IMPLEMENTATIONS)(time, device, dtype).splitlines()
    own = "  sdpa where it can serve: no forgetting, cap or logit of a sink, and all is visible or one token looks"
    return "\n".join([lines[0], own, *(line for line in lines[1:] if "sdpa" not in line)])


def attention(
    q: Float[Tensor, "batch time head key"],
    k: Float[Tensor, "batch slot group key"],
    v: Float[Tensor, "batch slot group value"],
    log_forget: Float[Tensor, "batch slot head"] | None = None,
    sink: Float[Tensor, " head"] | None = None,
    first: Int[Tensor, "batch time"] | None = None,
    *,
    window: int | None = None,
    sinks: int = 0,
    prefix: int = 0,
    soft_cap: float | None = None,
    scale: float | None = None,
    prune: float | None = None,
    backend: str = "auto",
) -> Float[Tensor, "batch time head value"]:
    """Look up, for each token, the values whose keys resemble its query.

    Args:
        q: queries of the last ``time`` slots.
        k: keys, each shared by ``head / group`` consecutive query heads; ``slot >= time``.
        v: values, of the dtype of ``q`` and ``k``.
        log_forget: logarithm of what each slot leaves of all before it, at most 0 and finite, float32 or better.
        sink: logit of an empty value that every query sees.
        first: the slot where each token's document begins, at most its own, which never falls from token to token; None
            for ``prefix``.
        window: slots that are visible, the own one included; None for all.
        sinks: first slots of the document that stay visible beyond the window.
        prefix: slots in front of all documents, that every token sees whatever is hidden, and that are not forgotten.
        soft_cap: logits stay between minus and plus this; above 0.
        scale: of the logits; None for ``key ** -0.5``.
        prune: pairs may be passed over as long as those of a token weigh less than this together (adaptive computation
            pruning, https://arxiv.org/abs/2504.06949); needs ``log_forget``. None for none. ``reference`` and ``sdpa``
            look at all.
        backend: ``auto`` or a name in ``IMPLEMENTATIONS``; ``sdpa`` is PyTorch's, for what it can do.

    Returns:
        o in the dtype of ``v``.

    Raises:
        ValueError: shapes, dtypes or settings do not fit together, or ``backend`` cannot serve.
    """
    _check(q, k, v, log_forget, sink, first, prefix)
    if window is not None and window < 1:
        raise ValueError(f"attention: window={window}; a token sees at least itself: use 1 or more, or None for all")
    if sinks < 0 or (sinks and window is None):
        raise ValueError(
            f"attention: sinks={sinks} with window={window}; they are 0 or more, and only a window has any"
        )
    outside = k.shape[1] - q.shape[1]
    if not 0 <= prefix <= outside or (prefix and log_forget is not None):
        raise ValueError(
            f"attention: prefix={prefix} with {outside} slots in front of the tokens', log_forget "
            f"{'None' if log_forget is None else 'given'}; expected 0 to {outside}, and 0 where something is forgotten"
        )
    if soft_cap is not None and not 0 < soft_cap < math.inf:
        raise ValueError(f"attention: soft_cap={soft_cap}; expected a finite number above 0, or None")
    if prune is not None and (not 0 < prune < 1 or log_forget is None):
        raise ValueError(f"attention: prune={prune}; expected a number between 0 and 1, and log_forget beside it")
    scale = float(q.shape[3] ** -0.5 if scale is None else scale)
    if window is not None and window >= k.shape[1]:
        window, sinks = None, 0
    plain = sdpa.serves(q, k, log_forget, sink, first, window, soft_cap)
    if backend == "auto" and plain and sdpa.is_fused(q, v):
        backend = "sdpa"
    if backend == "sdpa" and not plain:
        raise ValueError(
            "backend='sdpa' cannot run attention: PyTorch has no forgetting, no logit of a sink, no cap, and no window "
            "or documents without a mask of all pairs; use auto, "
            + ", ".join(n for n in IMPLEMENTATIONS if n != "sdpa")
        )
    wide = not triton_op.serves(q, v)
    if backend == "triton" and wide:
        raise ValueError(
            f"backend='triton' cannot run attention: keys of {q.shape[3]} and values of {v.shape[3]}; its kernels take "
            f"{triton_op.WIDEST} or fewer; use auto, chunked or reference"
        )
    possible = {name: run for name, run in IMPLEMENTATIONS.items() if name != "triton" or not wide}
    run = IMPLEMENTATIONS[choose("attention", possible, backend, q, q.shape[1])]
    with torch.autocast(q.device.type, enabled=False):
        decay = None if log_forget is None else _running_sum(log_forget)
        cutoff = None if prune is None else _cutoff(q, k, scale, soft_cap, prune)
        return run(q, k, v, decay, sink, first, cutoff, window, sinks, prefix, soft_cap, scale)


def _running_sum(log_forget: Tensor) -> Tensor:
    """``[batch head slot]``, in float64 where there is such a thing: what is used of it are small differences."""
    x = log_forget.transpose(1, 2)
    return x.to(x.dtype if x.device.type == "mps" else torch.float64).cumsum(-1)


@torch.no_grad()
def _cutoff(q: Tensor, k: Tensor, scale: float, soft_cap: float | None, prune: float) -> Tensor:
    """``[batch head]``: pairs whose forgetting is below it weigh less than ``prune`` together.

    A logit is at most U = |scale| max|q| max|k|, and a token's own, which is not forgotten, at least -U: what lies
    below ``-2 U - log(slots) + log(prune)`` adds at most ``prune`` to weights of 1.
    """
    wide = torch.promote_types(q.dtype, torch.float32)
    largest_q, largest_k = (x.to(wide).norm(dim=-1).amax(1) for x in (q, k))
    bound = abs(scale) * largest_q * largest_k.repeat_interleave(q.shape[2] // k.shape[2], 1)
    if soft_cap is not None:
        bound = bound.clamp(max=soft_cap)
    return -2 * bound - torch.log(bound.new_tensor(k.shape[1])) + torch.log(bound.new_tensor(prune))


def _check(q, k, v, log_forget, sink, first, prefix) -> None:
    check_attention("attention", q, k, v)
    (batch, time, heads, _), slots = q.shape, k.shape[1]
    check_numbers("attention", None, {"log_forget": log_forget, "sink": sink}, q=q)
    check_shape("attention", "log_forget", log_forget, (batch, slots, heads))
    check_shape("attention", "sink", sink, (heads,))
    check_shape("attention", "first", first, (batch, time))
    check_index("attention", "first", first, q)
    check_log_decay("attention", log_forget, "log_forget", finite=True)
    if first is not None and checks_ranges():
        late = (first - torch.arange(slots - time, slots, device=q.device)).max().item()
        if late > 0:
            raise ValueError(f"attention: first is up to {late} slots after a token's own; expected that or one before")
        if first.min() < prefix or (first.diff(dim=1) < 0).any():
            raise ValueError(f"attention: first is below {prefix} or falls; expected more, never less than before")
