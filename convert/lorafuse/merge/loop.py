"""The loop: for every weight, for every tile: read, decode, then for every output patch, round once, write.

All of this is done by the worker that has the tile. The calling thread accounts for finished tiles, in order.
The first error ends the run; an error of one output alone ends that output.
"""

from collections.abc import Sequence

import torch

from lorafuse.arithmetic.lanes import is_host
from lorafuse.arithmetic.torch_state import own_torch_state
from lorafuse.errors import CheckpointError, LorafuseError, ResultError, shown
from lorafuse.merge.destination import Destination
from lorafuse.merge.feed import EVERYTHING_HERE, Feed
from lorafuse.merge.tile import Made
from lorafuse.merge.workers import TileWorkers
from lorafuse.planning.memory import on_device
from lorafuse.planning.plan import Memory
from lorafuse.planning.shared_weights import SharedWeights, Variant


def merge(
    outputs: Sequence[Destination],
    memory: Memory,
    device: torch.device,
    *,
    allow_nonfinite: bool = False,
    feed: Feed = EVERYTHING_HERE,
) -> None:
    """Make what the outputs need. Errors of reading and writing pass through; what is wrong with one output
    alone ends up in its `error`, and when nothing else is left, ends the loop. Wrong are values that are not
    finite, also the base's own in weights that are not copied bit for bit, unless `allow_nonfinite`."""
    planned = SharedWeights([output.steps() for output in outputs])
    try:
        memory = memory if is_host(device) else on_device(memory)
        with own_torch_state(), TileWorkers(planned, memory, device, feed) as workers:
            for tile in workers.tiles(outputs):
                for variant, made in zip(tile.weight.variants, tile.made, strict=True):
                    if made.measures:
                        variant.measures.add(made.measures)
                    if tile.last:
                        variant.measures.settle()
                        made.error = made.error or _complaint(variant, allow_nonfinite)
                    for number in variant.outputs:
                        if outputs[number].error is None:
                            _account(outputs[number], variant, made)
        for output in outputs:
            if output.error is None:
                output.finish()
    finally:
        for output in outputs:
            output.close()


def _account(output: Destination, variant: Variant, made: Made) -> None:
    """A tile that is written to one output: add its figures to those of the output, or give it up."""
    if made.error:
        output.fail(made.error)
        return
    output.outcome.timing.add(made.timing)
    if variant.step.patches:
        output.outcome.measures[variant.step.name] = variant.measures
    for tensor, nbytes in made.written.items():
        output.wrote(tensor, nbytes)


def _complaint(variant: Variant, allow_nonfinite: bool) -> LorafuseError | None:
    """What is wrong with the values of a weight that is finished: of the base, or of the result alone."""
    step, measures = variant.step, variant.measures
    if measures.n_broken_base and not allow_nonfinite:
        return CheckpointError(
            f"{shown(step.name)}: {measures.n_broken_base} of {step.spec.numel} values are not finite in the "
            "base; is the checkpoint damaged? --allow-nonfinite keeps them."
        )
    if measures.n_broken:
        return ResultError(
            f"{shown(step.name)}: {measures.n_broken} of {step.spec.numel} values are not finite in "
            f"{step.spec.torch_name}, though the base's are: the update, the sum or the cast overflows. "
            "--dtype bfloat16 or float32 has a wider range."
        )
    return None
