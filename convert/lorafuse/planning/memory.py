"""How the memory limit is spent: workers, tiles ahead of the writer, and what patches hold."""

from lorafuse.errors import UsageError, shown
from lorafuse.planning.plan import Memory
from lorafuse.planning.shared_weights import SharedWeight
from lorafuse.settings import Settings

# Interpreter, libraries' buffers and allocator slack beyond `import torch`, measured by bench/memory.py.
RUNTIME_NBYTES = 25_000_000
TILES_PER_WORKER = (6, 3, 1)  # the more, the longer workers go on while a write waits for the disk
MIN_TILES_AHEAD = 2


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


def within_limit(planned: list[SharedWeight], held_nbytes: int, settings: Settings) -> Memory | None:
    """As many workers as the limit allows, with what patches hold left as it is; None when it does not even
    allow one."""
    resident = max(weight.resident_nbytes for weight in planned)
    for n_workers, per_worker in ((w, t) for w in range(settings.n_workers, 0, -1) for t in TILES_PER_WORKER):
        memory = _spent(planned, held_nbytes, settings, n_workers, per_worker)
        if resident <= memory.resident_nbytes:
            return memory
    return None


def _spent(
    planned: list[SharedWeight], held_nbytes: int, settings: Settings, n_workers: int, per_worker: int
) -> Memory:
    """What so many workers leave for what patches hold; less than nothing when they are too many."""
    worker = max(weight.worker_nbytes for weight in planned)
    tile = max(weight.tile_nbytes for weight in planned)
    n_variants = max(len(weight.variants) for weight in planned)
    held_nbytes += max(weight.held_nbytes for weight in planned)  # prepared ahead of its weight
    n_tiles = n_workers * per_worker + MIN_TILES_AHEAD
    fixed = RUNTIME_NBYTES + held_nbytes + n_workers * worker + n_tiles * n_variants * tile
    return Memory(n_workers, n_tiles, n_variants, tile, settings.memory_nbytes - fixed)


def fit_memory(planned: list[SharedWeight], held_nbytes: int, settings: Settings) -> Memory:
    """As many workers as the limit allows. A right factor that does not fit beside one worker is read again
    for each tile.

    Raises UsageError when nothing fits.
    """
    for attempt in ("resident", "some read again", "all read again"):
        memory = within_limit(planned, held_nbytes, settings)
        if memory:
            return memory
        least = _spent(planned, held_nbytes, settings, 1, TILES_PER_WORKER[-1])
        resident = max(weight.resident_nbytes for weight in planned)
        for weight in planned:
            while attempt != "resident" or weight.resident_nbytes > least.resident_nbytes:
                if not _hold_less(weight):
                    break
    largest = max(planned, key=lambda weight: weight.worker_nbytes + weight.resident_nbytes)
    needed = settings.memory_nbytes - least.resident_nbytes + resident
    raise UsageError(
        f"A memory limit of {settings.memory_nbytes / 1e6:.0f} MB is too small: {needed / 1e6:.0f} MB are "
        f"needed beyond `import torch`, most of it for {shown(largest.name)}. Raise --memory-limit."
    )
