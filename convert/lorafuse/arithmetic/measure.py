"""How much of an update the stored weight kept: sums over tiles, taken while the tile is in cache.

With W the base, Δ the update, V = W + Δ in fp32 and S the stored value: delta_norm = ‖Δ‖, delta_rel = ‖Δ‖ /
‖W‖, kept = ⟨S−W, Δ⟩ / ⟨Δ, Δ⟩ = 1 + ⟨S−V, Δ⟩ / ⟨Δ, Δ⟩, noise = ‖S−V‖ / ‖Δ‖, changed = share of elements with S
≠ W, clipped = share of elements beyond the largest value that a quantized weight's codes stand for. Sums
within a chunk are fp32, across chunks float64. Δ is taken as V − W, so what fp32 itself rounds away
is below the resolution (noise of a float32 output is 0).

On a device nothing waits for a tile's sums: they stay there until the weight is finished. There, products are
rounded to fp32 and added up in float64, so that sums differ from the CPU's in the seventh digit.
"""

import math
from dataclasses import dataclass

import numpy as np
import torch

from lorafuse.arithmetic import compiled, lanes
from lorafuse.arithmetic.arena import Arena

# Elements that are measured at once: their buffers fit the cache, and leave the tile's own there.
CHUNK_NUMEL = 1 << 17
NBYTES_PER_ELEMENT = 9  # of a chunk: W and S in fp32, and a flag


# What a device adds up, in this order, in a tensor float64 [7]; numbers of elements are exact up to 2^53.
_THERE = ("base_sq", "delta_sq", "residual_sq", "residual_delta", "n_changed", "n_broken", "n_broken_base")


_NOTHING: tuple[torch.Tensor, ...] = ()


@dataclass
class Measures:
    """Sums over the elements seen so far. `there`: those of tiles that are on a device, and not in the others
    before `settle`."""

    there = _NOTHING  # no field: what is recorded is settled

    numel: int = 0
    base_sq: float = 0.0
    delta_sq: float = 0.0
    residual_sq: float = 0.0
    residual_delta: float = 0.0
    n_changed: int = 0
    n_clipped: int = 0
    n_broken: int = 0  # elements that are not finite although the base's are
    n_broken_base: int = 0  # elements that are not finite, nor the base's

    def settle(self) -> None:
        """Fetches what is on a device, once for all tiles of a weight, which are done; adds it up in their
        order."""
        if not self.there:
            return
        for sums in torch.stack(self.there).tolist():
            for name, value in zip(_THERE, sums, strict=True):
                kind = int if name.startswith("n_") else float
                setattr(self, name, getattr(self, name) + kind(value))
        self.there = ()

    def add(self, other: "Measures") -> None:
        for name in self.__dataclass_fields__:
            setattr(self, name, getattr(self, name) + getattr(other, name))
        if other.there:
            self.there += other.there

    def summary(self) -> dict[str, float | None]:
        """delta_norm, delta_rel, kept, noise, changed; None where a ratio has no meaning (no update, or
        non-finite input)."""
        kept = noise = None
        if self.delta_sq > 0:
            kept, noise = 1 + self.residual_delta / self.delta_sq, math.sqrt(self.residual_sq / self.delta_sq)
        figures = {
            "delta_norm": math.sqrt(self.delta_sq),
            "delta_rel": math.sqrt(self.delta_sq / self.base_sq) if self.base_sq else None,
            "kept": kept,
            "noise": noise,
            "changed": self.n_changed / self.numel,
        }
        return {
            name: value if value is not None and math.isfinite(value) else None
            for name, value in figures.items()
        }


def _count_different(a: torch.Tensor, b: torch.Tensor, arena: Arena) -> int:
    # numpy rather than torch on the CPU: a fifth of the time (torch's comparison and count are not
    # vectorized).
    flags = arena.get("measure.flags", a.numel(), torch.bool).numpy()
    np.not_equal(a.numpy(), b.numpy(), out=flags)
    return int(np.count_nonzero(flags))


