"""PEFT's WaveFT: Δ = scaling · the inverse 2-D wavelet transform of n coefficients at places that a seed
draws. Linear and HF Conv1D.

(arXiv:2505.12532; PEFT 0.21 waveft/layer.py, get_delta_weight, and waveft/waverec2d.py.) A coefficient adds
the outer product of two short filters, so rows are made from the coefficients near them and no matrix is
held. The coefficients of [out, in] lie in the middle of a matrix with room for the filters, whose quarters
are the four bands; as in PEFT, the band in the right half is high-pass over rows, and the one in the lower
half over columns. Without use_idwt the coefficients are elements of Δ. n is the length of the spectrum.
"""

from functools import partial

import torch

from lorafuse.adapters.reading.check_config import integer, number, one_of
from lorafuse.adapters.reading.check_tensors import check_shapes, misfit
from lorafuse.adapters.reading.directory import AdapterDir
from lorafuse.adapters.reading.modules import NAMED, Leaves, Updates, Warn, collect
from lorafuse.adapters.updates import Update
from lorafuse.arithmetic.seeded import first_of_randperm
from lorafuse.arithmetic.wavelets import FAMILIES, reconstruction_filters
from lorafuse.patches.patch import Patch
from lorafuse.patches.row_function import RowFunction, Tensors, tile_nbytes
from lorafuse.patches.target import Target

SUPPORTED = "Linear, HF Conv1D; db1–db10 and sym2–sym10"
MEMORY = "tiles"

_NAME = "waveft_spectrum"
_LEAVES = rf"{_NAME}{NAMED}"
_CHUNK_NUMEL = 1 << 17  # elements that coefficients add to at once


def updates(adapter: AdapterDir, scale: float, warn: Warn) -> Updates:
    """One for the weight of each module."""
    seed = integer(adapter, "random_loc_seed", 777, least=0)
    scaling = scale * number(adapter, "scaling", 25.0)
    family = (
        one_of(adapter, "wavelet_family", "db1", FAMILIES) if adapter.config.get("use_idwt", True) else None
    )
    return collect(adapter, _LEAVES, partial(_spectrum, adapter, scaling, seed, family), warn)


def _spectrum(
    adapter: AdapterDir, scaling: float, seed: int, family: str | None, module: str, leaves: Leaves
) -> list[Update]:
    key = leaves.pop(_NAME, None)
    if key is None:
        return []
    n = check_shapes(adapter, (key, ("n_frequency",)))["n_frequency"]
    length = reconstruction_filters(family).shape[1] if family else 1

    def make(target: Target) -> Patch:
        if len(target.spec.shape) != 2 or n > target.spec.numel:
            raise misfit(adapter, target, key)
        n_rows, n_cols = target.spec.shape
        return RowFunction(
            adapter.store,
            {"c": key},
            _add,
            begin=partial(
                _begin,
                seed=seed,
                scaling=scaling,
                family=family,
                shape=(n_rows, n_cols),
                turned=target.is_conv1d,
            ),
            begin_nbytes=(300 + 8 * length) * n,
            scratch_nbytes=tile_nbytes(target.spec) + 64 * max(_CHUNK_NUMEL, length**2) + 16 * n,
            facts={"n_frequency": n, "scale": scaling},
        )

    return [Update(f"{module}.weight", (key,), make=make)]


def _begin(
    t: Tensors, seed: int, scaling: float, family: str | None, shape: tuple[int, int], turned: bool
) -> Tensors:
    n_out, n_in = shape[:: -1 if turned else 1]
    places = first_of_randperm(n_out * n_in, len(t["c"]), seed)
    axes = _bands(places // n_in, places % n_in, n_out, n_in, family)
    (rows, row_filters), (cols, col_filters) = axes[:: -1 if turned else 1]
    made = {"rows": rows, "row_filters": row_filters, "cols": cols, "col_filters": col_filters}
    return {name: x.to(t["c"].device) for name, x in made.items()} | {"c": t["c"] * scaling}


def _add(tile: torch.Tensor, first_row: int, t: Tensors) -> None:
    length = t["row_filters"].shape[1]
    reach = torch.arange(length, device=tile.device)
    near = ((t["rows"] < first_row + tile.shape[0]) & (t["rows"] + length > first_row)).nonzero()[:, 0]
    delta = torch.zeros_like(tile)
    for chosen in torch.split(near, max(_CHUNK_NUMEL // length**2, 1)):
        values = (t["c"][chosen, None] * t["row_filters"][chosen])[:, :, None] * t["col_filters"][chosen][
            :, None, :
        ]
        rows = (t["rows"][chosen, None] - first_row + reach)[:, :, None].expand_as(values)
        cols = (t["cols"][chosen, None] + reach)[:, None, :].expand_as(values)
        inside = (rows >= 0) & (rows < tile.shape[0]) & (cols >= 0) & (cols < tile.shape[1])
        # Not index_add_, whose order of summation on CUDA differs from run to run.
        delta.index_put_((rows[inside], cols[inside]), values[inside], accumulate=True)
    tile.add_(delta)


Axis = tuple[torch.Tensor, torch.Tensor]


def _bands(u: torch.Tensor, v: torch.Tensor, n_out: int, n_in: int, family: str | None) -> tuple[Axis, Axis]:
    """Of each coefficient, over outputs and over inputs: the first index that it adds to (perhaps negative),
    and its filter."""
    if family is None:
        ones = torch.ones(len(u), 1, dtype=torch.float32)
        return (u, ones), (v, ones)
    filters = reconstruction_filters(family).float()
    margin = filters.shape[1] - 2
    places, high = [], []
    for index, n in ((u, n_out), (v, n_in)):
        padded = (n + margin + 1) // 2 * 2
        centred = index + (padded - n) // 2
        high.append((centred >= padded // 2).long())
        places.append(2 * (centred - high[-1] * (padded // 2)) - margin)
    return (places[0], filters[high[1]]), (places[1], filters[high[0]])
