"""Which weights lie in which output file."""

from lorafuse.files.names import SINGLE
from lorafuse.planning.plan import PlannedShard, Step

MIN_SHARED_NBYTES, MIN_SHARED = 100_000_000, 0.1  # and share of the model


def split_shards(steps: list[Step], max_nbytes: int) -> list[PlannedShard]:
    """The steps in files of at most `max_nbytes` each; a weight that is larger has a file of its own.

    What the adapter does not change lies in files of its own, so that the outputs of many adapters can share
    them. A model that fits one file is cut in two only if there is much to share: a tenth of it, and not just
    a few bytes.
    """
    changed, unchanged = [s for s in steps if s.changes], [s for s in steps if not s.changes]
    nbytes, shared_nbytes = (sum(step.nbytes for step in some) for some in (steps, unchanged))
    if nbytes <= max_nbytes and shared_nbytes < max(nbytes * MIN_SHARED, MIN_SHARED_NBYTES):
        return [PlannedShard(SINGLE, steps)]
    groups = [*_filled(changed, max_nbytes), *_filled(unchanged, max_nbytes)]
    if len(groups) == 1:
        return [PlannedShard(SINGLE, groups[0])]
    return [
        PlannedShard(f"model-{i:05d}-of-{len(groups):05d}.safetensors", group)
        for i, group in enumerate(groups, 1)
    ]


def _filled(steps: list[Step], max_nbytes: int) -> list[list[Step]]:
    """Greedy: a weight that does not fit any more starts the next group."""
    groups: list[list[Step]] = []
    room = -1
    for step in steps:
        room -= step.nbytes
        if not groups or room < 0:
            groups.append([])
            room = max_nbytes - step.nbytes
        groups[-1].append(step)
    return groups
