"""Weights of writes and a skip around an implementation that knows neither."""

from __future__ import annotations


def weighted(run, q, k, v, log_decay, bonus, state, starts, write, skip):
    """``run`` of the other inputs on weighted values, with the skip added to what it returns."""
    o, last = run(q, k, v if write is None else (v * write[..., None]).to(v.dtype), log_decay, bonus, state, starts)
    return o if skip is None else (o + v * skip[:, None]).to(v.dtype), last
