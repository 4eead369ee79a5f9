"""What another tool's merge did: how each weight of a directory relates to the base W and to W + Δ.

For people who hold a merged model and want to know what it lost. Nothing is written: the loop that makes a
merge makes base + update in fp32, a tile at a time, for a destination that compares.
"""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from threading import Lock
from typing import Any

import torch

from lorafuse.arithmetic.measure import CHUNK_NUMEL
from lorafuse.codecs import Arena, Sources, open_weights
from lorafuse.events import OnEvent
from lorafuse.files.checkpoint import Checkpoint
from lorafuse.files.tensors import DTYPES, FLOATS, Box
from lorafuse.merge.destination import Outcome
from lorafuse.merge.loop import merge
from lorafuse.naming import Names
from lorafuse.planning.plan import Plan, Step
from lorafuse.settings import BaseQuant
from lorafuse.trained_base.simulated import simulated
from lorafuse.verification.cells import Cells, cells_of
from lorafuse.verification.evidence import Evidence
from lorafuse.verification.relations import EXPLAINED
from lorafuse.verification.verdict import ON_GRID, Verdict, verdict


class WeightCompared:
    """A weight of the plan beside the one that is stored under its name. `base`: W; another weight than the
    step's where the adapter holds one whole."""

    def __init__(self, step: Step, stored: Sources, base: Sources) -> None:
        self.step, self.stored, self.base = step, stored, base
        self.evidence = Evidence(cells=self._cells())
        self.n_different = 0  # bytes, of a weight that is no floating point
        self._grid = _grid(step, stored)
        self._on_grid = (
            simulated(stored, self._grid, stored.spec.torch_name, transposed=False) if self._grid else stored
        )

    def _cells(self) -> Cells | None:
        return cells_of(self.base.scheme, self.base.spec.shape)

    def seen(self, start: int, values: torch.Tensor, arena: Arena, loader: Arena) -> "Evidence | int":
        """The tile of base + update that begins with the element `start`, 1-D: what is to be added."""
        box = self.step.box(start, start + values.numel())
        s = self.stored.values(box, arena)
        if self.step.spec.dtype not in FLOATS:
            same = values.dtype == s.dtype and torch.equal(values.view(torch.uint8), s.view(torch.uint8))
            return 0 if same else s.numel()
        s, evidence = s.clone(), Evidence(cells=self._cells())
        w = self.base.values(box, arena).float().clone()
        for first in range(0, values.numel(), CHUNK_NUMEL):
            chunk = slice(first, first + CHUNK_NUMEL)
            _look(evidence, start + first, w[chunk], values[chunk].clone(), s[chunk], arena)
        if self._grid and evidence.numel:
            distance = self._on_grid.values(box, loader).double().sub_(s.double())
            evidence.grid_sq += float(distance.square_().sum())  # ‖Q(S) − S‖²
        return evidence

    def add(self, seen: "Evidence | int") -> None:
        """What was seen of the next tile."""
        if isinstance(seen, int):
            self.n_different += seen
        else:
            self.evidence.add_all(seen)

    def release(self) -> None:
        for sources in (self.base, self.stored, self._on_grid):
            sources.release()

    def facts(self) -> dict[str, Any]:
        """What `verify` says of the weight."""
        if self.step.spec.dtype not in FLOATS:
            return _facts(Verdict("unrelated" if self.n_different else "equal"))
        told = _facts(verdict(self.evidence, self.stored.scheme.kind, self._grid))
        figures = self.evidence.measures.summary() if self.evidence.measures.delta_sq else {}
        told |= {name: figures[name] for name in ("kept", "noise", "delta_rel") if name in figures}
        if self.evidence.numel:
            off = self.evidence.multiples[1.0].n_off
            told["fits"] = 1 - off / max(self.step.spec.numel, 1)
        return told


def _look(
    evidence: Evidence, start: int, w: torch.Tensor, v: torch.Tensor, s: torch.Tensor, arena: Arena
) -> None:
    """Add a chunk that begins with the element `start`."""
    delta = v - w
    if evidence.add(w, v, s, arena) and evidence.cells:
        evidence.cells.add(start, w, delta, s.float())


