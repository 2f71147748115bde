"""bfloat16 in Triton's interpreter, which is silently wrong upstream: NumPy has no such type, so it computes on the 16 raw bits and truncates casts.

Test support. To run other tests on the Triton rung without a GPU, load it as a plugin: TRITON_INTERPRET=1 PYTHONPATH=tests/gpu pytest -p interpreter ...
`repair_bfloat16()` makes casts round to nearest even and does arithmetic through float32; call it once, after TRITON_INTERPRET=1 is
set and before a kernel runs.
"""

from __future__ import annotations

import numpy as np
import triton.language as tl
from triton.runtime import interpreter


def _widen(bits: np.ndarray) -> np.ndarray:
    return (np.ascontiguousarray(bits).view(np.uint16).astype(np.uint32) << 16).view(np.float32).reshape(bits.shape)


def _narrow(values: np.ndarray) -> np.ndarray:
    bits = np.ascontiguousarray(values, dtype=np.float32).view(np.uint32).reshape(values.shape)
    rounded = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
    return np.where(np.isnan(values), np.uint16(0x7FC0), rounded)


def _is_bfloat16(handle: interpreter.TensorHandle) -> bool:
    return handle.dtype.scalar == tl.bfloat16


def _as_float32(handle: interpreter.TensorHandle) -> interpreter.TensorHandle:
    return interpreter.TensorHandle(_widen(handle.data), tl.float32) if _is_bfloat16(handle) else handle


def repair_bfloat16() -> None:
    """Patch the interpreter of this process; a second call does nothing."""
    builder = interpreter.InterpreterBuilder
    if getattr(builder, "repaired_bfloat16", False):
        return
    builder.repaired_bfloat16 = True
    convert, dot, binary = interpreter._convert_float, builder.create_dot, builder.binary_op

    def convert_float(data, source, target, rounding):
        if source == tl.bfloat16 and target == tl.float32:
            return _widen(data)
        if source == tl.bfloat16 and target == tl.float64:
            return _widen(data).astype(np.float64)
        if target == tl.bfloat16 and source in (tl.float32, tl.float64) and rounding is not interpreter._ir.ROUNDING_MODE.RTZ:
            return _narrow(data.astype(np.float32))
        return convert(data, source, target, rounding)

    def binary_op(self, left, right, op):
        if not _is_bfloat16(left):
            return binary(self, left, right, op)
        result = binary(self, _as_float32(left), _as_float32(right), op)
        return interpreter.TensorHandle(_narrow(result.data), tl.bfloat16) if result.data.dtype == np.float32 else result

    interpreter._convert_float = convert_float
    builder.create_dot = lambda self, a, b, d, precision, imprecise: dot(self, _as_float32(a), _as_float32(b), d, precision, imprecise)
    builder.binary_op = binary_op


def pytest_configure() -> None:
    repair_bfloat16()
