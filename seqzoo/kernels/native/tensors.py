"""How an operator's native.py calls its native.cpp.

    SCAN = Function("linear_scan_forward")                       # found in the library at the first call

    def run(x, decay, state):                                    # registered by seqzoo/kernels/torch_operators.py
        x, decay, state = dense(x, decay, state)                 # C++ reads rows without strides
        y = torch.empty_like(x)
        SCAN(DTYPES[x.dtype], torch.get_num_threads(), x, decay, state, y, *x.shape)
        return y

In C++ every argument is a pointer (null for None), an `int64_t` (ints and bools) or a `double`:

    SEQZOO_EXPORT void linear_scan_forward(int64_t dtype, int64_t threads, const void* x, ...) {
        with_dtype(dtype, [&](auto kind) {
            using T = decltype(kind);
            forward(threads, static_cast<const T*>(x), ...);
        });
    }

`parallel_for(threads, count, body)` of interface.h spreads work; OpenMP pragmas are refused by the build. Tensors of
size 0 have a null pointer: return early in Python. float16 is cast to float32 around the operator, in native.py.
`python -m seqzoo.kernels.native.build` compiles what has changed.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from seqzoo.kernels import native

# The codes that with_dtype of interface.h takes.
DTYPES = {torch.float64: 0, torch.float32: 1, torch.bfloat16: 2}


class Function:
    """A function of the library, called with contiguous tensors, None, ints, bools and floats.

    Args:
        name: what native.cpp exports it as.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self.entry: Any = None

    def __call__(self, *arguments: Any) -> None:
        values = []
        for x in arguments:
            if isinstance(x, Tensor):
                assert x.is_contiguous(), f"{self.name} was given a tensor of strides {x.stride()}"
                x = x.data_ptr()
            values.append(x)
        (self.entry or self._find(arguments))(*values)

    def _find(self, arguments: tuple[Any, ...]) -> Any:
        try:
            entry = native.library()[self.name]
        except AttributeError as error:
            raise RuntimeError(
                f"native kernels are older than their sources: {self.name} is not among them; "
                "`python -m seqzoo.kernels.native.build` builds them anew"
            ) from error
        kinds = {int: ctypes.c_int64, bool: ctypes.c_int64, float: ctypes.c_double}
        entry.argtypes = [kinds.get(type(x), ctypes.c_void_p) for x in arguments]
        entry.restype = None
        self.entry = entry
        return entry


def dense(*tensors: Tensor | None) -> list[Any]:
    """Contiguous tensors of the same values, copied only where they must be; None stays None."""
    return [x if x is None or x.is_contiguous() else x.contiguous() for x in tensors]


def rows_of(x: Tensor, width: int = 1) -> Tensor:
    """``x`` as ``[token, channel]`` with any distance between tokens, copied only where it has no such form.

    Args:
        x: ``[..., channel]``, or several last axes that are channels.
        width: how many of the last axes they are.
    """
    x = x.reshape(x.shape[:-width].numel(), x.shape[-width:].numel())
    return x if x.stride(1) == 1 else x.contiguous()


def dense_rows(*tensors: Tensor) -> list[Any]:
    """Of each tensor a dense one that has its address, and the strides of its first two axes.

    For C++ that takes these, as a slice of a buffer that grows or of a projection's output has them: copied is only
    what is not dense within a row.
    """
    found = []
    for x in tensors:
        start = x if x.is_contiguous() else x[:1, :1]
        if not start.is_contiguous():
            start = x = x.contiguous()
        found += [start, *x.stride()[:2]]
    return found


def addresses(*tensors: Tensor | None) -> list[int]:
    """Where tensors begin whose tokens may lie apart, which a ``Function`` is not given as they are; 0 for None."""
    return [0 if x is None else x.data_ptr() for x in tensors]


def array_of(tensors: Sequence[Tensor | None]) -> ctypes.Array[ctypes.c_void_p]:
    """A list of contiguous tensors for C++: an array of pointers, which lives as long as what is returned."""
    return (ctypes.c_void_p * len(tensors))(*addresses(*tensors))


_PREFER_LARGE_PAGES = Function("native_prefer_large_pages")
LARGE = 1 << 22


def fresh(*tensors: Tensor | None) -> None:
    """Say that large tensors were just allocated and will be written as a whole.

    The first write to each small page of fresh memory costs more than the arithmetic of what is written there.
    """
    for x in tensors:
        if x is not None and x.nbytes >= LARGE:
            _PREFER_LARGE_PAGES(x, x.nbytes)
