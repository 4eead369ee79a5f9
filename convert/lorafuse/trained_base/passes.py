"""What simulated quantization shares: passes over a whole weight, in pieces that stay in cache."""

from collections.abc import Iterator

import torch

from lorafuse.arithmetic.arena import Arena
from lorafuse.codecs.sources import Sources
from lorafuse.files.tensors import Box

PASS_NUMEL = 1 << 19  # read at a time in the pass over the whole weight


def as_loaded(values: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The values (1-D) in the dtype in which the model was loaded."""
    return values if values.dtype == dtype else values.to(dtype)


def pieces(dense: Sources, step: int, arena: Arena) -> Iterator[tuple[int, torch.Tensor]]:
    """(start, elements from there on) over a whole weight; each is valid until the next."""
    for start in range(0, dense.spec.numel, step):
        box = Box.of_run(dense.spec, start, min(start + step, dense.spec.numel))
        yield start, dense.values(box, arena)


def whole_rows(numel: int, n_cols: int) -> int:
    """About `numel` elements, as whole rows."""
    return max(numel // max(n_cols, 1), 1) * n_cols
