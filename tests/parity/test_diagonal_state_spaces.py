"""LRU, S4D and S5 against their official equations: their authors' code is no package, or JAX.

Read in NicolasZucchet/minimal-LRU (lru/model.py, the appendix of the paper), state-spaces/s4 (models/s4/s4d.py) and
lindermanlab/S5 (s5/ssm.py, s5/layers.py).
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from peers import PRECISIONS, TIMES, TOLERANCE, differentiate, draw, error

from seqzoo.layers import LRU, S4D, S5
from seqzoo.parts.state_space import hold, legendre_eigenvalues


def as_complex(pairs):
    return torch.complex(*pairs.unbind(-1))


def glu(linear, u):
    """W1 u * sigmoid(W2 u), both with a bias: the layers' ``out1`` and ``out2``."""
    (w1, w2), (b1, b2) = linear.weight.chunk(2), linear.bias.chunk(2)
    return (u @ w1.T + b1) * torch.sigmoid(u @ w2.T + b2)


def lru(layer, x, h):
    turn = torch.exp(-torch.exp(layer.nu_log) + 1j * torch.exp(layer.theta_log))
    B = as_complex(layer.write.weight.transpose(1, 2)) * torch.exp(layer.gamma_log)[:, None]
    C, outputs = as_complex(layer.read.weight), []
    for x_t in x.unbind(1):
        h = turn * h + x_t.to(B.dtype) @ B.T
        outputs.append((h @ C.T).real + layer.skip * x_t)
    return glu(layer.out, F.gelu(torch.stack(outputs, 1))), h


def s5(layer, x, h):
    Lambda = torch.clip(layer.rate_real, None, -1e-4) + 1j * layer.rate_imaginary
    kept = torch.exp(Lambda * torch.exp(layer.log_step))
    B = ((kept - 1) / Lambda)[:, None] * as_complex(layer.write.weight.transpose(1, 2))
    C, outputs = as_complex(layer.read.weight), []
    for x_t in x.unbind(1):
        h = kept * h + x_t.to(B.dtype) @ B.T
        outputs.append(2 * (h @ C.T).real + layer.skip * x_t)
    return glu(layer.out, F.gelu(torch.stack(outputs, 1))), h


def s4d(layer, x, h):
    """A convolution with K_l = 2 Re(sum of C (e^{dt A} - 1) / A e^{l dt A}), by transforms as in the authors' code."""
    dt, time = torch.exp(layer.log_step), x.shape[1]
    A = -torch.exp(layer.decay_log) + 1j * layer.frequency
    dtA = A * dt[:, None]
    turns = torch.exp(dtA[..., None] * torch.arange(time))
    entered = (torch.exp(dtA) - 1) / A
    K = 2 * torch.einsum("hn,hnl->hl", torch.view_as_complex(layer.read) * entered, turns).real
    spectrum = torch.fft.rfft(K.T, n=2 * time, dim=0) * torch.fft.rfft(x, n=2 * time, dim=1)
    y = torch.fft.irfft(spectrum, n=2 * time, dim=1)[:, :time] + x * layer.skip
    last = torch.einsum("bth,hnt->bhn", x.to(A.dtype), turns.flip(2)) * entered
    return glu(layer.out, F.gelu(y)), last


CASES = {
    "LRU": (lambda: LRU(32, state_size=12), lru),
    "S4D": (lambda: S4D(32, state_size=16), s4d),
    "S5": (lambda: S5(32, state_size=24, num_blocks=3), s5),
}


@pytest.fixture(params=CASES.values(), ids=CASES)
def case(request):
    """A layer in float64 that has learned a little, and its equations."""
    build, equations = request.param
    layer = build().double()
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return layer, equations


def results(layer, call, x):
    x = x.detach().requires_grad_()
    y, memory = call(x)
    memory = torch.view_as_real(memory)
    read = torch.cat([y.flatten(), memory.flatten()])
    return {"y": y, "memory": memory} | differentiate(read, {"x": x} | dict(layer.named_parameters()))


def ours(layer, x, cut=0):
    def call(x):
        outputs, state = [], None
        for piece in x.split([cut, x.shape[1] - cut] if cut else [x.shape[1]], 1):
            y, state = layer(piece, state)
            outputs.append(y)
        return torch.cat(outputs, 1), state.memory

    return results(layer, call, x)


def theirs(layer, equations, x):
    zero = torch.zeros(2, 12, dtype=x.dtype.to_complex())
    return results(layer, lambda x: equations(layer, x, zero), x)


def assert_close(ours, truth, dtype):
    for name, tensor in ours.items():
        assert (apart := error(tensor, truth[name])) <= TOLERANCE[dtype], f"{name} are {apart:.2e} apart"


@PRECISIONS
@TIMES
def test_values_and_gradients(case, dtype, time):
    layer, equations = case
    x = draw(time, dtype)
    truth = theirs(layer.to(dtype).double(), equations, x.double())
    assert_close(ours(layer.to(dtype), x), truth, dtype)


@pytest.mark.parametrize("cut", [1, 37, 99])
def test_gradients_through_the_state(case, cut):
    layer, equations = case
    x = draw(100, torch.float64)
    assert_close(ours(layer, x, cut), theirs(layer, equations, x), x.dtype)


def test_legendre_eigenvalues():
    """Those of the matrix itself: -sqrt((2n+1)(2k+1)) below the diagonal, -(n+1) on it, plus its rank of one."""
    n = torch.arange(12, dtype=torch.float64)
    low = -torch.sqrt(torch.outer(2 * n + 1, 2 * n + 1)).tril(-1) - torch.diag(n + 1)
    normal = (low + torch.outer((n + 0.5).sqrt(), (n + 0.5).sqrt())).to(torch.complex128)
    values, vectors = legendre_eigenvalues(12)
    torch.testing.assert_close(normal @ vectors, vectors * values)
    torch.testing.assert_close(vectors.mH @ vectors, torch.eye(6, dtype=torch.complex128))
    both = torch.cat([values, values.conj()])
    expected = torch.linalg.eigvals(normal)
    torch.testing.assert_close(both.imag.sort().values, expected.imag.sort().values)


def test_short_steps_lose_no_digits_in_float32():
    rate = torch.complex(torch.full((5,), -0.5), torch.tensor([0.0, 0.1, 3.0, 30.0, 300.0]))
    step = torch.tensor([1e-6, 1e-4, 1e-3, 1e-2, 1e-1])
    exact, exactly = hold(rate.to(torch.complex128), step.double())
    kept, entered = hold(rate, step)
    z = rate.to(torch.complex128) * step.double()
    torch.testing.assert_close(exact, z.exp(), rtol=1e-14, atol=1e-14)
    torch.testing.assert_close(exactly[2:], ((z.exp() - 1) / rate)[2:], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(exactly[:2], (step.double() * (1 + z / 2 + z * z / 6))[:2], rtol=1e-10, atol=0)
    torch.testing.assert_close(kept.to(torch.complex128), exact, rtol=3e-6, atol=0)
    torch.testing.assert_close(entered.to(torch.complex128), exactly, rtol=3e-6, atol=0)
