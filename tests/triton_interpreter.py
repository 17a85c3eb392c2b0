"""Repairs of Triton's interpreter (3.6 to 3.9), which is silently wrong about bfloat16.

Import with TRITON_INTERPRET=1 set, before a kernel runs. Each repair replaces one function of
`triton.runtime.interpreter`, and `test_kernels_interpreter.py` shows that it is needed and that it works.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import triton
import triton.language as tl
import triton.runtime.interpreter as interpreter

assert triton.knobs.runtime.interpret, "set TRITON_INTERPRET=1 before triton is imported"

_FLOAT8 = {tl.float8e4nv: torch.float8_e4m3fn}
_TORCH = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32, "fp64": torch.float64}
_BITS = {16: torch.int16, 32: torch.int32, 64: torch.int64}


def _convert_float(x: Any, source: Any, target: Any, rounding: Any) -> Any:
    """Casts between float types. The interpreter cuts bfloat16's low bits off; the hardware, like torch, rounds
    to nearest even. x has the source's bits; the result has the target's, as unsigned integers."""
    source, target = source.scalar, target.scalar
    if str(source) not in _TORCH or str(target) not in _TORCH:
        return _convert_float_unrepaired(x, source, target, rounding)
    bits = np.ascontiguousarray(x).view(f"int{source.primitive_bitwidth}")
    cast = torch.from_numpy(bits).view(_TORCH[str(source)]).to(_TORCH[str(target)])
    width = target.primitive_bitwidth
    return cast.view(_BITS[width]).numpy().view(f"uint{width}").reshape(x.shape)


def _create_dot(self: Any, a: Any, b: Any, d: Any, input_precision: Any, max_num_imprecise_acc: Any) -> Any:
    """tl.dot. The interpreter multiplies bfloat16's bit patterns, which it holds as uint16, as integers; a repair that
    takes its place has to know float8's too."""
    product = np.matmul(_values(a), _values(b), dtype=d.data.dtype)
    return interpreter.TensorHandle(product + d.data, d.dtype.scalar)


def _values(handle: Any) -> Any:
    if handle.dtype.scalar in _FLOAT8:
        bits = torch.from_numpy(np.ascontiguousarray(handle.data).view(np.uint8))
        return bits.view(_FLOAT8[handle.dtype.scalar]).float().numpy()
    if handle.dtype.scalar == tl.bfloat16:
        return _convert_float(handle.data, handle.dtype, tl.float32, None).view(np.float32)
    return handle.data


_convert_float_unrepaired = interpreter._convert_float
interpreter._convert_float = _convert_float
interpreter.InterpreterBuilder.create_dot = _create_dot


# A function called by a kernel, of Triton's own library too (tl.sum, tl.cdiv), patches triton.language anew at every
# call, and that takes most of the time. Patching once a launch does.


def _launch(self: Any, *args: Any, **kwargs: Any) -> Any:
    scope = interpreter._patch_lang(tl.standard.sum.fn)  # patches what the library sees
    try:
        return _launch_unrepaired(self, *args, **kwargs)
    finally:
        if hasattr(scope, "restore"):
            scope.restore()


def _call(self: Any, *args: Any, **kwargs: Any) -> Any:
    return self.rewrite()(*args, **kwargs)


_launch_unrepaired = interpreter.GridExecutor.__call__
interpreter.GridExecutor.__call__ = _launch
interpreter.InterpretedFunction.__call__ = _call


if tuple(map(int, triton.__version__.split(".")[:2])) < (3, 9):
    # A loop bound read from memory is an array of one element, which NumPy 2.4 no longer takes for an integer.
    _patch_lang_tensor_unrepaired = interpreter._patch_lang_tensor

    def _patch_lang_tensor(tensor: Any, *args: Any) -> Any:
        scope = _patch_lang_tensor_unrepaired(tensor, *args)
        tensor.__index__ = lambda self: int(self.handle.data.squeeze())
        tensor.__bool__ = lambda self: bool(self.handle.data.squeeze()) if self.handle.data.size == 1 else True
        return scope

    interpreter._patch_lang_tensor = _patch_lang_tensor
