"""Whether values lie in the cells of a quantized weight: whether quantizing them again, with its own scales,
would give its codes.

The full-precision weight that was quantized does, and with an update added it does once the update is taken
off. Noise of the same size does not: a fifth of it leaves its cell.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from lorafuse.arithmetic.quantize import midpoints
from lorafuse.codecs import Scheme

INT8_LEVELS = 127
FOUR_BIT = ("nf4", "fp4")


@dataclass
class Cells:
    """The cells of one weight W, in blocks of consecutive elements (of int8: in rows of `n_cols`), whose
    largest element is the scale of each. Counts elements of whole blocks: in S − Δ, and in S."""

    scheme: Scheme
    n_cols: int
    n_seen: int = 0
    n_merged: int = 0  # S − Δ is in the cell of W
    n_untouched: int = 0  # S is

    def add(self, start: int, w: torch.Tensor, delta: torch.Tensor, values: torch.Tensor) -> None:
        """Elements from `start` on, 1-D fp32: W, Δ and S."""
        block = self.scheme.blocksize if self.scheme.kind in FOUR_BIT else self.n_cols
        first = -start % block
        last = first + (w.numel() - first) // block * block
        if last <= first:
            return
        base, merged, untouched = (x[first:last].view(-1, block).numpy() for x in (w, values - delta, values))
        scales = np.abs(base).max(axis=1, keepdims=True)
        scales[scales == 0] = 1
        codes = self._codes(base / scales)
        self.n_seen += base.size
        self.n_merged += int((self._codes(merged / scales) == codes).sum())
        self.n_untouched += int((self._codes(untouched / scales) == codes).sum())

    def _codes(self, scaled: NDArray[np.float32]) -> NDArray[Any]:
        if self.scheme.kind in FOUR_BIT:
            return np.searchsorted(midpoints(self.scheme.kind), scaled)
        return np.rint(scaled * INT8_LEVELS)


def cells_of(scheme: Scheme, shape: tuple[int, ...]) -> Cells | None:
    """The cells of a weight that is stored quantized; None for others."""
    quantized = (scheme.kind in FOUR_BIT and scheme.blocksize) or scheme.kind == "int8"
    return Cells(scheme, shape[-1]) if quantized and len(shape) == 2 else None
