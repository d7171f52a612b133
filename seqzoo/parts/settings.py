"""What several layers ask of a setting."""

from __future__ import annotations

import math


def check_positive(name: str, value: float) -> None:
    """Raise ValueError unless ``value`` of the setting ``name`` is a finite number above 0."""
    if not 0 < value < math.inf:
        raise ValueError(f"{name}={value}: use a finite number above 0")
