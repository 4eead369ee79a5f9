"""How the memory limit is spent: workers, each with the tile that it makes, and what patches hold."""

from dataclasses import dataclass, replace

from lorafuse.arithmetic.lanes import DEVICE_NBYTES, lane_nbytes, n_lanes
from lorafuse.errors import UsageError, shown
from lorafuse.files.spares import SPARES
from lorafuse.planning.plan import Memory
from lorafuse.planning.shared_weights import SharedWeight, SharedWeights
from lorafuse.settings import Settings

# Interpreter, libraries' buffers and allocator slack beyond `import torch`, measured by bench/memory/peak.py.
RUNTIME_NBYTES = 26_000_000
LARGE_TABLES_NBYTES = 1_000_000  # with less, a refusal names a weight
TILES_PER_WORKER = 4  # in the making and before it: of those that wait for one before them, no bytes are held


def _hold_less(weight: SharedWeight) -> bool:
    """Puts a patch that holds less in the place of the first that can. Returns whether any can."""
    for variant in weight.variants:
        patches = variant.step.patches
        for i, patch in enumerate(patches):
            lighter = patch.lighter()
            if lighter is not None:
                patches[i] = lighter
                return True
    return False


@dataclass(slots=True)
class Needs:
    """The most that any weight takes: by each worker, for a finished tile and the number of its variants, by
    its sources, and by all that is held from its first tile to its last."""

    worker_nbytes: int = 0
    tile_nbytes: int = 0
    n_variants: int = 0
    held_nbytes: int = 0
    resident_nbytes: int = 0
    largest: str = ""  # the weight that takes most in all
    largest_nbytes: int = -1

    @classmethod
    def of(cls, planned: SharedWeights) -> "Needs":
        """Of all weights of a pass."""
        needs = cls()
        for weight in planned:
            worker, resident = weight.worker_nbytes, weight.resident_nbytes
            needs.worker_nbytes = max(needs.worker_nbytes, worker)
            needs.tile_nbytes = max(needs.tile_nbytes, weight.tile_nbytes)
            needs.n_variants = max(needs.n_variants, len(weight.variants))
            needs.held_nbytes = max(needs.held_nbytes, weight.held_nbytes)
            needs.resident_nbytes = max(needs.resident_nbytes, resident)
            if worker + resident > needs.largest_nbytes:
                needs.largest, needs.largest_nbytes = weight.name, worker + resident
        return needs


def within_limit(needs: Needs, held_nbytes: int, settings: Settings) -> Memory | None:
    """As many workers as the limit allows, with what patches hold left as it is; None when it does not even
    allow one. `held_nbytes` is what is held beside the weights."""
    for n_workers in range(settings.n_workers, 0, -1):
        memory = _spent(needs, held_nbytes, settings, n_workers)
        if needs.resident_nbytes <= memory.resident_nbytes:
            return memory
    return None


def _spent(needs: Needs, held_nbytes: int, settings: Settings, n_workers: int) -> Memory:
    """What so many workers leave for what patches hold; less than nothing when they are too many."""
    held_nbytes += needs.held_nbytes  # prepared ahead of its weight
    held_nbytes += SPARES.n * min(needs.tile_nbytes, SPARES.nbytes) if n_workers > 1 else 0
    of_worker = needs.worker_nbytes + needs.n_variants * needs.tile_nbytes
    left = settings.memory_nbytes - RUNTIME_NBYTES - held_nbytes - n_workers * of_worker
    return Memory(
        n_workers, n_workers * TILES_PER_WORKER, needs.n_variants, needs.tile_nbytes, left,
        needs.worker_nbytes, needs.resident_nbytes,
    )  # fmt: skip


def fits_device(memory: Memory) -> bool:
    """Whether the weight that holds most leaves room for a tile on a device."""
    return n_lanes(memory.n_workers, memory.of_tile_nbytes, memory.largest_nbytes) > 0


def on_device(memory: Memory) -> Memory:
    """The same for a device, where tiles and what patches hold take DEVICE_NBYTES at most: as many workers as
    there are lanes. Raises UsageError where it does not fit."""
    if not fits_device(memory):
        raise UsageError(
            f"A weight holds {memory.largest_nbytes / 1e6:.0f} MB while it is made, of "
            f"{DEVICE_NBYTES / 1e6:.0f} MB that lorafuse takes on a GPU. Choose --device cpu."
        )
    n_workers = n_lanes(memory.n_workers, memory.of_tile_nbytes, memory.largest_nbytes)
    left = DEVICE_NBYTES - n_workers * lane_nbytes(memory.of_tile_nbytes)
    resident_nbytes = min(memory.resident_nbytes, left)
    return replace(
        memory, n_workers=n_workers, n_tiles=n_workers * TILES_PER_WORKER, resident_nbytes=resident_nbytes
    )


def fit_memory(
    planned: SharedWeights, held_nbytes: int, settings: Settings, receipt_nbytes: int = 0
) -> Memory:
    """As many workers as the limit allows. A right factor that does not fit beside one worker is read again
    for each tile. `held_nbytes`: tables and adapters; `receipt_nbytes`: what comes to them when no tile is in
    the making any more.

    Raises UsageError when nothing fits.
    """
    at_the_end = RUNTIME_NBYTES + held_nbytes + receipt_nbytes
    for attempt in ("resident", "some read again", "all read again"):
        needs = Needs.of(planned)
        memory = within_limit(needs, held_nbytes, settings)
        if memory and at_the_end <= settings.memory_nbytes:
            return memory
        least = _spent(needs, held_nbytes, settings, 1)
        for weight in planned:
            while attempt != "resident" or weight.resident_nbytes > least.resident_nbytes:
                if not _hold_less(weight):
                    break
    needed = max(settings.memory_nbytes - least.resident_nbytes + needs.resident_nbytes, at_the_end)
    tables = held_nbytes + receipt_nbytes > max(needs.largest_nbytes, LARGE_TABLES_NBYTES)
    most = "the tables of so many tensors" if tables else shown(needs.largest)
    raise UsageError(
        f"A memory limit of {settings.memory_nbytes / 1e6:.0f} MB is too small: {needed / 1e6:.0f} MB are "
        f"needed beyond `import torch`, most of it for {most}. Raise --memory-limit."
    )
