"""Finished shards, read as the reference implementation of the format does, are what the plan said."""

from pathlib import Path

from safetensors import SafetensorError, safe_open

from lorafuse.errors import ResultError, shown
from lorafuse.merge.destination import Outcome, Written
from lorafuse.outdir.out_dir import OutDir
from lorafuse.planning.plan import Plan, PlannedShard

Shapes = dict[str, tuple[int, ...]]


def verify_shards(plan: Plan, outcome: Outcome, out_dir: OutDir) -> None:
    """Raises ResultError unless every shard has its planned size and safetensors reads the planned names and
    shapes from it."""
    written = {w.file: w for w in outcome.written}
    for shard in plan.shards:
        checked_shapes(shard, written[shard.file], out_dir)


def checked_shapes(shard: PlannedShard, written: Written, out_dir: OutDir) -> tuple[int, Shapes]:
    """`OutDir.shapes` of a shard. Raises ResultError unless they are what was planned."""
    nbytes, shapes = out_dir.shapes(shard.file)
    if nbytes != written.nbytes:
        raise ResultError(f"{shard.file}: has {nbytes} bytes, {written.nbytes} were written.")
    planned = {tensor.name: tensor.spec.shape for tensor in shard.tensors}
    if shapes != planned:
        name = next(iter(shapes.items() ^ planned.items()))[0]
        raise ResultError(f"{shard.file}: {shown(name)} is not what was planned.")
    return nbytes, shapes


def read_shapes(path: Path, file: str) -> tuple[int, Shapes]:
    """`OutDir.shapes` of a local file."""
    nbytes = path.stat().st_size
    try:
        with safe_open(path, framework="np") as f:
            names = f.keys()
            return nbytes, {name: tuple(f.get_slice(name).get_shape()) for name in names}
    except SafetensorError as e:
        raise ResultError(f"{file}: cannot be read back: {shown(e)}.") from None
