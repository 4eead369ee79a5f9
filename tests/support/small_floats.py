"""Numbers of 8, 6 and 4 bits, by their definitions, in Python floats: the judge of what is decoded."""

import torch

NAN = float("nan")


def e4m3(code: int) -> float:
    """OCP 8-bit floating point, E4M3: bias 7, no infinities, all ones are NaN."""
    sign, exponent, mantissa = -1.0 if code & 128 else 1.0, code >> 3 & 15, code & 7
    if code & 127 == 127:
        return NAN
    if exponent == 0:
        return sign * mantissa / 8 * 2.0**-6
    return sign * (1 + mantissa / 8) * 2.0 ** (exponent - 7)


def e2m1(code: int) -> float:
    """OCP 4-bit floating point, E2M1: bias 1, sign in the highest bit."""
    sign, exponent, mantissa = -1.0 if code & 8 else 1.0, code >> 1 & 3, code & 1
    return sign * (mantissa / 2 if exponent == 0 else (1 + mantissa / 2) * 2.0 ** (exponent - 1))


def e2m3(code: int) -> float:
    """OCP 6-bit floating point, E2M3: bias 1, sign in the highest bit."""
    sign, exponent, mantissa = -1.0 if code & 32 else 1.0, code >> 3 & 3, code & 7
    return sign * (mantissa / 8 if exponent == 0 else (1 + mantissa / 8) * 2.0 ** (exponent - 1))


def e8m0(code: int) -> float:
    """A power of two; 255 is NaN."""
    return NAN if code == 255 else 2.0 ** (code - 127)


E4M3 = torch.tensor([e4m3(code) for code in range(256)], dtype=torch.float64)
E2M1 = torch.tensor([e2m1(code) for code in range(16)], dtype=torch.float64)
E2M3 = torch.tensor([e2m3(code) for code in range(64)], dtype=torch.float64)
E8M0 = torch.tensor([e8m0(code) for code in range(256)], dtype=torch.float64)


def of_codes(table: torch.Tensor, codes: torch.Tensor) -> torch.Tensor:
    """float64: what each code (uint8) stands for."""
    return table[codes.long()]


def same_bits(made: torch.Tensor, expected: torch.Tensor) -> bool:
    """Equal dtype, shape and bits; any NaN equals any other."""
    if made.dtype != expected.dtype or made.shape != expected.shape:
        return False
    ints = {2: torch.int16, 4: torch.int32}[made.dtype.itemsize]
    numbers = ~(made.isnan() & expected.isnan())
    return torch.equal(made.contiguous().view(ints)[numbers], expected.contiguous().view(ints)[numbers])
