"""How a fused implementation becomes an operator of torch: opaque to torch.compile, differentiable, cheap to call.

`torch.library.custom_op` would do the same at twice the cost of a call, which decoding pays for every token. A recipe:

    FORWARD = define(
        "scan_native(Tensor x, Tensor? state, Tensor? starts) -> (Tensor y, Tensor last, Tensor kept)",
        run,  # run(x, state, starts): real tensors of the device, of any strides; returns new ones, no input or view
        fake,  # fake(x, state, starts): the same shapes, dtypes and (contiguous) strides by x.new_empty(...)
        device="CPU",
    )
    differentiable(
        FORWARD,
        "y_grad, last_grad, x, state, starts, kept -> x, state",  # what backward takes, what the gradients are like
        backward,  # backward(y_grad, last_grad, x, state, starts, kept): both gradients
        device="CPU",
    )

Schemas take Tensor, Tensor?, int, int[], float, bool and str. An operator returns tensors only; where their number
varies, one list of them (Tensor[]), whose gradients `backward` gets as a list. No implementation may change its inputs.
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


def differentiable(operator: Any, gradient: str, backward: Callable[..., Any], *, device: str) -> None:
    """Give ``operator`` a gradient, once: gradients of gradients are refused.

    Args:
        operator: what ``define`` returned, of a schema that names its results. Those whose gradients are not taken
            have none.
        gradient: ``TAKEN -> LIKE``. What ``backward`` takes, by name: gradients of results (``y_grad``; with a question
            mark None where nobody used the result, without one zeros), then tensors of inputs and results, then
            numbers. ``LIKE``: for the first inputs, one after the other, which of these tensors has the shape and
            dtype of the input's gradient, mostly the input itself; the first of them is never None.
        backward: returns these gradients, in any dtype, or anything where the input is None. It becomes an operator
            too, ``NAME_backward``.
        device: as in ``define``.
    """
    schema, name = operator._schema, operator.name().partition("::")[2]
    results = [x.name for x in schema.returns]
    a_list = str(schema.returns[0].type) == "List[Tensor]"
    several = a_list or len(results) > 1
    kinds = {x.name: "Tensor?" if "Optional" in str(x.type) else str(x.type) for x in schema.arguments + schema.returns}
    kinds = {name: "int[]" if kind == "List[int]" else kind for name, kind in kinds.items()}
    taken, like = (side.split(", ") for side in gradient.split(" -> "))
    # By their places among results, or among inputs and results together.
    of_results = [results.index(x.rstrip("?").removesuffix("_grad")) for x in taken if x not in kinds]
    tensors = [list(kinds).index(x) for x in taken if kinds.get(x, "").startswith("Tensor")]
    numbers = [list(kinds).index(x) for x in taken[len(of_results) + len(tensors) :]]
    without = [index for index in range(len(results)) if index not in of_results]
    fills = [not x.endswith("?") for x in taken[: len(of_results)]]
    places = [taken.index(x) for x in like]
    first = places[0] - len(of_results)
    others = [None] * (len(schema.arguments) - len(like))

    def declare(x: str) -> str:
        kind = kinds.get(x, "Tensor[]" if a_list else "Tensor?" if x.endswith("?") else "Tensor")
        return f"{kind} {x.rstrip('?')}"

    def run(*given: Any) -> list[Tensor]:
        nothing = given[places[0]].new_empty(0)
        pairs = zip((given[place] for place in places), backward(*given), strict=True)
        return [nothing if x is None else dx.to(x.dtype) for x, dx in pairs]

    def fake(*given: Any) -> list[Tensor]:
        nothing = given[places[0]].new_empty(0)
        return [nothing if x is None else x.new_empty(x.shape) for x in (given[place] for place in places)]

    differentiate = define(f"{name}_backward({', '.join(map(declare, taken))}) -> Tensor[]", run, fake, device=device)

    class Differentiable(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, *inputs: Any) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
            with torch._C._AutoDispatchBelowAutograd():
                outputs = operator(*inputs)
            made = tuple(outputs) if several else (outputs,)
            known = (*inputs, *made)
            ctx.save_for_backward(*[known[place] for place in tensors])
            ctx.numbers = [known[place] for place in numbers]
            wanted = made if a_list else [made[place] for place in of_results]
            ctx.kinds = [(x.shape, x.dtype) for x in wanted]
            ctx.mark_non_differentiable(*[made[place] for place in without])
            # Or zeros would be made for what has no gradient, too.
            ctx.set_materialize_grads(False)
            return made if several else outputs

        @staticmethod
        def backward(ctx: Any, *gradients: Tensor | None) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
            if torch.is_grad_enabled():
                raise RuntimeError(f"{name} has no gradient of its gradient; use backend='chunked' for that")
            kept, given = ctx.saved_tensors, []
            wanted = gradients if a_list else [gradients[place] for place in of_results]
            for dy, fill, (shape, dtype) in zip(
                wanted, fills * len(wanted) if a_list else fills, ctx.kinds, strict=True
            ):
                given.append(kept[first].new_zeros(shape, dtype=dtype) if fill and dy is None else dy)
            found = differentiate(*([given] if a_list else given), *kept, *ctx.numbers)
            # For the first inputs; None for the others, and for those that are None or constant.
            pairs = zip(ctx.needs_input_grad, (*found, *others), strict=True)
            return tuple(x if needed else None for needed, x in pairs)

    def call(*inputs: Any) -> Any:
        if torch.is_grad_enabled():
            for x in inputs:
                if isinstance(x, Tensor) and x.requires_grad:
                    return Differentiable.apply(*inputs)
        with torch._C._AutoDispatchBelowAutograd():
            return operator(*inputs)

    Differentiable.__name__ = Differentiable.__qualname__ = name
    _LIBRARY.impl(name, call, "Autograd")
