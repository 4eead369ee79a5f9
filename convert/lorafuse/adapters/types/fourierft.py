"""PEFT's FourierFT: Δ = scaling · Re ifft2(F), F zero but for n coefficients at places that a seed draws.
Linear and HF Conv1D.

(arXiv:2405.03003; PEFT 0.21 fourierft/layer.py, get_delta_weight.) Row p of ifft2(F) is the 1-D inverse
transform of Σ_k c_k e^{2πi p u_k / M} at column v_k, so rows are made one by one and no matrix is held. n is
the length of the spectrum.
"""

import math
from functools import partial

import torch

from lorafuse.adapters.reading.check_config import integer, number
from lorafuse.adapters.reading.check_tensors import check_shapes, misfit
from lorafuse.adapters.reading.directory import AdapterDir
from lorafuse.adapters.reading.modules import NAMED, Leaves, Updates, Warn, collect
from lorafuse.adapters.updates import Update
from lorafuse.arithmetic.seeded import first_of_randperm
from lorafuse.patches.patch import Patch
from lorafuse.patches.row_function import RowFunction, Tensors, tile_nbytes
from lorafuse.patches.target import Target

SUPPORTED = "Linear, HF Conv1D"
MEMORY = "tiles"

_NAME = "fourierft_spectrum"
_LEAVES = rf"{_NAME}{NAMED}"
_CHUNK_NUMEL = 1 << 18  # coefficients times rows at once


def updates(adapter: AdapterDir, scale: float, warn: Warn) -> Updates:
    """One for the weight of each module."""
    seed = integer(adapter, "random_loc_seed", 777, least=0)
    scaling = scale * number(adapter, "scaling", 150.0)
    return collect(adapter, _LEAVES, partial(_spectrum, adapter, scaling, seed), warn)


def _spectrum(adapter: AdapterDir, scaling: float, seed: int, module: str, leaves: Leaves) -> list[Update]:
    key = leaves.pop(_NAME, None)
    if key is None:
        return []
    n = check_shapes(adapter, (key, ("n_frequency",)))["n_frequency"]

    def make(target: Target) -> Patch:
        if len(target.spec.shape) != 2 or n > target.spec.numel:
            raise misfit(adapter, target, key)
        n_rows, n_cols = target.spec.shape
        return RowFunction(
            adapter.store,
            {"c": key},
            partial(_add, n_rows=n_rows),
            begin=partial(
                _begin, seed=seed, scaling=scaling, shape=(n_rows, n_cols), turned=target.is_conv1d
            ),
            begin_nbytes=300 * n,
            # The spectrum and its transform, complex; and of each coefficient in each row its place, angle
            # and term.
            scratch_nbytes=4 * tile_nbytes(target.spec) + 40 * max(_CHUNK_NUMEL, n_rows),
            facts={"n_frequency": n, "scale": scaling},
        )

    return [Update(f"{module}.weight", (key,), make=make)]


def _begin(t: Tensors, seed: int, scaling: float, shape: tuple[int, int], turned: bool) -> Tensors:
    n_rows, n_cols = shape
    n_in = n_rows if turned else n_cols
    places = first_of_randperm(n_rows * n_cols, len(t["c"]), seed).to(t["c"].device)
    u, v = places // n_in, places % n_in
    u, v = (v, u) if turned else (u, v)
    return {"c": t["c"] * (scaling / n_rows), "u": u, "v": v}


def _add(tile: torch.Tensor, first_row: int, t: Tensors, n_rows: int) -> None:
    rows = torch.arange(first_row, first_row + tile.shape[0], device=tile.device)
    spectrum = torch.zeros(tile.shape, dtype=torch.complex64, device=tile.device)
    step = max(_CHUNK_NUMEL // tile.shape[0], 1)
    for start in range(0, len(t["c"]), step):
        c, u, v = (t[name][start : start + step] for name in "cuv")
        angle = (rows[:, None] * u % n_rows).double() * (2 * math.pi / n_rows)
        terms = torch.complex(c * angle.cos().float(), c * angle.sin().float())
        # Not index_add_, whose order of summation on CUDA differs from run to run.
        spectrum.index_put_((rows[:, None] - first_row, v), terms, accumulate=True)
    tile.add_(torch.fft.ifft(spectrum, dim=1).real)
