"""Sizes and numbers of heads."""

from __future__ import annotations


def head_size(name: str, size: int | None, *, dim: int, num_heads: int, share: float = 1.0) -> int:
    """Channels of a head: ``size``, or ``share * dim / num_heads`` rounded down where that is None.

    Args:
        name: the setting that ``size`` is of.
        size: channels, at least 1.
        dim: width of the layer.
        num_heads: heads, at least 1.
        share: the width of all heads, as a share of ``dim``, where ``size`` is None.

    Raises:
        ValueError: there is no head, or a head has no channel.
    """
    if num_heads < 1:
        raise ValueError(f"num_heads={num_heads}: a layer needs at least 1 head")
    size = int(share * dim / num_heads) if size is None else size
    if size < 1:
        raise ValueError(f"{name}={size}: a head has at least 1 channel (dim={dim} with num_heads={num_heads})")
    return size


def grouped_heads(dim: int, *, expand: int, head_dim: int, num_groups: int) -> int:
    """How many heads of ``head_dim`` channels fill the inner width of a Mamba, in ``num_groups`` equal groups.

    Raises:
        ValueError: there is no whole number of heads, or of heads in a group.
    """
    if expand < 1:
        raise ValueError(f"expand={expand}: use 1 or more")
    inner = expand * dim
    if head_dim < 1 or inner % head_dim:
        raise ValueError(f"head_dim={head_dim} does not divide the inner width expand * dim = {inner}")
    num_heads = inner // head_dim
    if num_groups < 1 or num_heads % num_groups:
        raise ValueError(f"num_groups={num_groups} does not divide the {num_heads} heads of {head_dim} channels")
    return num_heads
