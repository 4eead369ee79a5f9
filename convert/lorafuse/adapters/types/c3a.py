"""PEFT's C³A: W plus a matrix of circulant blocks, on Linear (arXiv 2407.19342; PEFT 0.21 c3a/layer.py,
get_delta_weight).

c3a_kernel is (out / b, in / b, b), and entry [p, q] of block (i, j) is kernel[i, j, (q − p) mod b] / in. PEFT
multiplies by Fourier transforms; here the entries are looked up, which is exact. The block size is that of
the tensor.
"""

from functools import partial

import torch

from lorafuse.adapters.reading.check_tensors import check_shapes, misfit, refuse_conv1d
from lorafuse.adapters.reading.directory import AdapterDir
from lorafuse.adapters.reading.modules import NAMED, Leaves, Updates, Warn, collect
from lorafuse.adapters.updates import Update
from lorafuse.patches.patch import Patch
from lorafuse.patches.row_function import RowFunction, Tensors, tile_nbytes
from lorafuse.patches.target import Target

SUPPORTED = "Linear"
MEMORY = "tiles"

_LEAVES = rf"c3a_\w+{NAMED}"


def updates(adapter: AdapterDir, scale: float, warn: Warn) -> Updates:
    """One for the weight of each module."""
    return collect(adapter, _LEAVES, partial(_circulant, adapter, scale), warn)


def _circulant(adapter: AdapterDir, scale: float, module: str, leaves: Leaves) -> list[Update]:
    key = leaves.pop("c3a_kernel", None)
    if key is None:
        return []
    n = check_shapes(adapter, (key, ("out / b", "in / b", "b")))
    n_out, n_in = n["out / b"] * n["b"], n["in / b"] * n["b"]

    def make(target: Target) -> Patch:
        refuse_conv1d(adapter, key, target)
        if target.spec.shape != (n_out, n_in):
            raise misfit(adapter, target, key)
        return RowFunction(
            adapter.store,
            {"kernel": key},
            partial(_add, scaling=scale / n_in),
            scratch_nbytes=4 * tile_nbytes(target.spec),
            facts={"scale": scale},
        )

    return [Update(f"{module}.weight", (key,), make=make)]


def _add(tile: torch.Tensor, first_row: int, tensors: Tensors, scaling: float) -> None:
    kernel = tensors["kernel"]
    n_rows, (_, n_in, block) = tile.shape[0], kernel.shape
    rows = torch.arange(first_row, first_row + n_rows, device=tile.device)
    shift = (torch.arange(block, device=tile.device) - rows[:, None]) % block  # [n_rows, b]
    own = kernel[rows.div(block, rounding_mode="floor")]  # [n_rows, in / b, b]
    values = own.gather(2, shift[:, None].expand(-1, n_in, -1))
    tile.view(n_rows, n_in, block).add_(values, alpha=scaling)
