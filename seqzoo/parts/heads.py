"""Sizes of heads."""

from __future__ import annotations


def head_sizes(
    dim: int, *, num_heads: int, key_dim: int | None, value_dim: int | None, key_share: float, value_share: float
) -> tuple[int, int]:
    """The sizes of a head's keys and values.

    Args:
        dim: width of the layer.
        num_heads: heads, at least 1.
        key_dim: size of a key; None for ``key_share * dim / num_heads`` rounded down.
        value_dim: size of a value; None for ``value_share * dim / num_heads`` rounded down.
        key_share: the width of all keys, as a share of ``dim``, where ``key_dim`` is None.
        value_share: the same of values.

    Raises:
        ValueError: a size is below 1.
    """
    if num_heads < 1:
        raise ValueError(f"num_heads={num_heads}: a layer needs at least 1 head")
    key_dim = int(key_share * dim / num_heads) if key_dim is None else key_dim
    value_dim = int(value_share * dim / num_heads) if value_dim is None else value_dim
    if key_dim < 1 or value_dim < 1:
        raise ValueError(
            f"key_dim={key_dim}, value_dim={value_dim}: both are at least 1 (dim={dim} with num_heads={num_heads}; "
            f"their defaults are {key_share:g} and {value_share:g} dim/num_heads)"
        )
    return key_dim, value_dim
