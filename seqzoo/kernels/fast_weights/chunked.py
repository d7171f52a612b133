"""The dual form: a chunk's weights are never formed for each token, only the errors that its keys make at A.

With x_s what enters a layer and e_s the error that leaves it (both at A, for key s), rates inside e, what token t sees
of its chunk are sums over tokens, with coefficients that depend on the gates alone:

    S_t = m_t S + sum_s m_ts x_s e_s^T,    C_t = a_t C + (a_t - 1) A - d_t S - sum_s p_ts x_s e_s^T

where a_t and m_t are the products of the gates up to t, a_ts and m_ts those from s on, d_t = sum_s a_ts m_s is what
reached C of S, and p = a m, a product of matrices, what did of a step. So a chunk is one walk of its keys through the
network and back. Queries read all chunks of a segment at once, by x W_t with x_s e_s^T in it as (x . x_s) e_s.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from seqzoo.kernels.backends import accumulation_dtype
from seqzoo.kernels.fast_weights import reference
from seqzoo.kernels.fast_weights.reference import FastWeightsState
from seqzoo.kernels.segments import SEGMENT, by_segments

# Numbers of weights, all heads and rows of a batch together, that a segment's chunks may hold between the passes.
LARGEST_SEGMENT = 2**23
Weights = tuple[Tensor, ...]  # [batch and head, input, output] of each layer


def fast_weights(
    q,
    k,
    v,
    rate,
    weights,
    norm_weight,
    norm_bias,
    reach,
    log_momentum,
    log_keep,
    state,
    starts,
    chunk,
    gelu,
    norm_eps,
):
    inputs = q, k, v, rate, log_momentum, log_keep
    if not v.numel():
        learned = weights, norm_weight, norm_bias, reach
        return reference.fast_weights(*inputs[:4], *learned, *inputs[4:], state, starts, chunk, gelu, norm_eps)
    dtype, (batch, time, heads) = accumulation_dtype(v), v.shape[:3]
    chunks = Chunks(batch, time, None if state is None else state.position, starts, chunk, v.device)
    initial = _rows([w.to(dtype).expand(batch, *w.shape) for w in weights])
    if state is None:
        nothing = tuple(map(torch.zeros_like, initial))
        carried = initial, nothing, () if log_momentum is None else nothing
    else:
        carried = tuple(_rows([w.to(dtype) for w in layers]) for layers in state[:3])
    if norm_weight is not None:
        norm_weight, norm_bias = (z.to(dtype).repeat(batch, 1)[:, None] for z in (norm_weight, norm_bias))
    network = Network(norm_weight, norm_bias, gelu, norm_eps)
    reach = None if reach is None else reach.to(dtype)

    def run(q, k, v, rate, log_momentum, log_keep, taken, full, carried, fresh):
        coefficients = Coefficients(rate, log_momentum, log_keep, taken, reach, dtype)
        q, k, v = (rearrange(z.to(dtype), "b n c h d -> n (b h) c d") for z in (q, k, v))
        full, fresh = (None if z is None else z.repeat_interleave(heads, 0).T[..., None, None] for z in (full, fresh))
        walk, carried = _walk(network, coefficients, k, v, initial, carried, full, fresh)
        o = _read(network, coefficients, q, k, walk)
        return rearrange(o, "n (b h) c d -> b n c h d", h=heads), carried

    held = batch * heads * sum(w.shape[1] * w.shape[2] for w in weights)
    size = max(1, min(SEGMENT // chunk, LARGEST_SEGMENT // max(held, 1)))
    cut = [None if z is None else chunks.cut(z) for z in inputs]
    taken = None if log_momentum is None else chunks.cut(torch.ones_like(log_momentum))
    o, carried = by_segments(run, (*cut, taken, chunks.full), carried, chunks.fresh, size)
    # Copies: a state is not a view of anything larger.
    anchor, change, momentum = (tuple(w.unflatten(0, (batch, heads)).clone() for w in layers) for layers in carried)
    return chunks.join(o).to(v.dtype), FastWeightsState(anchor, change, momentum, chunks.position)


def _rows(layers: Any) -> Weights:
    return tuple(w.flatten(0, 1) for w in layers)


class Chunks:
    """Time cut into chunks that begin where a document does, other places in every row: ``[batch, chunk, place, ...]``.

    Compiled code must know beforehand how many chunks there are: where documents may begin, one a token.

    Args:
        batch: rows.
        time: tokens.
        position: how many tokens the open chunk of each row has.
        starts: True where a new document begins.
        size: tokens in a chunk.
        device: where the sequence lives.
    """

    def __init__(
        self, batch: int, time: int, position: Tensor | None, starts: Tensor | None, size: int, device: torch.device
    ) -> None:
        self.size, self.time = size, time
        self.index = self.full = self.fresh = None
        if position is None and starts is None:
            self.count = -(-time // size)
            self.position = torch.full((batch,), time % size, dtype=torch.int64, device=device)
            if time % size:
                self.full = torch.arange(self.count, device=device).expand(batch, -1) < self.count - 1
            return
        token = torch.arange(time, device=device).expand(batch, -1)
        place = token if position is None else token + position[:, None]
        if starts is not None:
            last = torch.where(starts, token, -1).cummax(1).values
            place = torch.where(last < 0, place, token - last)
        place = place % size
        number = (place == 0).cumsum(1)
        number = number - number[:, :1]
        if not torch.compiler.is_compiling():
            self.count = int(number.max()) + 1
        else:
            self.count = time if starts is not None else (time - 2) // size + 2
        self.index = number * size + place
        self.position = (place[:, -1] + 1) % size
        self.full = self.cut(torch.ones_like(token, dtype=torch.bool))[..., -1]
        self.fresh = None if starts is None else self.cut(starts)[..., 0]

    def cut(self, x: Tensor) -> Tensor:
        """``[batch, time, ...]`` to ``[batch, chunk, place, ...]``, zeros where no token is."""
        if self.index is None:
            missing = self.count * self.size - self.time
            x = torch.cat([x, x.new_zeros(len(x), missing, *x.shape[2:])], 1) if missing else x
            return x.unflatten(1, (-1, self.size))
        empty = x.new_zeros(len(x), self.count * self.size, *x.shape[2:])
        return empty.scatter(1, self._index_of(x), x).unflatten(1, (-1, self.size))

    def join(self, y: Tensor) -> Tensor:
        """The way back."""
        y = y.flatten(1, 2)
        return y[:, : self.time] if self.index is None else y.gather(1, self._index_of(y))

    def _index_of(self, x: Tensor) -> Tensor:
        assert self.index is not None
        return self.index[(..., *[None] * (x.ndim - 2))].expand(-1, -1, *x.shape[2:])


class Coefficients:
    """What of A, C, S and the steps of earlier tokens is in the weights that a token sees, by the gates alone.

    Axes are ``[chunk, batch and head, token, 1]``, or ``[..., token, token]`` between two tokens; None is one.
    """

    def __init__(
        self,
        rate: Tensor,
        log_momentum: Tensor | None,
        log_keep: Tensor | None,
        taken: Tensor | None,
        reach: Tensor | None,
        dtype: torch.dtype,
    ) -> None:
        momentum, keep, taken = (
            None if z is None else rearrange(z.to(dtype), "b n c h -> n (b h) c")
            for z in (log_momentum, log_keep, taken)
        )
        self.rate = rearrange(rate.to(dtype), "b n c h -> n (b h) c 1")
        places = torch.arange(rate.shape[2], device=rate.device)
        visible = places[:, None] >= places
        self.reach = reach
        self.keeps = self.loses = self.pushes = self.carries = self.carried_to_end = self.written_to_end = None
        written = visible.to(dtype)
        if keep is not None:
            total, written = _decays(keep, visible)
            self.keeps, self.loses = total.exp().to(dtype), total.expm1().to(dtype)
        if momentum is not None and taken is not None:
            total, carried = _decays(momentum, visible)
            self.carries, self.carried_to_end = total.exp().to(dtype), carried[..., -1, :, None]
            written = written * taken[..., None, :]  # S leaves C alone where no token is
            self.pushes = written @ self.carries
            written = written @ carried
        if written.ndim > 2:
            self.written_to_end = written[..., -1, :, None]
        self.seen = written if reach is None else reach[:, None] * written


def _decays(log: Tensor, visible: Tensor) -> tuple[Tensor, Tensor]:
    """The sum of a chunk's log gates up to each token, float64 where there is such, and the gates' product between two.

    One strong decay in a long sum would blur all the differences after it.
    """
    exact = log.dtype if log.device.type == "mps" else torch.float64
    total = log.to(exact).cumsum(-1)[..., None]
    return total, (total - total.mT).to(log.dtype).masked_fill(~visible, -torch.inf).exp()


class Network(NamedTuple):
    """The norm's weights ``[batch and head, 1, value]``, or None for no norm, and how gelu is computed."""

    norm_weight: Tensor | None
    norm_bias: Tensor | None
    gelu: Any
    eps: float

    def enter(self, z: Tensor, weight: Tensor) -> Tensor:
        """What meets ``weight``: a one for its biases, where it has them."""
        return z if z.shape[-1] == weight.shape[-2] else F.pad(z, (0, 1), value=1.0)

    def aims(self, k: Tensor, v: Tensor, rate: Tensor) -> tuple[Tensor, Tensor | None]:
        """``rate`` times what the error has besides what is read; and the factor of what is read, under a norm."""
        if self.norm_weight is None or self.norm_bias is None:
            return rate * v, None
        return rate * (self.norm_weight * (k + self.norm_bias - v)), rate * self.norm_weight.square()

    def error(self, read: Tensor, rate: Tensor, aim: Tensor, factor: Tensor | None) -> Tensor:
        """The rate times the gradient of the loss by what is read."""
        if factor is None:
            return rate * read - aim
        return NormError.apply(read, aim, factor, self.eps)


