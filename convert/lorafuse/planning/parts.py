"""Which worker makes which output files, where several workers make one result."""

from collections.abc import Sequence

from lorafuse.planning.plan import PlannedShard


def divided(shards: Sequence[PlannedShard], of: int) -> list[list[PlannedShard]]:
    """The files in `of` parts, so that each file is in one of them and their sizes in bytes are close: a file
    after the other, the largest first, goes to the part that has least. It depends on the plan alone."""
    parts: list[list[PlannedShard]] = [[] for _ in range(of)]
    sizes = [0] * of
    for shard in sorted(shards, key=lambda shard: (-shard.nbytes, shard.file)):
        least = sizes.index(min(sizes))
        parts[least].append(shard)
        sizes[least] += shard.nbytes
    return [sorted(part, key=lambda shard: shard.file) for part in parts]
