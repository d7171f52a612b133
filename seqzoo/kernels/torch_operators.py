"""How a fused implementation becomes an operator of torch: opaque to torch.compile, differentiable, cheap to call.

`torch.library.custom_op` would do the same at twice the cost of a call, which decoding pays for every token. A recipe:

    FORWARD = define(
        "scan_native(Tensor x, Tensor? state) -> (Tensor, Tensor)",
        run,    # run(x, state): real tensors of the device, of any strides; returns new ones, never an input or a view
        fake,   # fake(x, state): the same shapes, dtypes and (contiguous) strides by x.new_empty(...), nothing computed
        device="CPU",
    )
    BACKWARD = define("scan_native_backward(Tensor y_grad, Tensor state_grad, Tensor x, Tensor? state) -> ...", ...)

    def save(ctx, inputs, outputs):          # what the backward needs
        ctx.save_for_backward(*inputs)

    def backward(ctx, y_grad, state_grad):   # one gradient for each input, None for what has none
        return BACKWARD(y_grad, state_grad, *ctx.saved_tensors)

    differentiable(FORWARD, save, backward)

Schemas take Tensor, Tensor?, int, float, bool and str. An operator returns tensors only; where their number varies, a
list of them (Tensor[]), whose gradients `backward` gets one by one. Where an input is None, its gradient is an empty
tensor (`x.new_empty(0)`) that `backward` replaces by None. Gradients of outputs that nobody used arrive as zeros. No
implementation may change its inputs.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor

Function = TypeVar("Function", bound=Callable[..., Any])

_LIBRARY = torch.library.Library("seqzoo", "FRAGMENT")


def constant_in_graphs(function: Function) -> Function:
    """Let ``torch.compile`` call ``function`` while it traces, and keep its answer as a constant.

    What ``torch.compiler.assume_constant_result`` does, which imports the compiler, a second's work.
    """
    function._dynamo_marked_constant = True  # pyright: ignore[reportFunctionMemberAccess, reportAttributeAccessIssue]
    return function


def define(schema: str, run: Callable[..., Any], fake: Callable[..., Any], *, device: str) -> Any:
    """Register ``torch.ops.seqzoo.NAME`` and return its overload.

    Args:
        schema: ``NAME(arguments) -> results``, without a namespace.
        run: the implementation for tensors of ``device``.
        fake: the same for tensors that have a shape but no data.
        device: dispatch key, ``CPU`` or ``CUDA``.
    """
    name = schema.partition("(")[0]
    # Compiled code hands tensors over as eager code would; without the tag it may change their strides.
    _LIBRARY.define(schema, tags=(torch.Tag.needs_fixed_stride_order, torch.Tag.pt2_compliant_tag))
    _LIBRARY.impl(name, run, device)
    torch.library.register_fake(f"seqzoo::{name}", fake, lib=_LIBRARY)
    return getattr(torch.ops.seqzoo, name).default


def differentiable(operator: Any, save: Callable[..., None], backward: Callable[..., Any]) -> None:
    """Give ``operator`` a gradient, once: gradients of gradients are refused.

    Args:
        operator: what ``define`` returned.
        save: called as ``save(ctx, inputs, outputs)``; stores what ``backward`` needs on ``ctx``.
        backward: called as ``backward(ctx, *gradients of outputs)``; returns the gradient of each input or None.
    """

    name = operator.name().partition("::")[2]

    class Differentiable(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, *inputs: Any) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
            with torch._C._AutoDispatchBelowAutograd():
                outputs = operator(*inputs)
            outputs = tuple(outputs) if isinstance(outputs, list) else outputs
            save(ctx, inputs, outputs)
            return outputs

        @staticmethod
        def backward(ctx: Any, *gradients: Tensor) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
            if torch.is_grad_enabled():
                raise RuntimeError(f"{name} has no gradient of its gradient; use backend='chunked' for that")
            return backward(ctx, *gradients)

    def call(*inputs: Any) -> Any:
        if torch.is_grad_enabled():
            for x in inputs:
                if isinstance(x, Tensor) and x.requires_grad:
                    return Differentiable.apply(*inputs)
        with torch._C._AutoDispatchBelowAutograd():
            return operator(*inputs)

    Differentiable.__name__ = Differentiable.__qualname__ = name
    _LIBRARY.impl(name, call, "Autograd")