def measure_tile(base: torch.Tensor, total: torch.Tensor, stored: torch.Tensor, arena: Arena) -> Measures:
    """Sums of one tile: `base` W in its own dtype, `total` V fp32, `stored` S in the output's dtype, all 1-D.

    Overwrites `total`.
    """
    if arena.kernel:
        return of_sums(compiled.measure_tile(arena.kernel, base, total, stored), base, stored)
    if not arena.on_host:
        return _measured_there(base, total, stored)
    measures = Measures()
    for start in range(0, total.numel(), CHUNK_NUMEL):
        chunk = slice(start, start + CHUNK_NUMEL)
        measures.add(_measure_chunk(base[chunk], total[chunk], stored[chunk], arena))
    return measures


def store_tile(
    base: torch.Tensor, total: torch.Tensor, stored: torch.Tensor, arena: Arena
) -> Measures | None:
    """The one rounding, to nearest even: `stored` becomes `total` (fp32), all 1-D. Returns the sums of
    measure_tile where one pass did both."""
    if arena.kernel and (sums := compiled.store_tile(arena.kernel, base, total, stored)):
        return of_sums(sums, base, stored)
    stored.copy_(total)
    return None


def of_sums(sums: compiled.Sums, base: torch.Tensor, stored: torch.Tensor) -> Measures:
    """What the compiled kernel summed."""
    measures = Measures(
        numel=base.numel(),
        base_sq=sums.base_sq,
        delta_sq=sums.delta_sq,
        residual_sq=sums.residual_sq,
        residual_delta=sums.residual_delta,
        n_changed=sums.n_changed,
    )
    if not math.isfinite(measures.residual_sq):
        measures.add(count_broken(base, stored))
    return measures


def _measure_chunk(base: torch.Tensor, total: torch.Tensor, stored: torch.Tensor, arena: Arena) -> Measures:
    numel = total.numel()
    w = base if base.dtype == torch.float32 else arena.get("measure.w", numel, torch.float32).copy_(base)
    s = arena.get("measure.s", numel, torch.float32).copy_(stored)
    n_changed = _count_different(s, w, arena)
    residual = s.sub_(total)
    delta = total.sub_(w)
    measures = Measures(
        numel=numel,
        base_sq=float(torch.dot(w, w)),
        delta_sq=float(torch.dot(delta, delta)),
        residual_sq=float(torch.dot(residual, residual)),
        residual_delta=float(torch.dot(residual, delta)),
        n_changed=n_changed,
    )
    if not math.isfinite(measures.residual_sq):
        measures.add(count_broken(w, stored))
    return measures


def count_broken(base: torch.Tensor, stored: torch.Tensor) -> Measures:
    """Only the numbers of elements that are not finite in `stored`."""
    broken, finite = ~stored.isfinite(), base.isfinite()
    return Measures(n_broken=int((broken & finite).sum()), n_broken_base=int((broken & ~finite).sum()))


def _measured_there(base: torch.Tensor, total: torch.Tensor, stored: torch.Tensor) -> Measures:
    """The sums of a tile on a device."""
    measures = Measures(numel=total.numel())
    for start in range(0, total.numel(), lanes.MEASURED_NUMEL):
        part = slice(start, start + lanes.MEASURED_NUMEL)
        measures.there += (_sums_there(base[part], total[part], stored[part]),)
    return measures


def _sums_there(base: torch.Tensor, total: torch.Tensor, stored: torch.Tensor) -> torch.Tensor:
    w = base.to(torch.float32)
    residual, delta = stored - total, total - w
    products = ((w, w), (delta, delta), (residual, residual), (residual, delta))
    sums = [(a * b).sum(dtype=torch.float64) for a, b in products]
    return torch.stack([*sums, _number(stored != w), *_broken_there(w, stored)])


def _number(flags: torch.Tensor) -> torch.Tensor:
    return flags.sum().to(torch.float64)


def _broken_there(base: torch.Tensor, stored: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    broken, finite = ~stored.isfinite(), base.isfinite()
    return _number(broken & finite), _number(broken & ~finite)


def count_broken_there(base: torch.Tensor, stored: torch.Tensor) -> Measures:
    """What `count_broken` returns, still on the device."""
    zeros = torch.zeros(len(_THERE) - 2, dtype=torch.float64, device=stored.device)
    measures = Measures()
    measures.there = (torch.cat([zeros, torch.stack(_broken_there(base, stored))]),)
    return measures
