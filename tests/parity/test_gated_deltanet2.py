"""GatedDeltaNet2 against fla's layer, run with fla's naive rule; NVIDIA's code differs by the output gate's SiLU."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from fla_layers import fla_layers, l2, new_cache, run_fla
from peers import CacheAgreement, assert_rounds_no_worse, draw, error, pair

from seqzoo import clone_state
from seqzoo.kernels.dplr_delta_rule import dplr_delta_rule
from seqzoo.layers import GatedDeltaNet2
from seqzoo.parts.delta_rule import DeltaRuleState


def gdn2(q, k, v, g, b, w, initial_state, use_qk_l2norm_in_kernel, **_):
    from fla.ops.gdn2.naive import naive_recurrent_gdn2

    assert use_qk_l2norm_in_kernel
    o, state = naive_recurrent_gdn2(l2(q), l2(k), v, g, b, w, initial_state=initial_state, output_final_state=True)
    return o.to(v.dtype), state


fla = fla_layers("gdn2", chunk_gdn2=gdn2, fused_recurrent_gdn2=gdn2)

NAMES = {
    "qkv.projection.weight": lambda theirs: torch.cat([theirs[f"{name}_proj.weight"] for name in "qkv"]),
    "qkv.conv.weight": lambda theirs: torch.cat([theirs[f"{name}_conv1d.weight"].squeeze(1) for name in "qkv"]),
    "step.down.weight": "f_proj.0.weight",
    "step.up.weight": "f_proj.1.weight",
    "decay.A_log": "A_log",
    "decay.dt_bias": "dt_bias",
    "erase.weight": "b_proj.weight",
    "write.weight": "w_proj.weight",
    "gate.down.weight": "g_proj.0.weight",
    "gate.up.weight": "g_proj.1.weight",
    "gate.up.bias": "g_proj.1.bias",
    "norm.weight": "o_norm.weight",
    "out.weight": "o_proj.weight",
}
# With less, the norm undoes how strongly a first token is written: its gradient is rounding.
EPS = 1e-2


def state_from(cache, state):
    """Ours keeps one input less: the peer's oldest has no use."""
    conv = torch.cat(cache[0]["conv_state"], 1)
    return clone_state(DeltaRuleState(cache[0]["recurrent_state"], conv[..., 1:].mT))


@pytest.fixture(params=["silu", "sigmoid"])
def both(request):
    flip = request.param == "sigmoid"
    peer = fla.GatedDeltaNet2(
        32, head_dim=8, expand_v=1.5, num_heads=4, norm_eps=EPS, allow_neg_eigval=flip, layer_idx=0
    )
    if request.param == "silu":
        peer.o_norm.gate = F.silu
    # The peer starts at decays of e^-10 a token, which leave no memory to test.
    torch.nn.init.uniform_(peer.A_log, -3, 0)
    ours = GatedDeltaNet2(
        32, num_heads=4, key_dim=8, value_dim=12, norm_eps=EPS, negative_eigenvalues=flip, gate=request.param
    )
    return pair(ours, peer, NAMES, run_fla, new_cache=new_cache, state_from=state_from)


class TestGatedDeltaNet2(CacheAgreement):
    pass


def test_the_chunked_peer_has_no_gradients_under_strong_decay():
    """fla's ``naive_chunk_gdn2``, as its ``naive_chunk_kda``, takes e^{G_i - G_j} also of pairs that it then masks."""
    from fla.ops.gdn2.naive import naive_chunk_gdn2, naive_recurrent_gdn2

    q, k, v, b, w = (draw(64, torch.float32, dim=8, seed=seed)[:, :, None] for seed in range(5))
    inputs = [q, l2(k), v, torch.full_like(q, -5.0), b.sigmoid(), w.sigmoid()]
    q, k, v, g, b, w = inputs = [tensor.requires_grad_() for tensor in inputs]
    chunked, recurrent = (form(*inputs)[0] for form in (naive_chunk_gdn2, naive_recurrent_gdn2))
    ours = dplr_delta_rule(q * 8**-0.5, k, w * v, g.exp() * b * k, -k, g)[0]
    assert error(chunked, recurrent) < 1e-5 and error(ours, recurrent) < 1e-5
    of_chunked, of_recurrent, of_ours = (torch.autograd.grad(y.sum(), inputs) for y in (chunked, recurrent, ours))
    assert of_chunked[3].isnan().any()
    for gradient, expected in zip(of_ours, of_recurrent, strict=True):
        assert error(gradient, expected) < 1e-5


def test_rounds_no_worse_in_bfloat16(both):
    assert_rounds_no_worse(both)
