"""What the loop makes in one turn: a weight for one output or for many, and how the memory limit is spent on that.

Outputs of one base differ in what their adapters change. A turn is one weight in all outputs that take it from the same sources and
cut it into the same tiles, so that a tile is read and decoded once. One output alone has a turn for each of its steps.
"""

from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, field

from lorafuse.adapters import Patch
from lorafuse.adapters.lowrank import LowRank
from lorafuse.codecs import Sources
from lorafuse.errors import UsageError, shown
from lorafuse.measure import Measures
from lorafuse.settings import Settings
from lorafuse.steps import Memory, Step, natural_key

# Interpreter, libraries' buffers and allocator slack beyond `import torch`, measured by bench/memory.py.
RUNTIME_NBYTES = 25_000_000
TILES_PER_WORKER = (6, 3, 1)  # the more, the longer workers go on while a write waits for the disk
MIN_TILES_AHEAD = 2


@dataclass
class Result:
    """One content of a turn's tiles, and the outputs, by number, that get it."""

    step: Step
    outputs: list[int]
    measures: Measures = field(default_factory=Measures)  # of the tiles that are finished


@dataclass
class Turn:
    """A weight, made for one or more outputs."""

    sources: Sources
    results: list[Result] = field(default_factory=list)

    @property
    def name(self) -> str:
        return self.results[0].step.name

    @property
    def _cutter(self) -> Step:
        """Only patches see how a weight is cut into tiles."""
        return next((result.step for result in self.results if result.step.patches), self.results[0].step)

    @property
    def verbatim(self) -> bool:
        return all(result.step.verbatim for result in self.results)

    @property
    def patches(self) -> Iterator[Patch]:
        return (patch for result in self.results for patch in result.step.patches)

    def add(self, output: int, step: Step) -> None:
        """One more output. Those that take the weight without an update, in one dtype, share a result."""
        if not step.patches:
            for result in self.results:
                if not result.step.patches and result.step.spec == step.spec:
                    result.outputs.append(output)
                    return
        self.results.append(Result(step, [output]))

    def only(self, outputs: Collection[int]) -> "Turn":
        """The same for some of the outputs; without a result when it was for none of them."""
        kept = [Result(result.step, [number for number in result.outputs if number in outputs]) for result in self.results]
        return Turn(self.sources, [result for result in kept if result.outputs])

    def tiles(self) -> Iterator[tuple[int, int]]:
        """(start, stop) in elements, in order."""
        return self._cutter.tiles()

    @property
    def resident_nbytes(self) -> int:
        """Held from the first tile to the last."""
        return self.sources.held_nbytes + sum(result.step.resident_nbytes for result in self.results)

    @property
    def worker_nbytes(self) -> int:
        """Held by each worker while it makes a tile."""
        return max(result.step.worker_nbytes for result in self.results)

    @property
    def tile_nbytes(self) -> int:
        """Bytes of a finished tile in the largest of its dtypes."""
        numel = min(self._cutter.tile_numel, self._cutter.spec.numel)
        return max(numel * result.step.itemsize for result in self.results)


def turns(outputs: Sequence[Iterable[Step]]) -> list[Turn]:
    """Every step of every output in one turn, the weights in their natural order."""
    members: dict[str, list[tuple[int, Step]]] = {}
    for number, steps in enumerate(outputs):
        for step in steps:
            members.setdefault(step.name, []).append((number, step))
    return [turn for name in sorted(members, key=natural_key) for turn in _turns_of(members[name])]


def _turns_of(members: list[tuple[int, Step]]) -> list[Turn]:
    """The turns of one weight: steps with patches first, which decide how it is cut."""
    found: dict[tuple[int, object], Turn] = {}
    for number, step in members:
        if step.patches:
            found.setdefault((id(step.sources), step.cut), Turn(step.sources)).add(number, step)
    for number, step in members:
        if not step.patches:
            same = (turn for (sources, _), turn in found.items() if sources == id(step.sources))
            turn = next(same, None) or found.setdefault((id(step.sources), None), Turn(step.sources))
            turn.add(number, step)
    return list(found.values())


def _low_ranks(patches: Iterable[Patch]) -> Iterator[LowRank]:
    """Those whose right factor can be read again."""
    for patch in patches:
        if isinstance(patch, LowRank):
            yield patch
        yield from _low_ranks(patch.members)


def within_limit(planned: list[Turn], held_nbytes: int, settings: Settings) -> Memory | None:
    """As many workers as the limit allows, with what patches hold left as it is; None when it does not even allow one."""
    resident = max(turn.resident_nbytes for turn in planned)
    for n_workers, per_worker in ((w, t) for w in range(settings.n_workers, 0, -1) for t in TILES_PER_WORKER):
        memory = _spent(planned, held_nbytes, settings, n_workers, per_worker)
        if resident <= memory.resident_nbytes:
            return memory
    return None


def _spent(planned: list[Turn], held_nbytes: int, settings: Settings, n_workers: int, per_worker: int) -> Memory:
    """What so many workers leave for what patches hold; less than nothing when they are too many."""
    worker = max(turn.worker_nbytes for turn in planned)
    tile = max(turn.tile_nbytes for turn in planned)
    n_results = max(len(turn.results) for turn in planned)
    held_nbytes += max(turn.sources.held_nbytes for turn in planned)  # prepared ahead of its turn
    n_tiles = n_workers * per_worker + MIN_TILES_AHEAD
    fixed = RUNTIME_NBYTES + held_nbytes + n_workers * worker + n_tiles * n_results * tile
    return Memory(n_workers, n_tiles, n_results, tile, settings.memory_nbytes - fixed)


def fit_memory(planned: list[Turn], held_nbytes: int, settings: Settings) -> Memory:
    """As many workers as the limit allows. A right factor that does not fit beside one worker is read again for each tile.

    Raises UsageError when nothing fits.
    """
    for attempt in ("resident", "some read again", "all read again"):
        memory = within_limit(planned, held_nbytes, settings)
        if memory:
            return memory
        least = _spent(planned, held_nbytes, settings, 1, TILES_PER_WORKER[-1])
        resident = max(turn.resident_nbytes for turn in planned)
        for turn in planned:
            for patch in _low_ranks(turn.patches):
                patch.right_resident = attempt == "resident" and turn.resident_nbytes <= least.resident_nbytes
    largest = max(planned, key=lambda turn: turn.worker_nbytes + turn.resident_nbytes)
    needed = settings.memory_nbytes - least.resident_nbytes + resident
    raise UsageError(
        f"A memory limit of {settings.memory_nbytes / 1e6:.0f} MB is too small: {needed / 1e6:.0f} MB are needed "
        f"beyond `import torch`, most of it for {shown(largest.name)}. Raise --memory-limit."
    )
