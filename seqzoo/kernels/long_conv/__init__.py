"""The long causal convolution: a filter for each channel, as long as the sequences it is learned on.

    y_t = sum_{j < size} kernel_j x_{t-j},  over the tokens of one document only

Hyena (Poli et al. 2023, https://arxiv.org/abs/2302.10866), LongConv (Fu et al. 2023, https://arxiv.org/abs/2302.06646)
and SGConv (Li et al. 2022, https://arxiv.org/abs/2210.09298) differ in where the kernel comes from. The state is the
last ``size - 1`` inputs, exact and of constant size: what such a convolution remembers cannot be had for less.
"""

from __future__ import annotations

from jaxtyping import Bool, Float
from torch import Tensor

from seqzoo.kernels.backends import check_kind, check_numbers, check_shape, dispatch, explained
from seqzoo.kernels.long_conv import chunked, reference

IMPLEMENTATIONS = {"reference": reference.long_conv, "chunked": chunked.long_conv}
explain = explained("long_conv", IMPLEMENTATIONS)


def long_conv(
    x: Float[Tensor, "batch time channel"],
    kernel: Float[Tensor, "channel size"],
    state: Float[Tensor, "batch size_minus_one channel"] | None = None,
    starts: Bool[Tensor, "batch time"] | None = None,
    *,
    backend: str = "auto",
) -> tuple[Float[Tensor, "batch time channel"], Float[Tensor, "batch size_minus_one channel"]]:
    """Convolve along ``time``: by fast Fourier transforms, ``time log time`` operations; one token takes ``size``.

    Args:
        x: inputs.
        kernel: the filters, the current token's tap first (``short_conv`` has it last, as ``nn.Conv1d`` does).
        state: the inputs before, zeros where another document stood; None is zeros.
        starts: True where a new document begins.
        backend: ``auto`` or a name in ``IMPLEMENTATIONS``.

    Returns:
        The outputs in the dtype of ``x``, and the new state.

    Raises:
        ValueError: shapes do not fit together, or ``backend`` cannot serve.
    """
    check_numbers("long_conv", starts, {"state": state}, x=x, kernel=kernel)
    if x.ndim != 3 or kernel.ndim != 2 or kernel.shape[0] != x.shape[2] or kernel.shape[1] < 1:
        raise ValueError(
            f"long_conv: x {tuple(x.shape)}, kernel {tuple(kernel.shape)} do not fit together; expected "
            "[batch, time, channel] and [channel, size] with size at least 1"
        )
    check_shape("long_conv", "state", state, (len(x), kernel.shape[1] - 1, x.shape[2]))
    check_shape("long_conv", "starts", starts, tuple(x.shape[:2]))
    check_kind("long_conv", "x", x)
    return dispatch("long_conv", IMPLEMENTATIONS, backend, x, x, kernel, state, starts)
