"""PEFT's RandLoRA: a sum over n random bases, Δ = scaling · B_flat @ (λ · A · γ)_flat, of full rank. Linear
and HF Conv1D.

(arXiv:2502.00987; PEFT 0.21 randlora/layer.py, get_scaled_bases.) A [r, 1, ≥ min] and B [≥ max, ≥ n, r] are
shared by all modules, λ [r, n] and γ [n, min] belong to one, min and max being the smaller and the larger
side of the weight; scaling = randlora_alpha / r. The flat index of the scaled A is ρ · n + i and that of B is
i · r + ρ, as in PEFT. A side of length n · r is read from the file for each tile if it does not fit in
memory. The bases of save_projection=False depend on the training's machine (PEFT draws them in bfloat16 or
float16).
"""

import torch

from lorafuse.adapters.reading.check_config import number
from lorafuse.adapters.reading.check_tensors import Dims, check_shapes, misfit, shape_of
from lorafuse.adapters.reading.directory import AdapterDir
from lorafuse.adapters.reading.modules import (
    NAMED,
    SHARED,
    Leaves,
    Updates,
    Warn,
    each_module,
    read_modules,
    take,
)
from lorafuse.adapters.updates import Update
from lorafuse.arithmetic.arena import Arena
from lorafuse.errors import AdapterError
from lorafuse.patches.factor import READ_NUMEL, Factor, load
from lorafuse.patches.lowrank import LowRank
from lorafuse.patches.patch import Patch
from lorafuse.patches.target import Target

SUPPORTED = "Linear, HF Conv1D; with saved projections"
MEMORY = "tiles"

_LEAVES = rf"randlora_(lambda|gamma|[AB]){NAMED}"
_BASES = ("randlora_A", "randlora_B")


def updates(adapter: AdapterDir, scale: float, warn: Warn) -> Updates:
    """One for the weight of each module."""
    modules, ignored = read_modules(adapter, _LEAVES)
    alpha = scale * number(adapter, "randlora_alpha", 640)
    shared = take(adapter, SHARED, modules.get(SHARED, {}), _BASES)

    def of_module(module: str, leaves: Leaves) -> list[Update]:
        own = take(adapter, module, leaves, ("randlora_lambda", "randlora_gamma"))
        if own is None:
            return []
        # PEFT saves the shared bases once as such and once more for every module.
        copies = take(adapter, module, leaves, _BASES)
        if shared and copies:
            ignored.update(dict.fromkeys(copies, "a copy of the bases that all modules share"))
        bases = shared or copies
        if bases is None:
            raise AdapterError(
                f"{adapter.file}: holds no base_model.randlora_A, and what PEFT would draw in its place "
                "depends on the machine; save the adapter with save_projection=True."
            )
        used = (*bases, *own)
        # B may have more n than a module needs.
        dims: tuple[Dims, ...] = (("r", 1, "in of A"), ("out", "n of B", "r"), ("r", "n"), ("n", "in"))
        rank = check_shapes(adapter, *zip(used, dims, strict=True))["r"]
        keys = dict(zip(("A", "B", "lambda", "gamma"), used, strict=True))
        return [
            Update(
                f"{module}.weight",
                (*own, *bases),
                make=lambda target: _patch(adapter, keys, alpha / rank, target),
            )
        ]

    return each_module(adapter, modules, of_module, warn), ignored


def _patch(adapter: AdapterDir, keys: dict[str, str], scale: float, target: Target) -> Patch:
    n, short = shape_of(adapter, keys["gamma"])
    shape = target.spec.shape
    if len(shape) != 2 or min(shape) != short:
        raise misfit(adapter, target, keys["gamma"])
    if shape_of(adapter, keys["A"])[2] < short:
        raise misfit(adapter, target, keys["A"])
    if shape_of(adapter, keys["B"])[0] < max(shape) or shape_of(adapter, keys["B"])[1] < n:
        raise misfit(adapter, target, keys["B"])
    n_out, n_in = shape[:: -1 if target.is_conv1d else 1]
    long, scaled = Basis(adapter, keys["B"], max(shape), n), ScaledBasis(adapter, keys)
    if (n_out >= n_in) != target.is_conv1d:
        return LowRank(long, scaled, scale)
    return LowRank(TurnedScaledBasis(scaled), TurnedBasis(long), scale)