class Relating:
    """A destination that looks at what it gets beside what a directory holds; one tile at a time, which takes
    fifteen times a chunk in float64."""

    def __init__(self, compared: Sequence[WeightCompared], on_event: OnEvent) -> None:
        self.outcome = Outcome()
        self.error: Exception | None = None
        self._compared = {weight.step.name: weight for weight in compared}
        self._on_event = on_event
        self._lock = Lock()
        self._arena, self._loader = Arena(torch.device("cpu")), Arena(torch.device("cpu"))
        self._seen: dict[tuple[str, int], Evidence | int] = {}  # of a tensor's tile at a byte
        self._at: Counter[str] = Counter()

    def steps(self) -> Iterable[Step]:
        return (weight.step for weight in self._compared.values())

    def is_open(self, step: Step) -> bool:
        return True

    def open(self, step: Step) -> None:
        """Nothing is to be opened."""

    def write(self, tensor: str, offset: int, data: memoryview) -> None:
        weight = self._compared[tensor]
        itemsize, torch_name = DTYPES[weight.step.spec.dtype]
        # Not the buffer itself: it is to be changed.
        values = torch.frombuffer(bytearray(data), dtype=getattr(torch, torch_name))
        with self._lock, torch.inference_mode():
            seen = weight.seen(offset // itemsize, values, self._arena, self._loader)
            self._seen[tensor, offset] = seen

    def wrote(self, tensor: str, nbytes: int) -> None:
        weight = self._compared[tensor]
        weight.add(self._seen.pop((tensor, self._at[tensor])))
        self._at[tensor] += nbytes
        if self._at[tensor] == weight.step.nbytes:
            weight.release()
        self._on_event({"event": "progress", "nbytes": nbytes})

    def finish(self) -> None:
        """Nothing is left to do."""

    def fail(self, error: Exception) -> None:
        self.error = self.error or error

    def close(self) -> None:
        """Nothing is open."""


def relate(
    plan: Plan, base: Mapping[str, Sources], merged: Checkpoint, device: torch.device, on_event: OnEvent
) -> dict[str, Any]:
    """How the weights of `merged` relate to a plan that writes float32; `base` are the checkpoint's weights.
    Returns "related" {name: what was seen}, worst first, and "relations", how many there are of each. What
    was seen: "relation", how "sure" it is, the "scale" of the update where it is another than the adapter's,
    "fits", the share of elements that are base + update rounded once, where that is not all, and of weights
    with an update kept, noise, delta_rel. Raises CheckpointError for `merged`, AdapterError."""
    stored = open_weights(merged)
    # A tied weight that is not stored is there all the same, under the name of the one that it is tied to.
    held = {**Names(stored, merged.config).unstored(), **stored}
    comparable, told = [], {}
    for step in plan.steps:
        weight = held.get(step.name)
        if weight is None or not _comparable(step, weight):
            told[step.name] = _facts(Verdict("missing"))
        else:
            comparable.append(WeightCompared(step, weight, _base_of(step, base)))
    on_event({"event": "plan", "nbytes": sum(weight.step.nbytes for weight in comparable), "shards": []})
    relating = Relating(comparable, on_event)
    merge([relating], plan.memory, device, allow_nonfinite=True)
    if relating.error:
        raise relating.error
    told |= {weight.step.name: weight.facts() for weight in comparable}
    told |= {name: _extra(stored, name, told) for name in stored if name not in told}
    return _in_order(told)


def _in_order(told: Mapping[str, dict[str, Any]]) -> dict[str, Any]:
    order = list(EXPLAINED)
    worst_first = sorted(
        told.items(), key=lambda item: (-order.index(item[1]["relation"]), item[1].get("kept") or 0.0)
    )
    counts = Counter(facts["relation"] for facts in told.values())
    return {"related": dict(worst_first), "relations": {kind: counts[kind] for kind in order if counts[kind]}}


def _facts(judged: Verdict) -> dict[str, Any]:
    scale = {} if judged.scale is None else {"scale": judged.scale}
    return {"relation": judged.relation, "sure": judged.sure, **scale}


def _comparable(step: Step, stored: Sources) -> bool:
    """Floating-point weights are compared in whatever dtype they are stored, all others in their own."""
    if step.spec.dtype not in FLOATS:
        return stored.spec == step.spec
    return stored.spec.shape == step.spec.shape and stored.spec.dtype in FLOATS


def _base_of(step: Step, base: Mapping[str, Sources]) -> Sources:
    """W: the checkpoint's weight, unless the result has another shape or the checkpoint lacks it."""
    weight = base.get(step.name)
    return weight if weight and weight.spec.shape == step.spec.shape else step.sources


def _extra(stored: Mapping[str, Sources], name: str, told: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Of a weight that the plan does not have. A copy of one that it has is what that is: tied weights may be
    stored twice."""
    spec = stored[name].spec
    arena, loader = Arena(torch.device("cpu")), Arena(torch.device("cpu"))
    for other, facts in told.items():
        alike = other in stored and stored[other].spec == spec and len(spec.shape) == 2
        if alike and _same_values(stored[other], stored[name], arena, loader):
            return dict(facts)
    return _facts(Verdict("extra"))


def _same_values(a: Sources, b: Sources, arena: Arena, loader: Arena) -> bool:
    n_rows, n_cols = a.spec.shape
    rows = max(CHUNK_NUMEL // max(n_cols, 1), 1)
    for first in range(0, n_rows, rows):
        box = Box(range(first, min(first + rows, n_rows)), range(n_cols), n_rows, n_cols, 0)
        if not torch.equal(a.values(box, arena), b.values(box, loader)):
            return False
    return True


def _grid(step: Step, stored: Sources) -> BaseQuant | None:
    """The quantizer that a merge into this base may have used again: the base's own, else the usual one. None
    for a weight that is stored quantized, or that nobody quantizes."""
    if stored.scheme.kind != "dense" or len(stored.spec.shape) != 2:
        return None
    scheme = step.sources.scheme
    kind = scheme.kind if scheme.kind in ON_GRID else "nf4"
    # Scales that were quantized themselves are the largest values of their blocks, and are found again.
    return BaseQuant(kind=kind, double_quant=False, blocksize=scheme.blocksize or 64)
