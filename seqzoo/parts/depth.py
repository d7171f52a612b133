"""Where a layer stands in its stack."""

from __future__ import annotations


def check_depth(layer_index: int, num_layers: int) -> None:
    """Raise ValueError unless ``layer_index`` is from 0 to ``num_layers - 1``."""
    if not 0 <= layer_index < num_layers:
        raise ValueError(f"layer_index={layer_index}: expected 0 or more, and less than num_layers={num_layers}")


def depth_ratios(layer_index: int, num_layers: int) -> tuple[float, float]:
    """How deep a layer stands: from 0 to 1, and from 1 down to almost 0.

    Raises:
        ValueError: ``layer_index`` is not from 0 to ``num_layers - 1``.
    """
    check_depth(layer_index, num_layers)
    return layer_index / max(num_layers - 1, 1), 1 - layer_index / num_layers
