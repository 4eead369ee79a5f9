"""PEFT's FourierFT: Δ = scaling · Re ifft2(F), F zero but for n coefficients at places that a seed draws. Linear and HF Conv1D.

(arXiv:2405.03003; PEFT 0.21 fourierft/layer.py, get_delta_weight.) Row p of ifft2(F) is the 1-D inverse transform of Σ_k c_k
e^{2πi p u_k / M} at column v_k, so rows are made one by one and no matrix is held. n is the length of the spectrum.
"""

import math

import torch

from lorafuse.adapters.patch import TILE_NUMEL, Base, Patch, Target, Update
from lorafuse.adapters.rowwise import RowWise, Tensors
from lorafuse.adapters.seeded import first_of_randperm
from lorafuse.adapters.shared import (
    NAMED,
    Found,
    Leaves,
    Warn,
    each_module,
    expect,
    misfit,
    number,
    read_modules,
    shape_of,
    take,
    whole_number,
)
from lorafuse.adapters.store import AdapterDir

_NAME = "fourierft_spectrum"
_LEAVES = rf"{_NAME}{NAMED}"
_CHUNK_NUMEL = 1 << 18  # coefficients times rows at once


def updates(adapter: AdapterDir, scale: float, warn: Warn) -> Found:
    """One for the weight of each module."""
    modules, ignored = read_modules(adapter, _LEAVES)
    seed = whole_number(adapter, "random_loc_seed", 777, minimum=0)
    scaling = scale * number(adapter, "scaling", 150.0)

    def of_module(module: str, leaves: Leaves) -> list[Update]:
        keys = take(adapter, module, leaves, (_NAME,))
        if keys is None:
            return []
        expect(adapter, keys[_NAME], len(shape_of(adapter, keys[_NAME])) == 1, "[n_frequency]")
        used = tuple(keys.values())
        return [Update(f"{module}.weight", used, make=lambda target: _patch(adapter, keys, seed, scaling, target))]

    return each_module(adapter, modules, of_module), ignored


def _patch(adapter: AdapterDir, keys: dict[str, str], seed: int, scaling: float, target: Target) -> Patch:
    (n,) = shape_of(adapter, keys[_NAME])
    if len(target.spec.shape) != 2 or n > target.spec.numel:
        raise misfit(adapter, keys[_NAME], target)
    n_rows, n_cols = target.spec.shape

    def begin(t: Tensors, base: Base) -> Tensors:
        n_in = n_rows if target.is_conv1d else n_cols
        places = first_of_randperm(target.spec.numel, n, seed).to(base.arena.device)
        u, v = places // n_in, places % n_in
        u, v = (v, u) if target.is_conv1d else (u, v)
        return {"c": t[_NAME] * (scaling / n_rows), "u": u, "v": v}

    def update(tile: torch.Tensor, first_row: int, t: Tensors) -> None:
        rows = torch.arange(first_row, first_row + tile.shape[0], device=tile.device)
        spectrum = torch.zeros(tile.shape, dtype=torch.complex64, device=tile.device)
        step = max(_CHUNK_NUMEL // tile.shape[0], 1)
        for start in range(0, n, step):
            c, u, v = (t[name][start : start + step] for name in "cuv")
            angle = (rows[:, None] * u % n_rows).double() * (2 * math.pi / n_rows)
            terms = torch.complex(c * angle.cos().float(), c * angle.sin().float())
            # Not index_add_, whose order of summation on CUDA differs from run to run.
            spectrum.index_put_((rows[:, None] - first_row, v), terms, accumulate=True)
        tile.add_(torch.fft.ifft(spectrum, dim=1).real)

    scratch_nbytes = 32 * max(TILE_NUMEL, n_cols) + 40 * _CHUNK_NUMEL
    facts = {"n_frequency": n, "scale": scaling}
    return RowWise(adapter.store, keys, update, begin=begin, begin_nbytes=300 * n, scratch_nbytes=scratch_nbytes, facts=facts)
