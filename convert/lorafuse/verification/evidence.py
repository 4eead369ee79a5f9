"""What is seen of one weight that another tool merged: sums over its elements, a chunk at a time.

S is what is stored, W the base, V = W + Δ in fp32. V_m = W + m·Δ is what a merge at m times the right scale
makes, X_m is V_m rounded once. Sums are float64. A chunk in which S is X_1 to the bit adds to the measures
alone: nothing else is to be learnt from it, and it is what a right merge consists of.
"""

import math
from dataclasses import dataclass, field, fields
from typing import Any

import torch

from lorafuse.arithmetic.arena import Arena
from lorafuse.arithmetic.measure import Measures, measure_tile
from lorafuse.verification.cells import Cells

# Multiples of the update for which X_m is compared with S element by element.
MULTIPLES = (1.0, 0.0, 2.0, 0.5, -1.0)
# The largest error of a value that was rounded to bfloat16 is 2⁻⁸ of it. A merge in 16 bits rounds the base,
# the update and the sum.
THREE_ROUNDINGS = 3 * 2.0**-8
# Elements of an update that is computed in bfloat16 are wrong by shares of the rows and columns that they
# come from, which may be larger than themselves.
UPDATE_ERROR, ROW_ERROR = 2.0**-4, 2.0**-2
FLOAT16_STEP = 2.0**-24  # of its smallest numbers
# The same for fp32, whose sums depend on their order.
FLOAT32_ERROR, FLOAT32_UPDATE_ERROR = 2.0**-21, 2.0**-18


@dataclass
class Multiple:
    """What tells whether S is V_m. `n_off`: elements with S ≠ X_m, in fp32 beyond what the order of sums
    explains; `off_sq`: ‖S − X_m‖²; `along`:
    ⟨X_m − W, Δ⟩; `residual_sq`: ‖S − V_m‖²; `n_far`: elements that three roundings to 16 bits do not
    explain."""

    n_off: int = 0
    off_sq: float = 0.0
    along: float = 0.0
    residual_sq: float = 0.0
    n_far: int = 0


