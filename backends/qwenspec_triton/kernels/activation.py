"""The gate of a gated MLP."""

import torch.nn.functional as F
from torch import Tensor

from .dispatch import tl, triton, use_triton

ACTIVATION = tl.constexpr("silu")  # flag: silu, relu, gelu or gelu_tanh


def act_and_mul(gate_up: Tensor) -> Tensor:
    """act(gate) · up, in float32, rounded once.

    gate_up: [n, 2i], contiguous: gate, then up
    -> [n, i]
    """
    n, width = gate_up.shape
    size = width // 2
    if not use_triton(gate_up):
        gate, up = gate_up.split(size, dim=-1)
        return _act_torch(gate.float()).mul_(up).to(gate_up.dtype)
    assert gate_up.is_contiguous()
    out = gate_up.new_empty(n, size)
    block = min(1024, triton.next_power_of_2(size))
    _act_and_mul_kernel[(n, triton.cdiv(size, block))](gate_up, out, size, BLOCK=block, num_warps=4)
    return out


def _act_torch(gate: Tensor) -> Tensor:
    if ACTIVATION == "silu":
        return F.silu(gate)
    elif ACTIVATION == "relu":
        return F.relu(gate)
    elif ACTIVATION == "gelu":
        return F.gelu(gate)
    else:
        return F.gelu(gate, approximate="tanh")


@triton.jit
def _act_and_mul_kernel(gate_up_ptr, out_ptr, size, BLOCK: tl.constexpr):
    """Grid (rows, blocks of columns)."""
    row = tl.program_id(0).to(tl.int64) * size
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < size
    gate = tl.load(gate_up_ptr + 2 * row + column, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(gate_up_ptr + 2 * row + size + column, mask=inside, other=0.0).to(tl.float32)
    out = _act(gate) * up
    tl.store(out_ptr + row + column, out.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _act(x):
    if ACTIVATION == "silu":
        return x * tl.sigmoid(x)
    elif ACTIVATION == "relu":
        return tl.maximum(x, 0.0)
    elif ACTIVATION == "gelu":
        return 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))
    else:
        # (1 + tanh(z)) / 2 = sigmoid(2z), which saturates without overflow.
        return x * tl.sigmoid(1.5957691216057308 * (x + 0.044715 * x * x * x))
