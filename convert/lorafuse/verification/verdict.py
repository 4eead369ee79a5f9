"""What the evidence says of one weight: which hypothesis fits, and how sure that is.

The share of the update that S holds, ⟨S − W, Δ⟩ / ⟨Δ, Δ⟩, is compared with the share that each hypothesis
leaves after rounding, within what chance can do to such a sum: the error of each element, independent of Δ,
makes ‖error‖ / (‖Δ‖ √n). So the size of the update decides, not a tolerance: one hundredth of a rounding
step shows in a sum over a million elements.
"""

import math
from typing import NamedTuple

import numpy as np

from lorafuse.settings import BaseQuant
from lorafuse.verification.evidence import Evidence

# ‖Q(S) − S‖ / ‖S‖ of a weight that lies on a quantization grid is what rounding to 16 bits leaves, below
# 0.002; of others, that of quantizing a bell curve: 0.09 for 4 bits, 0.009 for int8.
ON_GRID = {"nf4": 0.01, "fp4": 0.01, "int8": 0.004}
FEW = 1e-3  # share of elements that may differ by one rounding: sums of fp32 have an order
NEITHER = 0.02  # share of the elements without the update that may be no base either
FEW_FAR = 0.01  # share of elements that may be wrong in a weight that is called damaged
N_SIGMA, N_SIGMA_CERTAIN = 6.0, 30.0
BIAS = 0.03  # share of the update that a merge in 16 bits may lose or gain beside chance
# Root mean square of the errors of three roundings to bfloat16, per ‖value‖, and of an update that is
# computed in bfloat16 from factors that are, per ‖Δ‖. A rounding leaves 0.0016; a quarter is added to the
# first, as much again to the second.
ROUNDING_RMS, UPDATE_RMS = 0.0035, 0.0065
CHANCE_OF_SHARE = 0.08  # standard deviation of the share beyond which S on another base says nothing of Δ
IN_CELLS = 0.97  # share of elements, of the full-precision weight that was quantized
RELATED = 0.5  # ‖S − V‖ / ‖W‖ of another base that is a relative of this one


class Verdict(NamedTuple):
    """`relation` is a key of EXPLAINED; `sure` is certain or likely; `scale`: the multiple of the update."""

    relation: str
    sure: str = "certain"
    scale: float | None = None


def verdict(seen: Evidence, stored_as: str, grid: BaseQuant | None) -> Verdict:
    """`stored_as` is the scheme of S, `grid` the quantizer behind grid_sq."""
    if seen.n_not_finite:
        return Verdict("not finite")
    if seen.numel == 0:
        return Verdict("equal")
    if not seen.delta_sq:
        return _without_update(seen, stored_as, grid)
    return (
        _exact(seen)
        or _rounded(seen)
        or _in_places(seen)
        or _quantized_again(seen, stored_as, grid)
        or _nothing_of_it(seen)
        or _scaled(seen)
        or _on_another_base(seen)
        or Verdict("unrelated", "likely")
    )


def _few(n: int, seen: Evidence) -> bool:
    return n <= FEW * seen.numel


def _share(seen: Evidence) -> float:
    """Of the update, in S."""
    return seen.along / seen.delta_sq


def _chance(error_sq: float, seen: Evidence) -> float:
    """Standard deviation that errors of this size, which do not depend on Δ, give a share."""
    return math.sqrt(error_sq / (seen.delta_sq * seen.numel))


def _leaves(seen: Evidence, m: float) -> float:
    """The share that m·Δ leaves when it is added and the sum rounded once."""
    return seen.multiples[m].along / seen.delta_sq


def _has_share_of(seen: Evidence, m: float, share: float, off_sq: float) -> bool:
    """Whether S holds what m·Δ leaves, rounded once, or before it as well."""
    ideal = [_leaves(seen, m)] + ([seen.along_16 / seen.delta_sq] if m == 1 else [])
    slack = BIAS * max(map(abs, ideal)) + N_SIGMA * _chance(off_sq, seen)
    return min(ideal) - slack <= share <= max(ideal) + slack


def _within_rounding(seen: Evidence, residual_sq: float, m: float) -> bool:
    delta_sq = m**2 * seen.delta_sq
    return residual_sq <= ROUNDING_RMS**2 * (seen.base_sq + delta_sq) + UPDATE_RMS**2 * delta_sq


def _exact(seen: Evidence) -> Verdict | None:
    """Hypotheses that hold to the bit, but for the order of fp32 sums."""
    once, base = seen.multiples[1.0], seen.multiples[0.0]
    if base.n_off == 0 and once.n_off:
        return Verdict("partly merged" if seen.n_told else "untouched")
    has_all = _has_share_of(seen, 1.0, _share(seen), once.off_sq)
    if has_all and _few(once.n_off, seen) and once.n_far == 0:
        return Verdict("equal")
    if seen.n_told:
        return None
    for m in (0.0, 2.0, 0.5, -1.0):
        sums = seen.multiples[m]
        if _few(sums.n_off, seen) and sums.n_far == 0 and _has_share_of(seen, m, _share(seen), sums.off_sq):
            return _multiple(m, "certain")
    return None


def _multiple(m: float, sure: str) -> Verdict:
    if m == 0:
        return Verdict("untouched", sure)
    return Verdict("merged twice" if m == 2 else "wrong scale", sure, m)