class Basis:
    """B, flat: [n_rows, n · r] of the stored [≥ n_rows, ≥ n, r]."""

    def __init__(self, adapter: AdapterDir, key: str, n_rows: int, n: int) -> None:
        self._factor = Factor(adapter.store, key)
        self.shape = n_rows, n * shape_of(adapter, key)[2]
        self.nbytes = 4 * self.shape[0] * self.shape[1]

    def whole(self, arena: Arena) -> torch.Tensor:
        kept = torch.empty(self.shape, dtype=torch.float32, device=arena.device)
        step = max(READ_NUMEL // self._factor.shape[1], 1)
        for start in range(0, self.shape[0], step):
            stop = min(start + step, self.shape[0])
            kept[start:stop] = self.rows(start, stop, arena)
        return kept

    def rows(self, start: int, stop: int, arena: Arena) -> torch.Tensor:
        return self._factor.rows(start, stop, arena)[:, : self.shape[1]]


class ScaledBasis:
    """λ · A · γ, flat: [r · n, short]."""

    def __init__(self, adapter: AdapterDir, keys: dict[str, str]) -> None:
        self._store, self._lambda = adapter.store, keys["lambda"]
        self._a, self._gamma = Factor(adapter.store, keys["A"]), Factor(adapter.store, keys["gamma"])
        self.shape = self._a.shape[0] * self._gamma.shape[0], self._gamma.shape[1]
        self.nbytes = 4 * self.shape[0] * self.shape[1]

    def whole(self, arena: Arena) -> torch.Tensor:
        kept = torch.empty(self.shape, dtype=torch.float32, device=arena.device)
        step = max(READ_NUMEL // self.shape[0], 1)
        for start in range(0, self.shape[1], step):
            stop = min(start + step, self.shape[1])
            kept[:, start:stop] = self.cols(start, stop, arena)
        return kept

    def cols(self, start: int, stop: int, arena: Arena) -> torch.Tensor:
        strength = load(self._store, self._lambda, arena.device)  # float32 [r, n]
        a = (
            self._a.cols(start, stop, arena)[:, None, :] * strength[:, :, None]
        )  # float32 [r, n, stop - start]
        return a.mul_(self._gamma.cols(start, stop, arena)).flatten(end_dim=1)


class TurnedBasis:
    """B, transposed: a right factor, contiguous so that products of a part and of a whole round alike."""

    def __init__(self, basis: Basis) -> None:
        self._basis, self.nbytes = basis, basis.nbytes
        self.shape = basis.shape[::-1]

    def whole(self, arena: Arena) -> torch.Tensor:
        kept = torch.empty(self.shape, dtype=torch.float32, device=arena.device)
        step = max(READ_NUMEL // self.shape[0], 1)
        for start in range(0, self.shape[1], step):
            stop = min(start + step, self.shape[1])
            kept[:, start:stop] = self._basis.rows(start, stop, arena).T
        return kept

    def cols(self, start: int, stop: int, arena: Arena) -> torch.Tensor:
        return self._basis.rows(start, stop, arena).T.contiguous()


class TurnedScaledBasis:
    """λ · A · γ, transposed: a left factor."""

    def __init__(self, scaled: ScaledBasis) -> None:
        self._scaled, self.nbytes = scaled, scaled.nbytes
        self.shape = scaled.shape[::-1]

    def whole(self, arena: Arena) -> torch.Tensor:
        return self._scaled.whole(arena).T

    def rows(self, start: int, stop: int, arena: Arena) -> torch.Tensor:
        return self._scaled.cols(start, stop, arena).T
