"""Learning-rate schedules, as factors of the peak rate."""

from __future__ import annotations

import math


def warmup_cosine(step: int, *, warmup_steps: int, total_steps: int, final_ratio: float) -> float:
    """Linear from 0 over ``warmup_steps``, half a cosine down to ``final_ratio`` at ``total_steps``, constant after.

    Args:
        step: optimizer steps done so far.
        warmup_steps: the first step after them runs at the full rate.
        total_steps: where the cosine ends.
        final_ratio: last rate over peak rate.
    """
    if step < warmup_steps:
        return (step + 1) / (warmup_steps + 1)
    progress = min(1.0, (step - warmup_steps) / max(1, total_steps - warmup_steps))
    return final_ratio + (1 - final_ratio) * (1 + math.cos(math.pi * progress)) / 2
