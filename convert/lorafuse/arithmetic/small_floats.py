"""Floating-point numbers of 8 and 4 bits, as weights and their scales are stored in them.

OCP Microscaling Formats (MX) v1.0, section 5.3: E4M3 (exponent bias 7, 0x7F and 0xFF are NaN, no infinities),
E2M1 (bias 1), E8M0 (2^(byte − 127), 0xFF is NaN). Every result is exact.
"""

from functools import cache

import torch

from lorafuse.arithmetic.arena import Arena, to_device_of
from lorafuse.arithmetic.dequantize import NARROW

_E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)  # and the same again with the sign, which is the highest bit


def e4m3(codes: torch.Tensor, values: torch.Tensor, arena: Arena) -> None:
    """values (fp32, as many) = the numbers that codes (uint8, 1-D) are."""
    # Shifted by 7, sign, exponent and mantissa lie where fp16 has them, with a bias that is greater by 8.
    # torch's own conversion takes 13 times as long (bench/speed has the figures of this).
    halves = arena.get(NARROW, codes.numel(), torch.int16)
    halves.copy_(codes.view(torch.int8)).bitwise_left_shift_(7).bitwise_and_(-0x4001)
    values.copy_(halves.view(torch.float16)).mul_(256)
    # No other number is as large: NaN has become 480. The host looks first, which a device would wait for.
    if not arena.on_host or (values.numel() and max(values.aminmax(), key=abs).abs() > 448):
        values.masked_fill_(values.abs() > 448, torch.nan)


def decode_float8(codes: torch.Tensor, dtype: torch.dtype, values: torch.Tensor, arena: Arena) -> None:
    """values (fp32, as many) = the numbers of a float8 dtype that codes (uint8, 1-D) are."""
    if dtype == torch.float8_e4m3fn:
        e4m3(codes, values, arena)
    else:
        values.copy_(codes.view(dtype))


@cache
def _powers() -> torch.Tensor:
    powers = torch.arange(256, dtype=torch.int32, device="cpu").bitwise_left_shift_(23).view(torch.float32)
    powers[0], powers[255] = 2.0**-127, torch.nan
    return powers


def e8m0(codes: torch.Tensor) -> torch.Tensor:
    """float32, the powers of two that codes (uint8) are, in their shape."""
    powers = to_device_of(codes, _powers())
    return powers.index_select(0, codes.reshape(-1).int()).view(codes.shape)


@cache
def e2m1_values() -> torch.Tensor:
    """float32 [16]: the numbers of 4 bits by their codes; code 8 is −0."""
    half = torch.tensor(_E2M1, dtype=torch.float32, device="cpu")
    return torch.cat([half, -half])


@cache
def e2m1_pairs() -> torch.Tensor:
    """float64 [256], for `look_up`: the two numbers of each byte, that of the low half first."""
    byte, values = torch.arange(256, dtype=torch.int64, device="cpu"), e2m1_values()
    return torch.stack([values[byte & 15], values[byte >> 4]], dim=1).view(torch.float64).view(-1)
