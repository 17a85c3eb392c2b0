"""float8 e4m3 as bytes: a sign, 4 bits of exponent biased by 7, 3 of mantissa; at most 448, and one NaN a sign.

Integers convert both ways: the same numbers on every chip, also on those that have no e4m3.
"""

import torch
from torch import Tensor

from .dispatch import tl, triton

STORED_KV_SCALES = True  # flag: NaN among keys and values does not show in their scales


def encode_torch(x: Tensor) -> Tensor:
    """float32 -> the nearest e4m3, ties to even, at most 448 in magnitude: uint8."""
    return x.clamp(-448, 448).to(torch.float8_e4m3fn).view(torch.uint8)


def decode_torch(codes: Tensor) -> Tensor:
    """uint8 -> 2^-8 times what it stands for, float32; NaN is 1.875. torch's own cast takes many times as long."""
    return _float16_bits(codes).view(torch.float16).float()


if STORED_KV_SCALES:

    def decode_with_nan_torch(codes: Tensor) -> Tensor:
        """uint8 -> 2^-8 times what it stands for, NaN included, float32."""
        bits = _float16_bits(codes)
        bits |= (bits + 0x80) & 0x4000  # a carry out of seven ones, which completes NaN's exponent
        return bits.view(torch.float16).float()


def _float16_bits(codes: Tensor) -> Tensor:
    # Sign extended and times 2^7, the sign is the two upper bits. float16's exponents are biased by 8 more.
    return codes.view(torch.int8).to(torch.int16).mul_(128).bitwise_and_(~0x4000)


@triton.jit
def encode(x):
    """float32 -> the nearest e4m3, ties to even, at most 448 in magnitude: uint8."""
    bits = x.to(tl.int32, bitcast=True)
    size = bits & 0x7FFFFFFF
    normal = ((size + 0x7FFFF + (size >> 20 & 1)) >> 20) - (120 << 3)  # float32's exponents are biased by 120 more
    subnormal = (tl.abs(x) + 16384.0).to(tl.int32, bitcast=True) & 0xF  # the last bit of 2^14 is e4m3's, 2^-9
    code = tl.where(size < 0x3C800000, subnormal, tl.minimum(normal, 0x7E))  # normal from 2^-6
    code = tl.where(size > 0x7F800000, 0x7F, code)  # NaN
    return (code | (bits >> 24 & 0x80)).to(tl.uint8)


@triton.jit
def decode(codes):
    """uint8 -> 2^-8 times what it stands for, float32; NaN is 1.875."""
    # Sign extended and times 2^20, the sign is the five upper bits. Triton's own cast to bfloat16 is slower on sm_90.
    bits = (codes.to(tl.int8, bitcast=True).to(tl.int32) << 20) & ~0x78000000
    return bits.to(tl.float32, bitcast=True) * 2.0**112
