"""Which parameters decay: matrices do; norms, biases, decay rates and other vectors do not."""

from __future__ import annotations

from typing import Any

from torch import nn

from seqzoo.mixer import named_mixers


def parameter_groups(module: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Two optimizer groups over all parameters of ``module`` that train, each parameter once.

    Vectors and scalars never decay (norm scales, biases, A_log, dt_bias, D); a mixer names further parameters in
    ``no_weight_decay``.
    """
    exempt = {
        id(parameter)
        for _, mixer in named_mixers(module)
        for name, parameter in mixer.named_parameters()
        if name in mixer.no_weight_decay
    }
    decay, keep = [], []
    for parameter in module.parameters():
        if parameter.requires_grad:
            (keep if parameter.ndim < 2 or id(parameter) in exempt else decay).append(parameter)
    return [{"params": decay, "weight_decay": weight_decay}, {"params": keep, "weight_decay": 0.0}]
