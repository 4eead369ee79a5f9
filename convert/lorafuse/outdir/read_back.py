"""A staged directory, read as the reference implementation of the format does, is what the plan said."""

from pathlib import Path

from safetensors import SafetensorError, safe_open

from lorafuse.errors import ResultError, shown
from lorafuse.merge.destination import Outcome
from lorafuse.planning.plan import Plan


def verify_staging(plan: Plan, outcome: Outcome, staging: Path) -> None:
    """Raises ResultError unless every shard has its planned size and safetensors reads the planned names and
    shapes from it."""
    written = {w.file: w for w in outcome.written}
    for shard in plan.shards:
        path = staging / shard.file
        if path.stat().st_size != written[shard.file].nbytes:
            raise ResultError(
                f"{shard.file}: has {path.stat().st_size} bytes, {written[shard.file].nbytes} were written."
            )
        try:
            with safe_open(path, framework="np") as f:
                found = {name: tuple(f.get_slice(name).get_shape()) for name in f.keys()}  # noqa: SIM118 (not a dict)
        except SafetensorError as e:
            raise ResultError(f"{shard.file}: cannot be read back: {shown(e)}.") from None
        planned = {tensor.name: tensor.spec.shape for tensor in shard.tensors}
        if found != planned:
            name = next(iter(found.items() ^ planned.items()))[0]
            raise ResultError(f"{shard.file}: {shown(name)} is not what was planned.")
