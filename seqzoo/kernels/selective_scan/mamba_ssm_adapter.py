"""The CUDA kernel of Mamba's authors: channels in front of time, no documents, and no state to go on from."""

from __future__ import annotations

from seqzoo.kernels.adapters import imported


def selective_scan(x, dt, A, B, C, D, gate, dt_bias, state, starts):
    for name, given in {"state": state, "starts": starts}.items():
        if given is not None:
            raise ValueError(f"selective_scan: backend='mamba_ssm' takes no {name}; use triton or chunked")
    gate = None if gate is None else gate.to(x.dtype).mT.contiguous()
    x, dt, B, C = (z.to(x.dtype).mT.contiguous() for z in (x, dt, B, C))
    y, last = imported("mamba_ssm.ops.selective_scan_interface", "selective_scan_fn")(
        u=x, delta=dt, A=A.float(), B=B, C=C, D=D, z=gate, delta_bias=dt_bias, delta_softplus=True,
        return_last_state=True,
    )  # fmt: skip
    # Its backward leaves the last state out: better no gradient than a wrong one.
    return y.mT, last.detach()
