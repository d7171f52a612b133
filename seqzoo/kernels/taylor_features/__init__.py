"""Features of the second order: their products are the exponential's series of a product of keys and queries.

    taylor(q) . taylor(k) = 1 + s + s^2 / 2,    s = q . k / sqrt(dim)

Based's feature map (Arora et al. 2024, https://arxiv.org/abs/2402.18668). The square of a sum has every product of two
different numbers twice: it is kept once, times the root of two.

No token sees another: so there is no state, and no place for it in ``OPERATORS``.
"""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor

from seqzoo.kernels.backends import check_numbers, dispatch_elementwise
from seqzoo.kernels.taylor_features import native, reference

IMPLEMENTATIONS = {"reference": reference.taylor_features, "native": native.taylor_features}


def taylor_size(dim: int) -> int:
    """Features that are made of ``dim`` numbers."""
    return 1 + dim + dim * (dim + 1) // 2


def taylor_features(x: Float[Tensor, "... dim"], *, backend: str = "auto") -> Float[Tensor, "... feature"]:
    """The features of each key or query: 1, ``z = x / dim^(1/4)``, ``z_i^2 / sqrt(2)``, and ``z_i z_j`` for ``i < j``.

    Args:
        x: keys or queries.
        backend: a layer's setting: ``native`` is the native kernel, ``auto`` the same where it can run, and all others
            are plain PyTorch.

    Raises:
        ValueError: ``x`` has no numbers to make features of, or ``backend`` cannot serve.
    """
    check_numbers("taylor_features", None, x=x)
    if x.ndim < 1 or not x.shape[-1]:
        raise ValueError(f"taylor_features: x has shape {tuple(x.shape)}; expected [..., dim] with dim of 1 or more")
    return dispatch_elementwise("taylor_features", IMPLEMENTATIONS, backend, x, x)