class NormError(torch.autograd.Function):
    """``e = N(aim + factor u)`` with u what layer norm makes of ``read``, and N its backward:

        u = r (read - mean read),   r^-2 = var read + eps,   N(w) = r (w - mean w - u mean(u w))

    The gradient is written out, with far fewer passes than autograd's of N. N is its own transpose, so that

        g_w = N(g),   g_u = factor g_w - r (g mean(u w) + w mean(u g)),   g_read = N(g_u) - r u mean(g e)
    """

    @staticmethod
    def forward(ctx, read: Tensor, aim: Tensor, factor: Tensor, eps: float) -> Tensor:
        unit, mean, spread = torch.native_layer_norm(read, read.shape[-1:], None, None, eps)
        wrong = torch.addcmul(aim, factor, unit)
        error = _normed_back(wrong, read, mean, spread)
        ctx.save_for_backward(read, factor, unit, mean, spread, wrong, error)
        return error

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        read, factor, unit, mean, spread, wrong, error = ctx.saved_tensors
        of_wrong = _normed_back(gradient, read, mean, spread)
        both = gradient * (unit * wrong).mean(-1, keepdim=True) + wrong * (unit * gradient).mean(-1, keepdim=True)
        of_unit = torch.addcmul(factor * of_wrong, spread, both, value=-1)
        of_spread = spread * (gradient * error).mean(-1, keepdim=True)
        of_read = torch.addcmul(_normed_back(of_unit, read, mean, spread), of_spread, unit, value=-1)
        return of_read, of_wrong, of_wrong * unit, None


