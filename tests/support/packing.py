"""Whole numbers in words of 32 bits, packed by the definition, in Python's integers."""

import torch


def signed(word: int) -> int:
    return word - (1 << 32) if word >> 31 else word


def stream(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """int32 [rows, words]: each row of codes one after another, the lowest bits first."""
    rows = []
    for row in codes.tolist():
        number = sum(code << (place * bits) for place, code in enumerate(row))
        n_words = -(-len(row) * bits // 32)
        rows.append([signed(number >> (32 * word) & 0xFFFFFFFF) for word in range(n_words)])
    return torch.tensor(rows, dtype=torch.int32).view(len(codes), -1)


def extreme(shape: tuple[int, ...], dtype: torch.dtype, size: str) -> torch.Tensor:
    """Scales of both signs: ordinary, subnormal, or such that products overflow."""
    limits = torch.finfo(dtype)
    factor = {"ordinary": 0.01, "tiny": limits.tiny / 8, "huge": limits.max / 16}[size]
    return ((torch.rand(shape) + 0.5) * factor * torch.where(torch.rand(shape) < 0.2, -1.0, 1.0)).to(dtype)


SIZES = ["ordinary", "tiny", "huge"]
