"""Bfloat16 and comparisons as a GPU has them, in the interpreter of Triton 3.9.

The interpreter keeps a bfloat16 as its bit pattern, a uint16, and then adds, multiplies and compares the patterns;
casts to bfloat16 drop bits instead of rounding, or convert the number to an integer. Here every operation on numbers
sees float32 instead, and its result is rounded to nearest, ties to even. Reductions and scans over bfloat16, which a
GPU would round after every step, are refused: a kernel sums in float32. Comparisons come out typed as what they
compare, so that a scalar one, broadcast, is no mask any more: they become int1.
"""

from __future__ import annotations

import functools

import numpy as np
import torch


def repair() -> None:
    """Patch the interpreter, once, before any kernel runs."""
    import triton.language as tl
    from triton.runtime import interpreter

    handle = interpreter.TensorHandle

    def is_narrow(x) -> bool:
        return isinstance(x, handle) and x.dtype.scalar == tl.bfloat16

    def widen(x):
        if not is_narrow(x):
            return x
        bits = np.asarray(x.data).astype(np.uint32) << 16
        return handle(bits.view(np.float32), tl.float32)

    def narrow(x):
        rounded = torch.from_numpy(np.array(x.data, dtype=np.float32)).bfloat16()
        return handle(rounded.view(torch.uint16).numpy(), tl.bfloat16)

    def in_float32(method):
        @functools.wraps(method)
        def run(self, *args):
            result = method(self, *map(widen, args))
            if result.data.dtype == np.bool_:
                return handle(result.data, tl.int1)
            # The result has the type of the last operand: a dot product's accumulator, the value of a select.
            *_, like = (x for x in args if isinstance(x, handle))
            return narrow(result) if is_narrow(like) and result.data.dtype == np.float32 else result

        return run

    def cast(method):
        @functools.wraps(method)
        def run(self, source, target):
            source = widen(source)
            return narrow(source) if target.scalar == tl.bfloat16 else method(self, source, target)

        return run

    def refuse(method):
        @functools.wraps(method)
        def run(self, inputs, *args):
            tensors = inputs if isinstance(inputs, tuple) else (inputs,)
            if any(is_narrow(x.handle) for x in tensors):
                raise TypeError("a reduction or scan over bfloat16; cast to float32 first")
            return method(self, inputs, *args)

        return run

    builder = interpreter.InterpreterBuilder
    wrappers = {
        in_float32: ("unary_op", "binary_op", "ternary_op", "create_dot", "create_fma", "create_erf", "create_rsqrt"),
        cast: ("cast_impl",),
    }
    for wrap, names in wrappers.items():
        for name in names:
            setattr(builder, name, wrap(getattr(builder, name)))
    for operation in (interpreter.ReduceOps, interpreter.ScanOps):
        operation.apply_impl = refuse(operation.apply_impl)

    def scan(self, inputs):
        # In as many steps as the length has bits, not one at a time for every number. A GPU sums in such an order too.
        axis, size, step = self.axis, inputs[0].handle.data.shape[self.axis], 1
        while step < size:
            earlier = (self.to_tensor(np.roll(x.handle.data, step, axis), x.dtype) for x in inputs)
            combined = self.combine_fn.fn(*earlier, *inputs)
            combined = combined if isinstance(combined, tuple) else (combined,)
            known = np.arange(size).reshape([-1] + [1] * (inputs[0].handle.data.ndim - axis - 1)) < step
            pairs = zip(inputs, combined, strict=True)
            inputs = [self.to_tensor(np.where(known, x.handle.data, y.handle.data), x.dtype) for x, y in pairs]
            step *= 2
        return list(inputs)

    interpreter.ScanOps.generic_scan = scan

    def call(self, *args, **kwargs):
        # The kernel has patched most of the language by now; doing so again at each call takes most of the time.
        if any(tl.core.is_builtin(x.load) for x in self.fn.__globals__.values() if x is tl or x is tl.core):
            interpreter._patch_lang(self.fn)
        return self.rewrite()(*args, **kwargs)

    interpreter.InterpretedFunction.__call__ = call
