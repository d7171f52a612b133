"""RWKV's token shift: several glances from each token at the one before, channel by channel.

    glance_z,t = x_t + (x_{t-1} - x_t) * (mix_z + more_z,t),    x before a document's start is 0

(Peng et al. 2024, https://arxiv.org/abs/2404.05892: mixes that are learned, and in RWKV-6 driven by the input.)

Its outputs are several, one for each projection that reads them, so that no gradient is put together before it is read;
and nothing is mixed but two neighbours: so it has no place in ``OPERATORS``.
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from seqzoo.kernels.backends import check_kind, check_numbers, check_shape, dispatch_elementwise
from seqzoo.kernels.token_shift import native, reference

IMPLEMENTATIONS = {"reference": reference.token_shift, "native": native.token_shift}


def token_shift(
    x: Float[Tensor, "batch time dim"],
    mix: Float[Tensor, "glance dim"],
    last: Float[Tensor, "batch dim"] | None = None,
    starts: Bool[Tensor, "batch time"] | None = None,
    *,
    more: Float[Tensor, "glance batch time dim"] | None = None,
    dtype: torch.dtype | None = None,
    backend: str = "auto",
) -> tuple[Float[Tensor, "batch time dim"], ...]:
    """Glance at the token before, once for each row of ``mix``.

    Args:
        x: tokens.
        mix: how far each glance goes back, from 0 for the token itself to 1 for the one before; may lie outside.
        last: the token before the first; None at the start of a sequence.
        starts: True where a new document begins.
        more: added to ``mix``, by token.
        dtype: of the glances; None for that of ``x``.
        backend: a layer's setting: ``native`` is the native kernel, ``auto`` the same where it can run, and all others
            are plain PyTorch.

    Returns:
        The glances.

    Raises:
        ValueError: shapes or dtypes do not fit together, or ``backend`` cannot serve.
    """
    check_numbers("token_shift", starts, {"last": last, "more": more}, x=x, mix=mix)
    if x.ndim != 3 or mix.ndim != 2 or mix.shape[1] != x.shape[2] or not len(mix):
        raise ValueError(
            f"token_shift: x {tuple(x.shape)}, mix {tuple(mix.shape)} do not fit together; expected "
            "[batch, time, dim] and [glance, dim] with a glance at least"
        )
    check_shape("token_shift", "last", last, (x.shape[0], x.shape[2]))
    check_shape("token_shift", "starts", starts, tuple(x.shape[:2]))
    check_shape("token_shift", "more", more, (len(mix), *x.shape))
    check_kind("token_shift", "x", x)
    inputs = x, mix, last, starts, more, dtype or x.dtype
    return dispatch_elementwise("token_shift", IMPLEMENTATIONS, backend, x, *inputs)
