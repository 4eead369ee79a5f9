"""How one tile is made: decoded once, then patched, encoded and measured for each output that differs."""

import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch

from lorafuse.arithmetic.arena import DECODED_FP32, host_view
from lorafuse.arithmetic.measure import Measures, count_broken, count_broken_there, measure_tile
from lorafuse.codecs import Arena, Sources
from lorafuse.codecs.encoder import Encoded, FinishedTile, Piece
from lorafuse.merge.destination import Destination, Timing
from lorafuse.patches.patch import Base
from lorafuse.planning.plan import Step
from lorafuse.planning.shared_weights import SharedWeight, Variant


@dataclass
class Made:
    """What a finished tile holds for one variant. `pieces` say which bytes of the buffer belong where, until
    they are `written`: so many bytes of each stored tensor."""

    pieces: tuple[Piece, ...] = ()
    timing: Timing = field(default_factory=Timing)
    measures: Measures | None = None
    error: Exception | None = None  # of these outputs alone
    written: dict[str, int] = field(default_factory=dict)


def prepare(step: Step, sources: Sources, arena: Arena) -> None:
    """What the tiles of a step need: its patches, then what its encoder wants to know of the finished
    weight."""
    for patch in step.patches:
        patch.prepare(Base(sources, arena), arena)
    if step.encoder.needs_pass:
        step.encoder.prepare(lambda: _finished_tiles(step, sources, arena))


def release(step: Step) -> None:
    """Drop what `prepare` loaded or computed, as far as it came."""
    for patch in step.patches:
        patch.release()
    step.encoder.release()


def _finished_tiles(step: Step, sources: Sources, arena: Arena) -> Iterator[tuple[int, torch.Tensor]]:
    """(first element, values) of every tile of the weight, patched and not encoded."""
    with torch.inference_mode():
        for start, stop in step.tiles():
            base = sources.values(step.box(start, stop), arena)
            yield start, patched(step, base, start, arena)


@torch.inference_mode()
def make_tile(
    weight: SharedWeight, start: int, stop: int, buffers: list[torch.Tensor], arena: Arena
) -> list[Made]:
    """The tile [start, stop) for each variant of the weight, in its buffer. The time of reading and decoding
    counts for the first."""
    if not weight.needs_values:
        return [_copied(weight.variants[0].step, start, stop, buffers[0])]
    began = time.perf_counter()
    box = weight.box(start, stop)
    raw = weight.sources.fetch(box, arena)
    read_s, cpu_began = time.perf_counter() - began, time.thread_time()
    base, raw = weight.sources.decode_and_keep(raw, box, arena)
    tile, results = FinishedTile(start, stop, base, base, raw, box), []
    for variant, buffer in zip(weight.variants, buffers, strict=True):
        made = _made(variant, tile, buffer, arena, cpu_began)
        made.timing.read_s, read_s = read_s, 0.0
        results.append(made)
        cpu_began = time.thread_time()
    return results


def _copied(step: Step, start: int, stop: int, buffer: torch.Tensor) -> Made:
    """Stored bytes as they are."""
    began = time.perf_counter()
    pieces = step.encoder.copy(start, stop, buffer)
    return Made(pieces, Timing(read_s=time.perf_counter() - began))


def _made(variant: Variant, tile: FinishedTile, buffer: torch.Tensor, arena: Arena, cpu_began: float) -> Made:
    """One variant of a tile whose values are the base's; its time counts from `cpu_began` on. What a reader
    decodes is measured."""
    step, made = variant.step, Made()
    try:
        total = patched(step, tile.base, tile.start, arena)
        encoded = step.encoder.encode(tile._replace(values=total), buffer, arena)
    except Exception as e:  # whatever it is, the other outputs go on
        made.error = e
        return made
    made.pieces = encoded.pieces
    cpu_ended = time.thread_time()
    made.timing.compute_cpu_s = cpu_ended - cpu_began
    made.measures = encoded.measures or _measured(step, tile.base, total, encoded, arena)
    if made.measures:
        made.measures.n_clipped = encoded.n_clipped
    made.timing.stats_cpu_s = time.thread_time() - cpu_ended
    return made


def write_tile(made: Made, buffer: torch.Tensor, outputs: Sequence[Destination]) -> None:
    """Hand the bytes of a tile to each output that gets them; none, of a tile that went wrong."""
    pieces, made.pieces = made.pieces, ()
    view = host_view(buffer)
    for piece in () if made.error else pieces:
        data = piece.bytes_of(view)
        for output in outputs:
            output.write(piece.tensor, piece.at, data)
        made.written[piece.tensor] = made.written.get(piece.tensor, 0) + piece.nbytes


def patched(step: Step, base: torch.Tensor, start: int, arena: Arena) -> torch.Tensor:
    """The sum in fp32 (without patches `base` itself), 1-D; `base` stays as it is."""
    if not step.patches:
        return base
    name = "sum.fp32" if base.dtype == torch.float32 else DECODED_FP32
    total, width = arena.get(name, base.numel(), torch.float32).copy_(base), step.row_numel
    for patch in step.patches:
        patch.apply(total.view(-1, width), start // width, arena)
    return total


def _measured(
    step: Step, base: torch.Tensor, total: torch.Tensor, encoded: Encoded, arena: Arena
) -> Measures | None:
    stored = step.encoder.decode(encoded, arena)
    return measure_tile(base, total, stored, arena) if step.patches else _check_values(base, stored, arena)


def _check_values(base: torch.Tensor, stored: torch.Tensor, arena: Arena) -> Measures | None:
    """A cast to a narrower range can overflow, and a scale of a quantized weight can be NaN; what is copied
    is not looked at."""
    if not arena.on_host:
        return count_broken_there(base, stored)
    # One sum rather than isfinite: a hundredth of the time. It can overflow itself, so that elements are
    # counted then.
    return None if math.isfinite(float(stored.sum())) else count_broken(base, stored)