def _rounded(seen: Evidence) -> Verdict | None:
    """Base + update, with errors that rounding explains."""
    once = seen.multiples[1.0]
    if once.n_far or not _within_rounding(seen, once.residual_sq, 1.0):
        return None
    if not _has_share_of(seen, 1.0, _share(seen), once.off_sq):
        return None
    base = seen.multiples[0.0]
    if _has_share_of(seen, 0.0, _share(seen), base.off_sq) and not base.n_far:
        return Verdict("unclear", "likely")
    return Verdict("rounded twice", _sure(seen, 1.0))


def _sure(seen: Evidence, m: float) -> str:
    """Whether the other multiples are far from what S holds."""
    others = [abs(_leaves(seen, other) - _share(seen)) for other in (0.0, 0.5, 1.0, 2.0) if other != m]
    chance = _chance(seen.multiples[m].off_sq, seen)
    return "certain" if min(others) >= N_SIGMA_CERTAIN * chance else "likely"


def _quantized_again(seen: Evidence, stored_as: str, grid: BaseQuant | None) -> Verdict | None:
    if stored_as in ON_GRID:
        return Verdict("requantized")
    if grid is None or not seen.grid_sq < ON_GRID[grid.kind] ** 2 * seen.stored_sq:
        return None
    # A weight near a grid need not be on it: small updates of a quantized base stay near.
    nearest_sq = min(sums.residual_sq for sums in seen.multiples.values())
    return Verdict("requantized") if seen.grid_sq < 0.25 * nearest_sq else None


def _nothing_of_it(seen: Evidence) -> Verdict | None:
    base = seen.multiples[0.0]
    fits = (
        not base.n_far
        and _within_rounding(seen, base.residual_sq, 0.0)
        and _has_share_of(seen, 0.0, _share(seen), base.off_sq)
    )
    return Verdict("untouched", _sure(seen, 0.0)) if fits and not seen.n_told else None


def _in_places(seen: Evidence) -> Verdict | None:
    """Base + update, but not everywhere."""
    once, base = seen.multiples[1.0], seen.multiples[0.0]
    mixed = _few(seen.n_neither, seen) and seen.n_neither <= NEITHER * once.n_off
    if mixed and (seen.n_told or not _few(base.n_off, seen)):
        return Verdict("partly merged", "certain" if once.n_far else "likely")
    near = (
        once.n_far <= FEW_FAR * (seen.measures.numel if seen.n_told else seen.numel)
        and _within_rounding(seen, seen.near_sq, 1.0)
        and _has_share_of(seen, 1.0, seen.along_near / seen.delta_sq, seen.off_near_sq)
    )
    return Verdict("damaged") if near and once.n_far else None


def _scaled(seen: Evidence) -> Verdict | None:
    """Base + a multiple of the update: the errors are those of rounding once the multiple is taken off."""
    share = _share(seen)
    known = sorted((_leaves(seen, m), m) for m in seen.multiples)
    shares, multiples = zip(*known, strict=True)
    if not shares[-1] > 0.05:
        return None
    m = float(np.interp(share, shares, multiples))
    m = m if shares[0] < share < shares[-1] else share * multiples[-1] / shares[-1]
    residual_sq = max(seen.multiples[0.0].residual_sq - share**2 * seen.delta_sq, 0.0)
    chance = _chance(residual_sq, seen)
    if not _within_rounding(seen, residual_sq, m) or abs(share - _leaves(seen, 1.0)) <= N_SIGMA * chance:
        return None
    sure = "certain" if chance * N_SIGMA_CERTAIN < 0.5 else "likely"
    twice = abs(share - _leaves(seen, 2.0)) <= BIAS * 2 + N_SIGMA * chance
    return _multiple(2.0, sure) if twice else Verdict("wrong scale", sure, m)


def _on_another_base(seen: Evidence) -> Verdict | None:
    """The errors do not depend on the update: something else was updated, or nothing was."""
    share, cells = _share(seen), seen.cells
    residual_sq = max(seen.multiples[0.0].residual_sq - share**2 * seen.delta_sq, 0.0)
    chance = _chance(residual_sq, seen)
    slack = BIAS + N_SIGMA * chance
    full = bool(cells and cells.n_seen and max(cells.n_merged, cells.n_untouched) >= IN_CELLS * cells.n_seen)
    if not full and residual_sq > RELATED**2 * seen.base_sq:
        return None
    sure = "certain" if full else "likely"
    if chance > CHANCE_OF_SHARE:
        return Verdict("other base, unclear", "likely")
    if abs(share - 1) <= slack:
        return Verdict("other base", sure)
    return Verdict("other base, untouched", sure) if abs(share) <= slack else None


def _without_update(seen: Evidence, stored_as: str, grid: BaseQuant | None) -> Verdict:
    """Of a weight that no update touches, as far as it was looked at: S should be W."""
    base, cells = seen.multiples[0.0], seen.cells
    if base.n_far == 0 and _few(base.n_off, seen):
        return Verdict("equal")
    if base.n_far == 0 and _within_rounding(seen, base.residual_sq, 0.0):
        return Verdict("rounded twice")
    again = _quantized_again(seen, stored_as, grid)
    if again:
        return again
    if base.n_far <= FEW_FAR * seen.measures.numel and _within_rounding(seen, seen.near_sq, 0.0):
        return Verdict("damaged")
    if cells and cells.n_seen and cells.n_untouched >= IN_CELLS * cells.n_seen:
        return Verdict("other base")
    related = base.residual_sq <= RELATED**2 * seen.base_sq
    return Verdict("other base" if related else "unrelated", "likely")