@dataclass
class Evidence:
    """All that a verdict needs. `measures` are of all elements; the rest, from `numel` on, of the chunks that
    are not exactly X_1."""

    measures: Measures = field(default_factory=Measures)
    n_not_finite: int = 0
    n_told: int = 0  # elements that are X_1 and not X_0, in chunks that are exactly X_1
    numel: int = 0
    base_sq: float = 0.0
    delta_sq: float = 0.0
    stored_sq: float = 0.0
    along: float = 0.0  # ⟨S − W, Δ⟩
    along_16: float = 0.0  # ⟨Y − W, Δ⟩, where Y is V with base and update rounded as S is before the sum
    along_near: float = 0.0  # ⟨S' − W, Δ⟩, where S' is S, but X_1 in elements that are far from V
    near_sq: float = 0.0  # ‖S' − V‖²
    off_near_sq: float = 0.0  # ‖S' − X_1‖²
    n_neither: int = 0  # elements that are neither X_1 nor X_0
    grid_sq: float = 0.0  # ‖Q(S) − S‖² for the quantizer of the base
    multiples: dict[float, Multiple] = field(default_factory=lambda: {m: Multiple() for m in MULTIPLES})
    cells: Cells | None = None

    def add(self, w: torch.Tensor, v: torch.Tensor, s: torch.Tensor, arena: Arena) -> bool:
        """One chunk, 1-D: `w` and `v` fp32, `s` as it is stored. Overwrites `v`. Returns whether the chunk
        was looked at closely."""
        rounded = v.to(s.dtype)
        exact = bool(torch.equal(rounded, s))
        if exact:
            self.n_told += int((w.to(s.dtype) != s).sum())
        else:
            self._look(w.double(), v.double(), s, rounded)
        self.n_not_finite += int((~s.isfinite() & ((s != rounded) | s.isnan())).sum())
        self.measures.add(measure_tile(w, v, s, arena))
        return not exact

    def add_all(self, other: "Evidence") -> None:
        """What was seen of further chunks."""
        self.measures.add(other.measures)
        for m, sums in self.multiples.items():
            _add_sums(sums, other.multiples[m])
        if self.cells and other.cells:
            _add_sums(self.cells, other.cells)
        _add_sums(self, other)

    def _look(self, w: torch.Tensor, v: torch.Tensor, s: torch.Tensor, rounded: torch.Tensor) -> None:
        """`w` and `v` float64, `rounded` X_1."""
        delta, values = v - w, s.double()
        row_error = ROW_ERROR * math.sqrt(_sq(delta) / max(delta.numel(), 1))
        update_error = (UPDATE_ERROR * delta.abs()).add_(row_error)
        self.numel += s.numel()
        self.base_sq += _sq(w)
        self.delta_sq += _sq(delta)
        self.stored_sq += _sq(values)
        self.along += _dot(values - w, delta)
        narrow = _narrowest(s)
        in_16_bits = (w.to(narrow) + delta.to(narrow)).double() if narrow != torch.float32 else v
        self.along_16 += _dot(in_16_bits - w, delta)
        off_1 = self._multiple(1.0, w, delta, s, update_error)
        off_0 = self._multiple(0.0, w, delta, s, update_error)
        for m in MULTIPLES[2:]:
            self._multiple(m, w, delta, s, update_error)
        self.n_neither += int((off_1 & off_0).sum())
        distance = (values - v).abs()
        largest = torch.maximum(w.abs(), v.abs())
        far = ~(distance <= largest * THREE_ROUNDINGS + update_error + FLOAT16_STEP)
        near = torch.where(far, rounded.double(), values)
        self.along_near += _dot(near - w, delta)
        self.near_sq += _sq(near - v)
        self.off_near_sq += _sq(near - rounded.double())

    def _multiple(
        self, m: float, w: torch.Tensor, delta: torch.Tensor, s: torch.Tensor, update_error: torch.Tensor
    ) -> torch.Tensor:
        """bool [n]: where S is not X_m."""
        made, sums, values = w + m * delta, self.multiples[m], s.double()
        rounded = made.float().to(s.dtype)
        if s.dtype == torch.float32:
            allowed = torch.maximum(w.abs(), made.abs()).mul_(FLOAT32_ERROR)
            off = ~((values - made).abs() <= allowed + abs(m) * FLOAT32_UPDATE_ERROR * update_error)
        else:
            off = rounded != s
        sums.n_off += int(off.sum())
        sums.off_sq += _sq(values - rounded.double())
        sums.along += _dot(rounded.double() - w, delta)
        sums.residual_sq += _sq(values - made)
        allowed = torch.maximum(w.abs(), made.abs()).mul_(THREE_ROUNDINGS).add_(FLOAT16_STEP)
        sums.n_far += int((~((values - made).abs() <= allowed + abs(m) * update_error)).sum())
        return off


def _add_sums(sums: Any, others: Any) -> None:
    """Adds up the fields of two dataclasses that are sums."""
    for field_ in fields(sums):
        value = getattr(sums, field_.name)
        if field_.name != "n_cols" and isinstance(value, int | float):
            setattr(sums, field_.name, value + getattr(others, field_.name))


def _narrowest(s: torch.Tensor) -> torch.dtype:
    """The narrowest dtype that holds these values as they are: a merge in 16 bits may be saved in 32."""
    return next(
        (dtype for dtype in (torch.bfloat16, torch.float16) if torch.equal(s.to(dtype).float(), s.float())),
        torch.float32,
    )


def _sq(x: torch.Tensor) -> float:
    return float(torch.dot(x, x))


def _dot(a: torch.Tensor, b: torch.Tensor) -> float:
    return float(torch.dot(a, b))