def _normed_back(w: Tensor, read: Tensor, mean: Tensor, spread: Tensor) -> Tensor:
    backward = torch.ops.aten.native_layer_norm_backward
    return backward(w, read, read.shape[-1:], mean, spread, None, None, [True, False, False])[0]


class Walk(NamedTuple):
    """Of each layer, over the chunks: A, C and S before it, what keys let in after the first layer, and errors.

    Where all chunks are whole, C is zero before each, and None here.
    """

    anchor: list[Tensor]
    change: list[Tensor] | None
    momentum: list[Tensor]
    inner: list[Tensor]
    errors: list[Tensor]


def _walk(network, c, k, v, initial, carried, full, fresh) -> tuple[Walk, Any]:
    """The chunks one after the other: keys through the network at A and back, then the next weights."""
    anchor, change, momentum = carried
    depth, count = len(initial), len(k)
    k = network.enter(k, initial[0])
    aim, factor = network.aims(k[..., : v.shape[-1]], v, c.rate)

    def each(z: Tensor | None) -> Any:
        return [None] * count if z is None else z.unbind(0)

    def ends(z: Tensor | None) -> Any:
        return each(None if z is None else z[..., -1:, :])

    kept, whole = [], full is None  # before whole chunks C is zero, and stays it
    share = None if c.reach is None else c.reach[-1]
    steps = zip(
        *map(each, (k, c.rate, aim, factor, full, fresh, c.written_to_end, c.carried_to_end)),
        *map(ends, (c.keeps, c.loses, c.pushes, c.carries)),
        strict=True,
    )
    for x, rate, aim_n, factor_n, full_n, fresh_n, written, carry, keep, lose, push, decay in steps:
        if fresh_n is not None:
            anchor = _where(fresh_n, initial, anchor)
            change, momentum = (_forgotten(fresh_n, layers) for layers in (change, momentum))
        entering, leaving = [x], []
        for index, weight in enumerate(anchor):
            leaving.append(torch.bmm(entering[index], weight))
            if index + 1 < depth:
                z = F.gelu(leaving[index], approximate=network.gelu)
                entering.append(network.enter(z, anchor[index + 1]))
        errors = [network.error(leaving[-1], rate, aim_n, factor_n)]
        for index in reversed(range(1, depth)):
            before = leaving[index - 1]
            back = torch.bmm(errors[0], anchor[index][:, : before.shape[-1]].mT)
            errors.insert(0, torch.ops.aten.gelu_backward(back, before, approximate=network.gelu))
        kept.append((anchor, change, momentum, entering[1:], errors))

        after, seen, after_momentum = [], [], []
        for a, d, s, z, e in zip(anchor, change, momentum or [None] * depth, entering, errors, strict=True):
            rest: Any = None if whole else d
            if keep is not None:
                rest = lose * a if whole else torch.addcmul(lose * a, keep, d)
            if carry is not None:
                rest = -push * s if rest is None else rest - push * s
                after_momentum.append(torch.baddbmm(decay * s, z.mT, carry * e))
            e = e if written is None else written * e
            if whole:
                rest = a if rest is None else _reached(a, share, rest)
                seen.append(torch.baddbmm(rest, z.mT, e if share is None else share * e, alpha=-1))
            else:
                after.append(torch.baddbmm(rest, z.mT, e, alpha=-1))
                seen.append(_reached(a, share, after[-1]))
        if whole:
            anchor = tuple(seen)
        else:
            anchor, change = _where(full_n, seen, anchor), _forgotten(full_n, after)
        momentum = tuple(after_momentum)

    def stacked(part: int) -> list[Tensor]:
        return [torch.stack(layer) for layer in zip(*(step[part] for step in kept), strict=True)]

    anchors, inner, errors = (stacked(part) for part in (0, 3, 4))
    walk = Walk(anchors, None if whole else stacked(1), stacked(2), inner, errors)
    return walk, (anchor, change, momentum)


