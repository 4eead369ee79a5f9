"""Random numbers that are a function of a weight's name and an element's index alone, so that the bytes of a
result are the same on every machine, with any threads, tiles and device.

A number u of [0, 1) has 61 bits: u = (byte + fraction) / 256. With s the SHA-256 of the weight's name in
UTF-8, s0 and s1 its first two little-endian 64-bit words, and mix the finalizer of SplitMix64 (Steele, Lea,
Flood: Fast splittable pseudorandom number generators, 2014), for element i of the weight,

    byte     = byte i mod 8 (the lowest first) of mix(s0 + (i // 8 + 1) · γ)
    fraction = mix(s1 + (i + 1) · γ) // 2^11 / 2^53               γ = 0x9E3779B97F4A7C15, modulo 2^64

Most decisions need the byte alone, which is cheap; the fraction is computed where the byte does not decide.
"""

import hashlib
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from lorafuse.arithmetic.arena import Arena
from lorafuse.arithmetic.compiled import Seeded

GAMMA = 0x9E3779B97F4A7C15
_FACTORS = ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB))


class TileDraws(Protocol):
    """The numbers u of the elements of a tile, which are given as indexes into it."""

    def bytes(self, start: int, stop: int, arena: Arena) -> torch.Tensor:
        """uint8 [stop - start]: the byte of each of these elements, on the arena's device; valid until the
        arena's next use."""

    def fractions(self, elements: torch.Tensor) -> torch.Tensor:
        """float64, in [0, 1): the fraction of each element, given as int64."""

    def seeded(self) -> Seeded:
        """What the compiled kernel makes the same numbers of."""


class Draws:
    """The numbers of one weight."""

    __slots__ = ("seeds",)

    def __init__(self, weight: str) -> None:
        digest = hashlib.sha256(weight.encode("utf-8", "surrogatepass")).digest()
        self.seeds = int.from_bytes(digest[:8], "little"), int.from_bytes(digest[8:16], "little")

    def bytes(self, start: int, stop: int, arena: Arena) -> torch.Tensor:
        """As of a tile, the elements being those of the weight."""
        first, last = start // 8, -(-stop // 8)
        z, scratch = (arena.get(f"draws.{name}", last - first, torch.int64) for name in ("words", "scratch"))
        torch.arange(first + 1, last + 1, out=z)
        _mixed(z, self.seeds[0], scratch)
        return z.view(torch.uint8)[start - 8 * first : stop - 8 * first]

    def fractions(self, elements: torch.Tensor) -> torch.Tensor:
        """As of a tile, the elements being those of the weight."""
        z = elements + 1
        _mixed(z, self.seeds[1], torch.empty_like(z))
        return z.bitwise_right_shift_(11).bitwise_and_((1 << 53) - 1).to(torch.float64).mul_(2.0**-53)


class RunDraws(TileDraws):
    """Of a tile whose elements are those of a weight from `first` on."""

    def __init__(self, of_weight: Draws, first: int) -> None:
        self._of_weight, self._first = of_weight, first

    def bytes(self, start: int, stop: int, arena: Arena) -> torch.Tensor:
        return self._of_weight.bytes(self._first + start, self._first + stop, arena)

    def fractions(self, elements: torch.Tensor) -> torch.Tensor:
        return self._of_weight.fractions(elements + self._first)

    def seeded(self) -> Seeded:
        return Seeded(self._of_weight.seeds, self._first)


class TurnedDraws(TileDraws):
    """Of a tile that is the transpose of the rows [n_rows, n_cols] of a weight from element `first` on."""

    def __init__(self, of_weight: Draws, first: int, n_rows: int, n_cols: int, arena: Arena) -> None:
        self._of_weight, self._first, self._n_rows, self._n_cols = of_weight, first, n_rows, n_cols
        drawn = of_weight.bytes(first, first + n_rows * n_cols, arena).view(n_rows, n_cols)
        self._bytes = arena.get("draws.turned", drawn.numel(), torch.uint8)
        self._bytes.view(n_cols, n_rows).copy_(drawn.T)

    def bytes(self, start: int, stop: int, arena: Arena) -> torch.Tensor:
        return self._bytes[start:stop]

    def fractions(self, elements: torch.Tensor) -> torch.Tensor:
        row, col = elements % self._n_rows, elements.div(self._n_rows, rounding_mode="floor")
        return self._of_weight.fractions(row.mul_(self._n_cols).add_(col).add_(self._first))

    def seeded(self) -> Seeded:
        return Seeded(self._of_weight.seeds, self._first, self._n_rows, self._n_cols, self._bytes)


class HalfDraws(TileDraws):
    """u = 1/2 for all: to the nearest."""

    def bytes(self, start: int, stop: int, arena: Arena) -> torch.Tensor:
        return arena.get("draws.half", stop - start, torch.uint8).fill_(128)

    def fractions(self, elements: torch.Tensor) -> torch.Tensor:
        return torch.zeros(len(elements), dtype=torch.float64, device=elements.device)

    def seeded(self) -> Seeded:
        return Seeded()


def of_run(of_weight: Draws | None, first: int) -> TileDraws:
    """Of a tile whose elements are those of the weight from `first` on; without draws to the nearest."""
    return RunDraws(of_weight, first) if of_weight else HalfDraws()


def _mixed(z: torch.Tensor, seed: int, scratch: torch.Tensor) -> None:
    """Makes mix(seed + γ z) of `z`, int64, in place; `scratch` is like it."""
    if z.device.type == "cpu":
        _mixed_by_numpy(z.numpy().view(np.uint64), seed, scratch.numpy().view(np.uint64))
        return
    z.mul_(_signed(GAMMA)).add_(_signed(seed))
    for shift, factor in (*_FACTORS, (31, 1)):
        # The shift is that of unsigned integers.
        torch.bitwise_right_shift(z, shift, out=scratch)
        z.bitwise_xor_(scratch.bitwise_and_((1 << (64 - shift)) - 1)).mul_(_signed(factor))


def _mixed_by_numpy(z: NDArray[np.uint64], seed: int, scratch: NDArray[np.uint64]) -> None:
    """The same, in half the time."""
    z *= np.uint64(GAMMA)
    z += np.uint64(seed)
    for shift, factor in _FACTORS:
        np.right_shift(z, np.uint64(shift), out=scratch)
        z ^= scratch
        z *= np.uint64(factor)
    np.right_shift(z, np.uint64(31), out=scratch)
    z ^= scratch


def _signed(word: int) -> int:
    """torch has no arithmetic for unsigned 64-bit integers; that of signed ones is the same modulo 2^64."""
    return (word + 2**63) % 2**64 - 2**63
