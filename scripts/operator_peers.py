"""Other people's PyTorch code behind the signatures of our operators: what `bench.py` times them against.

Each peer takes the operator's own inputs, moves them into its layout, and returns the outputs in ours, so that a
comparison pays for what a user would pay, and answers can be compared before times are.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

GPU_PACKAGES = ("mamba_ssm", "causal_conv1d", "fla")


def transformers_file(family: str) -> Any:
    """transformers' file for ``family``, GPU packages hidden: its functions stand aside for those that import."""
    present = {name: sys.modules.get(name) for name in GPU_PACKAGES}
    sys.modules.update(dict.fromkeys(GPU_PACKAGES))
    try:
        return importlib.import_module(f"transformers.models.{family}.modeling_{family}")
    finally:
        for name, module in present.items():
            if module is None:
                del sys.modules[name]
            else:
                sys.modules[name] = module


def _plain(function: Callable[..., Any]) -> Callable[..., Any]:
    return getattr(function, "__wrapped__", function)


def _heads_first(*tensors: Tensor) -> list[Tensor]:
    return [x.transpose(1, 2) for x in tensors]


def transformers_gated_delta_rule(q, k, v, log_decay, beta):
    run = _plain(transformers_file("qwen3_next").torch_chunk_gated_delta_rule)
    return run(query=q * q.shape[-1] ** 0.5, key=k, value=v, g=log_decay, beta=beta)[0]


def fla_gated_delta_rule(q, k, v, log_decay, beta):
    from fla.ops.gated_delta_rule.naive import naive_chunk_gated_delta_rule

    return naive_chunk_gated_delta_rule(q, k, v, g=log_decay, beta=beta, scale=1.0)[0]


def fla_delta_rule(q, k, v, log_decay, beta):
    assert log_decay is None
    from fla.ops.delta_rule.naive import delta_rule_chunkwise

    q, k, v, beta = _heads_first(q * q.shape[-1] ** 0.5, k, v, beta)
    return delta_rule_chunkwise(q, k, v, beta)[0].transpose(1, 2)


def fla_kda(q, k, v, log_decay, beta):
    from fla.ops.kda.naive import naive_chunk_kda

    return naive_chunk_kda(q, k, v, log_decay, beta, scale=1.0)[0]


def fla_gla(q, k, v, log_decay):
    from fla.ops.gla.naive import naive_recurrent_gla

    return naive_recurrent_gla(q * q.shape[-1] ** 0.5, k, v, log_decay)[0]


def fla_rwkv6(q, k, v, log_decay, bonus):
    from fla.ops.rwkv6.recurrent_naive import naive_recurrent_rwkv6

    q, k, v, log_decay = _heads_first(q, k, v, log_decay)
    return naive_recurrent_rwkv6(q, k, v, log_decay, bonus, scale=1.0)[0].transpose(1, 2)


def fla_simple_gla(q, k, v, log_decay):
    from fla.ops.simple_gla.naive import naive_chunk_simple_gla

    return naive_chunk_simple_gla(q, k, v, log_decay, scale=1.0)[0]


def fla_dplr(q, k, v, a, b, log_decay):
    from fla.ops.generalized_delta_rule.dplr.naive import dplr_chunkwise

    inputs = _heads_first(q * q.shape[-1] ** 0.5, k, v, a, b, log_decay)
    return dplr_chunkwise(*inputs)[0].transpose(1, 2)


def fla_forgetting_attention(q, k, v, log_forget, **settings):
    from fla.ops.forgetting_attn.naive import naive_forgetting_attn

    return naive_forgetting_attn(q, k, v, log_forget)


def fla_ttt_linear(q, k, v, rate, weights, norm_weight, norm_bias, reach, chunk, **settings):
    """The whole of its head, but with the read itself where TTT adds the query: the same work, not the same answer."""
    from fla.ops.ttt.naive import chunk_ttt_linear_ref

    (weight,) = weights
    start, bias = weight[None, :, :-1], weight[None, :, -1:]
    # It scales the queries in place.
    inputs = q.clone(), k, v, norm_weight, norm_bias, rate[..., None] * reach[-1]
    return chunk_ttt_linear_ref(*inputs, mini_batch_size=chunk, initial_state=start, initial_state_bias=bias)[0]


def transformers_mamba2(q, k, v, log_decay):
    """With A = -1 and dt = -log_decay; x is v / dt, since dt x is what it writes."""
    run = _plain(transformers_file("mamba2").mamba2_chunk_scan)
    return run(v / -log_decay[..., None], -log_decay, -torch.ones(v.shape[2]), k, q, chunk_size=64)


def mambapy_selective_scan(x, dt, A, B, C, D, gate, dt_bias):
    from mambapy.pscan import pscan

    step = F.softplus(dt + dt_bias)
    h = pscan((step[..., None] * A).exp(), step[..., None] * B[:, :, None] * x[..., None])
    return ((h @ C.to(h.dtype)[..., None])[..., 0] + D * x) * F.silu(gate)


def mingru_scan(a, b):
    """Passes through logarithms, so that all of ``b`` must be above 0."""
    from minGRU_pytorch.minGRU import heinsen_associative_scan_log

    return heinsen_associative_scan_log(a.log(), b.log())


def transformers_rglru(a, b):
    layer = transformers_file("recurrent_gemma").RecurrentGemmaRglru
    reset = torch.zeros(*b.shape[:2], 1, dtype=torch.bool)
    wide = torch.promote_types(b.dtype, torch.float32)  # its default was bound when the file was imported
    return layer._rnn_scan(None, b, a, reset, None, acc_dtype=wide)[0]


def xlstm_mlstm(q, k, v, input_gate, log_forget):
    """Its own sigmoid is undone. Its custom backward is no peer: that leaves out the gradient of the denominator."""
    from mlstm_kernels.torch.chunkwise.native import mlstm_chunkwise__native_autograd

    forget = log_forget - torch.log(-torch.expm1(log_forget))
    inputs = _heads_first(q * q.shape[-1] ** 0.5, k, v, input_gate, forget)
    return mlstm_chunkwise__native_autograd(*inputs).transpose(1, 2)


def torch_conv1d(x, weight, activation):
    size = weight.shape[1]
    y = F.conv1d(F.pad(x.mT, (size - 1, 0)), weight[:, None], groups=len(weight)).mT
    return F.silu(y) if activation == "silu" else y
