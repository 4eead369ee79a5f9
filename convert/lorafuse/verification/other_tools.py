"""What another tool's merge did: how each weight of a directory relates to the base W and to W + Δ.

For people who hold a merged model and want to know what it lost. Nothing is written; one tile at a time is in
memory.
"""

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import torch

from lorafuse.arithmetic.measure import Measures, measure_tile
from lorafuse.arithmetic.torch_state import own_torch_state
from lorafuse.codecs import Arena, Sources, open_weights
from lorafuse.events import OnEvent
from lorafuse.files.checkpoint import Checkpoint
from lorafuse.files.tensors import FLOATS
from lorafuse.merge.tile import patched
from lorafuse.patches.patch import Base
from lorafuse.planning.plan import Plan, Step
from lorafuse.settings import BaseQuant
from lorafuse.trained_base.simulated import simulated
from lorafuse.verification.relations import EXPLAINED

# ‖Q(S) − S‖ / ‖S‖ of a weight that lies on a quantization grid is what rounding to 16 bits leaves, below
# 0.002; of others, that of quantizing a bell curve: 0.09 for 4 bits, 0.009 for int8.
ON_GRID = {"nf4": 0.01, "fp4": 0.01, "int8": 0.004}
HALF_PRECISION_EPS = 2.0**-7  # of bfloat16: the distance of neighbours, relative to the value
FEW = 1e-3  # share of elements that may differ by one rounding: sums of fp32 have an order


@dataclass
class Relation:
    """Sums over the tiles of one weight. S is what is stored, W the base, V = W + Δ in fp32; `rounded` is to
    S's dtype."""

    numel: int = 0
    off_v: int = 0  # elements with S ≠ rounded V
    off_w: int = 0  # elements with S ≠ rounded W
    far_from_v: int = 0  # elements further from V than two roundings to bfloat16
    grid_sq: float = 0.0  # ‖Q(S) − S‖² for the quantizer of the base
    stored_sq: float = 0.0
    measures: Measures = field(default_factory=Measures)

    def kind(self, stored_as: str, grid: BaseQuant | None) -> str:
        """A key of EXPLAINED. `stored_as` is the scheme of S, `grid` the quantizer behind grid_sq."""
        if self.off_v == 0:
            return "equal"
        if self.off_w == 0:
            return "untouched"
        if stored_as in ON_GRID or (grid and self.grid_sq < ON_GRID[grid.kind] ** 2 * self.stored_sq):
            return "requantized"
        if self.far_from_v == 0:
            return "equal" if self.off_v <= FEW * self.numel else "rounded twice"
        return "unrelated"

    def add(self, w: torch.Tensor, v: torch.Tensor, s: torch.Tensor, arena: Arena) -> None:
        """One tile, 1-D: `w` and `v` fp32, `s` as it is stored. Overwrites `v`."""
        values = s.float()
        self.numel += s.numel()
        self.off_v += int((v.to(s.dtype) != s).sum())
        self.off_w += int((w.to(s.dtype) != s).sum())
        self.far_from_v += int(
            ((values - v).abs() > HALF_PRECISION_EPS * torch.maximum(w.abs(), v.abs())).sum()
        )
        self.stored_sq += float(values.square().sum(dtype=torch.float64))
        self.measures.add(measure_tile(w, v, s, arena))


def relate(plan: Plan, found: Checkpoint, on_event: OnEvent) -> dict[str, Any]:
    """How the weights of `found` relate to a plan that writes float32. Returns "related" {name: relation, and
    of merged ones kept, noise, delta_rel}, worst first, and "relations", how many there are of each. Raises
    CheckpointError for `found`."""
    stored = open_weights(found)
    on_event({"event": "plan", "nbytes": plan.nbytes, "shards": []})
    arena, loader = Arena(torch.device("cpu")), Arena(torch.device("cpu"))
    weights: dict[str, dict[str, Any]] = {}
    with torch.inference_mode(), own_torch_state():
        for step in plan.steps:
            weights[step.name] = _relation(step, stored.get(step.name), arena, loader)
            on_event({"event": "progress", "nbytes": step.nbytes})
    order = list(EXPLAINED)
    worst_first = sorted(
        weights.items(), key=lambda item: (-order.index(item[1]["relation"]), item[1].get("kept") or 0.0)
    )
    counts = Counter(facts["relation"] for facts in weights.values())
    return {"related": dict(worst_first), "relations": {kind: counts[kind] for kind in order if counts[kind]}}


def _relation(step: Step, stored: Sources | None, arena: Arena, loader: Arena) -> dict[str, Any]:
    if stored is None or stored.spec.shape != step.spec.shape or stored.spec.dtype not in FLOATS:
        return {
            "relation": "equal"
            if stored is not None and _same_bytes(step, stored, arena, loader)
            else "missing"
        }
    relation, grid = Relation(), _grid(step, stored)
    on_grid = simulated(stored, grid, stored.spec.torch_name, transposed=False) if grid else stored
    for sources in (step.sources, on_grid):
        sources.prepare(loader)
    for patch in step.patches:
        patch.prepare(Base(step.sources, loader), loader)
    for start, stop in step.tiles():
        box = step.box(start, stop)
        w = step.sources.values(box, arena).float().clone()
        s = stored.values(box, arena).clone()
        v = patched(step, w, start, arena).clone()
        distance = on_grid.values(box, arena).float().sub_(s)
        relation.grid_sq += float(distance.square_().sum(dtype=torch.float64))
        relation.add(w, v, s, arena)
    for patch in step.patches:
        patch.release()
    for sources in (step.sources, on_grid):
        sources.release()
    facts: dict[str, Any] = {"relation": relation.kind(stored.scheme.kind, grid)}
    if step.patches:
        facts |= {
            name: value
            for name, value in relation.measures.summary().items()
            if name in ("kept", "noise", "delta_rel")
        }
    return facts


def _grid(step: Step, stored: Sources) -> BaseQuant | None:
    """The quantizer that a merge into this base may have used again: the base's own, else the usual one. None
    for a weight that is stored quantized, or that nobody quantizes."""
    if stored.scheme.kind != "dense" or len(stored.spec.shape) != 2:
        return None
    scheme = step.sources.scheme
    kind = scheme.kind if scheme.kind in ON_GRID else "nf4"
    # Scales that were quantized themselves are the largest values of their blocks, and are found again.
    return BaseQuant(kind=kind, double_quant=False, blocksize=scheme.blocksize or 64)


def _same_bytes(step: Step, stored: Sources, arena: Arena, loader: Arena) -> bool:
    """Of a weight that is no floating point, or whose shape differs."""
    if stored.spec != step.spec or step.patches:
        return False
    boxes = (step.box(*tile) for tile in step.tiles())
    return all(torch.equal(step.sources.values(box, arena), stored.values(box, loader)) for box in boxes)