def _read(network: Network, c: Coefficients, q: Tensor, k: Tensor, walk: Walk) -> Tensor:
    """What queries read: the same network for all chunks at once."""
    inside = [network.enter(k, walk.anchor[0][0]), *walk.inner]
    z = q
    for index, (x, e) in enumerate(zip(inside, walk.errors, strict=True)):
        anchor = walk.anchor[index]
        if index:
            z = F.gelu(z, approximate=network.gelu)
        z = network.enter(z, anchor)
        read, changes = z @ anchor, []
        if c.loses is not None:
            changes.append(c.loses * read)
        if walk.change is not None:
            change = z @ walk.change[index]
            changes.append(change if c.keeps is None else c.keeps * change)
        if c.pushes is not None:
            changes.append(-c.pushes * (z @ walk.momentum[index]))
        share = None if c.reach is None else c.reach[:, None]
        for change in changes:
            read = _reached(read, share, change)
        z = read - ((z @ x.mT) * c.seen) @ e
    if network.norm_weight is None or network.norm_bias is None:
        return z
    return q + torch.addcmul(network.norm_bias, network.norm_weight, F.layer_norm(z, z.shape[-1:], eps=network.eps))


def _reached(anchor: Tensor, share: Tensor | None, change: Tensor) -> Tensor:
    return anchor + change if share is None else torch.addcmul(anchor, share, change)


def _forgotten(where: Tensor, layers: Any) -> Weights:
    return tuple(w.masked_fill(where, 0) for w in layers)


def _where(choose: Tensor, these: Any, those: Any) -> Weights:
    return tuple(torch.where(choose, this, that) for this, that in zip(these, those, strict=True))
