"""Input-dependent decay: a learned rate times a learned, input-driven step, of heads or of the channels of their keys.

dt_t = softplus(x_t + dt_bias), clamped,    g_t = -exp(A_log) dt_t
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

SMALLEST_STEP = 1e-4
STEP_RANGE = (1e-3, 1e-1)


@torch.no_grad()
def draw_step_bias(bias: Tensor, step_range: tuple[float, float] = STEP_RANGE) -> None:
    """Fill ``bias`` so that its softplus is log-uniform in ``step_range``, and never below ``SMALLEST_STEP``."""
    low, high = (math.log(bound) for bound in step_range)
    step = bias.uniform_(low, high).exp_().clamp_(min=SMALLEST_STEP)
    step.add_(torch.log(-torch.expm1(-step)))  # the inverse of softplus


class SoftplusDecay(nn.Module):
    """The two equations above, in float32 or better whatever comes in.

    Args:
        num_heads: heads, each with a rate and a bias of its own.
        rate_range: exp(A_log) starts uniform in this range; both above 0.
        step_range: softplus(dt_bias) starts log-uniform in this range.
        step_limit: dt is clamped to this range, in which it also learns.

    Raises:
        ValueError: ``step_limit`` is no range of numbers at or above 0.
    """

    def __init__(
        self,
        num_heads: int,
        *,
        rate_range: tuple[float, float],
        step_range: tuple[float, float] = STEP_RANGE,
        step_limit: tuple[float, float] = (0.0, math.inf),
    ) -> None:
        super().__init__()
        if not 0 <= step_limit[0] < step_limit[1]:
            raise ValueError(f"step_limit={step_limit}: expected a lower bound of at least 0 and a higher upper one")
        self.rate_range, self.step_range, self.step_limit = rate_range, step_range, step_limit
        self.A_log = nn.Parameter(torch.empty(num_heads))
        self.dt_bias = nn.Parameter(torch.empty(num_heads))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        self.A_log.uniform_(*self.rate_range).log_()
        draw_step_bias(self.dt_bias, self.step_range)

    def forward(
        self, x: Float[Tensor, "batch time head"]
    ) -> tuple[Float[Tensor, "batch time head"], Float[Tensor, "batch time head"]]:
        """The steps dt and the log decays g."""
        wide = torch.promote_types(x.dtype, torch.float32)
        step = F.softplus(x.to(wide) + self.dt_bias.to(wide))
        if self.step_limit != (0.0, math.inf):
            step = step.clamp(*self.step_limit)
        return step, -self.A_log.to(wide).exp() * step


class ChannelDecay(nn.Module):
    """Kimi Delta Attention's decay of each key channel: the rate is the head's, the bias the channel's own.

        f = x + dt_bias,    g = -exp(A_log) softplus(f), or lower_bound * sigmoid(exp(A_log) f)

    In float32 or better whatever comes in. Rates start uniform in 1 to 16, or at 1 where there is a lower bound.

    Args:
        num_heads: heads.
        key_dim: channels of a head's keys.
        lower_bound: g stays between this and 0; below 0, or None for no bound.

    Raises:
        ValueError: ``lower_bound`` is not below 0.
    """

    def __init__(self, num_heads: int, key_dim: int, *, lower_bound: float | None = None) -> None:
        super().__init__()
        if lower_bound is not None and not -math.inf < lower_bound < 0:
            raise ValueError(f"lower_bound={lower_bound}: a log decay is bounded by a finite number below 0, or None")
        self.lower_bound = lower_bound
        self.A_log = nn.Parameter(torch.empty(num_heads))
        self.dt_bias = nn.Parameter(torch.empty(num_heads * key_dim))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        if self.lower_bound is None:
            self.A_log.uniform_(1.0, 16.0).log_()
        else:
            self.A_log.zero_()
        draw_step_bias(self.dt_bias)

    def forward(self, x: Float[Tensor, "batch time channel"]) -> Float[Tensor, "batch time head key"]:
        wide = torch.promote_types(x.dtype, torch.float32)
        f = (x.to(wide) + self.dt_bias.to(wide)).unflatten(-1, (len(self.A_log), -1))
        rate = self.A_log.to(wide).exp()[:, None]
        return -rate * F.softplus(f) if self.lower_bound is None else self.lower_bound * torch.sigmoid(rate * f)
