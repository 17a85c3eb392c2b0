"""What a quantised KV cache holds, written from the formulas: numbers in float64, only x / s in float32."""

from __future__ import annotations

import torch
from torch import Tensor


def e4m3_values() -> Tensor:
    """What the bytes 0 … 127 stand for, in rising order but for the last, NaN: float64 [128]."""
    code = torch.arange(128)
    exponent, mantissa = (code // 8).double(), (code % 8).double()
    values = torch.where(exponent == 0, mantissa / 8 * 2.0**-6, (1 + mantissa / 8) * 2.0 ** (exponent - 7))
    values[127] = torch.nan
    return values


def to_e4m3(x: Tensor) -> Tensor:
    """float32 -> bytes: the nearest value, the even byte between two, 448 beyond it; NaN is 127 with any sign."""
    values, size = e4m3_values()[:127], x.double().abs()
    middles = (values[1:] + values[:-1]) / 2
    below, upto = torch.searchsorted(middles, size), torch.searchsorted(middles, size, right=True)
    code = torch.where(below % 2 == 0, below, upto)  # they differ by one where x is a middle
    return torch.where(x.isnan(), 127, code + 128 * x.signbit()).to(torch.uint8)


def from_e4m3(codes: Tensor) -> Tensor:
    return e4m3_values()[codes.long() % 128] * torch.where(codes >= 128, -1.0, 1.0)


def token_scales(x: Tensor, kv: str) -> Tensor:
    """x [..., head_dim] -> float32 [...]; amax gives NaN where there is one."""
    return x.float().abs().amax(-1) / (127 if kv == "int8" else 448)


def quantize(x: Tensor, kv: str, scale: Tensor) -> Tensor:
    """x [..., head_dim], scale float32 [..., 1] -> bytes."""
    unit = torch.where(scale == 0, 0.0, x.float() / scale)
    if kv != "int8":
        return to_e4m3(unit)
    return unit.double().round().clamp(-127, 127).nan_to_num(0).to(torch.int8)  # round: half to even


def dequantize(codes: Tensor, kv: str, scale: Tensor) -> Tensor:
    """float64."""
    return (codes.double() if kv == "int8" else from_e4m3(codes)) * scale.double()
