"""The filters of orthogonal wavelets, computed: Daubechies' and symlets.

Both are spectral factors of the same polynomial (I. Daubechies, Ten Lectures on Wavelets, 6.1 and 8.1):
Daubechies' has all its zeros inside the unit circle, a symlet some of them outside, which makes it nearly
symmetric. Symlets are published in one of several equivalent forms; those of PyWavelets, which PEFT 0.21 has
copied, are named here by which zeros lie outside. They agree to 1e-11.
"""

import math
from typing import Any

import numpy as np
import torch

# Order → zeros outside the unit circle as bits, the lowest for the zero (pair) from the root with the least
# real part; and whether the filter is reversed.
_SYMLETS = {
    2: (0b0, False),
    3: (0b1, True),
    4: (0b01, True),
    5: (0b01, False),
    6: (0b101, False),
    7: (0b001, False),
    8: (0b1010, False),
    9: (0b1001, True),
    10: (0b01010, True),
}
FAMILIES = tuple(f"db{n}" for n in range(1, 11)) + tuple(f"sym{n}" for n in _SYMLETS)


def reconstruction_filters(family: str) -> torch.Tensor:
    """float64 [2, 2 · order]: low pass and high pass."""
    if family.startswith("sym"):
        order = int(family.removeprefix("sym"))
        outside, turned = _SYMLETS[order]
        low = _factor(order, outside)[:: -1 if turned else 1]
    else:
        low = _factor(int(family.removeprefix("db")), 0)
    signs = np.resize([1.0, -1.0], len(low))
    return torch.from_numpy(np.stack([low, signs * low[::-1]]))


def _factor(order: int, outside: int) -> "np.ndarray[Any, np.dtype[np.float64]]":
    """The low-pass filter of that order (of vanishing moments), whose coefficients sum to √2."""
    low: Any = np.array([1.0])
    for i, zero in enumerate(_zeros(order)):
        z = 1 / zero if outside >> i & 1 else zero
        low = np.convolve(low, [1, -z.real] if z.imag == 0 else [1, -2 * z.real, abs(z) ** 2])
    for _ in range(order):
        low = np.convolve(low, [1.0, 1.0])
    scaled: np.ndarray[Any, np.dtype[np.float64]] = low * (math.sqrt(2) / low.sum())
    return scaled


def _zeros(order: int) -> list[complex]:
    """Zeros inside the unit circle, one of each conjugate pair: (2 − z − 1/z) / 4 is a root of Σ_k
    binom(order − 1 + k, k) yᵏ."""
    polynomial = np.polynomial.Polynomial([math.comb(order - 1 + k, k) for k in range(order)])
    zeros = []
    roots = polynomial.roots().astype(complex)
    for _ in range(3):  # Newton, since roots() loses digits
        roots -= polynomial(roots) / polynomial.deriv()(roots)
    for root in sorted(roots, key=lambda root: float(root.real)):
        if root.imag < -1e-9:
            continue
        half = 1 - 2 * root
        z = half + np.sqrt(half * half - 1 + 0j)
        z = z if abs(z) < 1 else 1 / z
        zeros.append(complex(z.real, 0 if abs(root.imag) < 1e-9 else z.imag))
    return zeros
