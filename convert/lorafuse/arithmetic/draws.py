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

import torch

from lorafuse.arithmetic.arena import Arena


def _signed(word: int) -> int:
    """torch has no arithmetic for unsigned 64-bit integers; that of signed ones is the same modulo 2^64."""
    return (word + 2**63) % 2**64 - 2**63


GAMMA = _signed(0x9E3779B97F4A7C15)
_FACTORS = ((30, _signed(0xBF58476D1CE4E5B9)), (27, _signed(0x94D049BB133111EB)))


def _mix(z: torch.Tensor, scratch: torch.Tensor) -> torch.Tensor:
    """The finalizer, in place; `scratch` is like `z`, int64."""
    for shift, factor in _FACTORS:
        _xor_shifted(z, shift, scratch)
        z.mul_(factor)
    return _xor_shifted(z, 31, scratch)


def _xor_shifted(z: torch.Tensor, shift: int, scratch: torch.Tensor) -> torch.Tensor:
    """z ^= z >> shift, the shift being that of unsigned integers."""
    torch.bitwise_right_shift(z, shift, out=scratch)
    return z.bitwise_xor_(scratch.bitwise_and_((1 << (64 - shift)) - 1))


class Draws:
    """The numbers u of one weight."""

    __slots__ = ("_seeds",)

    def __init__(self, weight: str) -> None:
        digest = hashlib.sha256(weight.encode("utf-8", "surrogatepass")).digest()
        self._seeds = tuple(_signed(int.from_bytes(digest[at : at + 8], "little")) for at in (0, 8))

    def bytes(self, start: int, stop: int, arena: Arena) -> torch.Tensor:
        """uint8 [stop - start]: the byte of each element, on the arena's device; valid until the arena's next
        use."""
        first, last = start // 8, -(-stop // 8)
        z, scratch = (arena.get(f"draws.{name}", last - first, torch.int64) for name in ("words", "scratch"))
        torch.arange(first + 1, last + 1, out=z)
        _mix(z.mul_(GAMMA).add_(self._seeds[0]), scratch)
        return z.view(torch.uint8)[start - 8 * first : stop - 8 * first]

    def fractions(self, elements: torch.Tensor) -> torch.Tensor:
        """float64, in [0, 1): the fraction of each element, given as int64."""
        z = (elements + 1).mul_(GAMMA).add_(self._seeds[1])
        top = _mix(z, torch.empty_like(z)).bitwise_right_shift_(11).bitwise_and_((1 << 53) - 1)
        return top.to(torch.float64).mul_(2.0**-53)
