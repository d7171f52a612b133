"""Operators: one folder each, one signature each, several implementations.

``OPERATORS`` lists the implementations of every operator that carries a state by name, ``EVERY_OPERATOR`` also those
whose layers keep it; ``explain`` in each folder says which one ``auto`` takes. ``checked_ranges`` is a context in which
they also refuse values outside their legal range.
"""

from seqzoo.kernels import attention as _attention
from seqzoo.kernels import diagonal_state_space as _diagonal_state_space
from seqzoo.kernels import dplr_delta_rule as _dplr_delta_rule
from seqzoo.kernels import fast_weights as _fast_weights
from seqzoo.kernels import gated_delta_product as _gated_delta_product
from seqzoo.kernels import gated_delta_rule as _gated_delta_rule
from seqzoo.kernels import gated_linear_attention as _gated_linear_attention
from seqzoo.kernels import gated_norm as _gated_norm
from seqzoo.kernels import landmark_attention as _landmark_attention
from seqzoo.kernels import linear_scan as _linear_scan
from seqzoo.kernels import long_conv as _long_conv
from seqzoo.kernels import mlstm as _mlstm
from seqzoo.kernels import selective_scan as _selective_scan
from seqzoo.kernels import short_conv as _short_conv
from seqzoo.kernels.backends import checked_ranges

__all__ = ["EVERY_OPERATOR", "OPERATORS", "TOKENWISE", "checked_ranges"]

OPERATORS = {
    "short_conv": _short_conv.IMPLEMENTATIONS,
    "linear_scan": _linear_scan.IMPLEMENTATIONS,
    "selective_scan": _selective_scan.IMPLEMENTATIONS,
    "gated_linear_attention": _gated_linear_attention.IMPLEMENTATIONS,
    "mlstm": _mlstm.IMPLEMENTATIONS,
    "gated_delta_rule": _gated_delta_rule.IMPLEMENTATIONS,
    "gated_delta_product": _gated_delta_product.IMPLEMENTATIONS,
    "long_conv": _long_conv.IMPLEMENTATIONS,
    "diagonal_state_space": _diagonal_state_space.IMPLEMENTATIONS,
    "dplr_delta_rule": _dplr_delta_rule.IMPLEMENTATIONS,
    "fast_weights": _fast_weights.IMPLEMENTATIONS,
}
EVERY_OPERATOR = OPERATORS | {
    "attention": _attention.IMPLEMENTATIONS,
    "landmark_attention": _landmark_attention.IMPLEMENTATIONS,
}

# What sees no other token, and so has neither state nor starts.
TOKENWISE = {"gated_norm": _gated_norm.IMPLEMENTATIONS}
