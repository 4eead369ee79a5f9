"""PEFT's C³A: W plus a matrix of circulant blocks, on Linear (arXiv 2407.19342; PEFT 0.21 c3a/layer.py, get_delta_weight).

c3a_kernel is (out / b, in / b, b), and entry [p, q] of block (i, j) is kernel[i, j, (q − p) mod b] / in. PEFT multiplies by Fourier
transforms; here the entries are looked up, which is exact. The block size is that of the tensor.
"""

import torch

from lorafuse.adapters.keys import check_float
from lorafuse.adapters.modules import Warn, collect, misfit, not_one_update, refuse_conv1d, tile_nbytes
from lorafuse.adapters.patch import Patch, Target, Update
from lorafuse.adapters.rowwise import RowWise
from lorafuse.adapters.store import AdapterDir

_LEAVES = r"c3a_\w+(\.(?P<name>[^.]+))?"


def updates(adapter: AdapterDir, scale: float, warn: Warn) -> tuple[list[Update], dict[str, str]]:
    """Everything the adapter does, and the tensors that it ignores with the reason of each."""
    return collect(adapter, _LEAVES, lambda module, leaves: _circulant(adapter, module, leaves, scale), warn)


def _circulant(adapter: AdapterDir, module: str, leaves: dict[str, str], scale: float) -> list[Update]:
    key = leaves.pop("c3a_kernel", None)
    if key is None:
        return []
    check_float(adapter, key)
    spec = adapter.store.tensors[key].spec
    if len(spec.shape) != 3 or spec.numel == 0:
        raise not_one_update(adapter, (key,))
    n_out, n_in, block = spec.shape

    def make(target: Target) -> Patch:
        refuse_conv1d(adapter, key, target)
        if target.spec.shape != (n_out * block, n_in * block):
            raise misfit(adapter, (key,), target)
        return RowWise(
            adapter.store,
            {"kernel": key},
            lambda tile, first_row, tensors: _add(tile, first_row, tensors["kernel"], scale / (n_in * block)),
            scratch_nbytes=4 * tile_nbytes(target),
            facts={"scale": scale},
        )

    return [Update(f"{module}.weight", (key,), make=make)]


def _add(tile: torch.Tensor, first_row: int, kernel: torch.Tensor, scaling: float) -> None:
    n_rows, (_, n_in, block) = tile.shape[0], kernel.shape
    rows = torch.arange(first_row, first_row + n_rows, device=tile.device)
    shift = (torch.arange(block, device=tile.device) - rows[:, None]) % block  # [n_rows, b]
    own = kernel[rows.div(block, rounding_mode="floor")]  # [n_rows, in / b, b]
    values = own.gather(2, shift[:, None].expand(-1, n_in, -1))
    tile.view(n_rows, n_in, block).add_(values, alpha=scaling)
