"""PEFT's RandLoRA: a sum over n random bases, Δ = scaling · B_flat @ (λ · A · γ)_flat, of full rank. Linear and HF Conv1D.

(arXiv:2502.00987; PEFT 0.21 randlora/layer.py, get_scaled_bases.) A [r, 1, ≥ min] and B [≥ max, ≥ n, r] are shared by all
modules, λ [r, n] and γ [n, min] belong to one, min and max being the smaller and the larger side of the weight; scaling =
randlora_alpha / r. The flat index of the scaled A is ρ · n + i and that of B is i · r + ρ, as in PEFT. A side of length n · r is
read from the file for each tile if it does not fit in memory. The bases of save_projection=False depend on the training's machine
(PEFT draws them in bfloat16 or float16).
"""

import torch

from lorafuse.adapters.factor import READ_NUMEL, Factor, load
from lorafuse.adapters.lowrank import LowRank
from lorafuse.adapters.patch import Patch, Target, Update
from lorafuse.adapters.shared import (
    NAMED,
    SHARED,
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
)
from lorafuse.adapters.store import AdapterDir
from lorafuse.codecs.sources import Arena
from lorafuse.errors import AdapterError

_LEAVES = rf"randlora_(lambda|gamma|[AB]){NAMED}"


def updates(adapter: AdapterDir, scale: float, warn: Warn) -> Found:
    """One for the weight of each module."""
    modules, ignored = read_modules(adapter, _LEAVES)
    alpha = scale * number(adapter, "randlora_alpha", 640)
    shared = _take_bases(adapter, SHARED, modules.get(SHARED, {}))

    def of_module(module: str, leaves: Leaves) -> list[Update]:
        taken = take(adapter, module, leaves, ("randlora_lambda", "randlora_gamma"))
        if taken is None:
            return []
        own = _take_bases(adapter, module, leaves)
        if shared and own:
            ignored.update(dict.fromkeys(own.values(), "a copy of the bases that all modules share"))
        bases = shared or own
        if bases is None:
            raise AdapterError(
                f"{adapter.file}: holds no base_model.randlora_A, and what PEFT would draw in its place depends on the machine; "
                "save the adapter with save_projection=True."
            )
        keys = bases | dict(zip(("lambda", "gamma"), taken.values(), strict=True))
        rank = shape_of(adapter, keys["A"])[0]
        strength, gamma = (shape_of(adapter, keys[name]) for name in ("lambda", "gamma"))
        expect(adapter, keys["lambda"], len(strength) == 2 and strength[0] == rank, f"[{rank}, n]")
        expect(adapter, keys["gamma"], len(gamma) == 2 and gamma[0] == strength[1], f"[{strength[1]}, in]")
        used = (*taken.values(), *bases.values())
        return [Update(f"{module}.weight", used, make=lambda target: _patch(adapter, keys, alpha / rank, target))]

    return each_module(adapter, modules, of_module), ignored


def _take_bases(adapter: AdapterDir, module: str, leaves: Leaves) -> dict[str, str] | None:
    """PEFT saves the shared bases once as such and once more for every module."""
    taken = take(adapter, module, leaves, ("randlora_A", "randlora_B"))
    if taken is None:
        return None
    keys = dict(zip("AB", taken.values(), strict=True))
    a, b = shape_of(adapter, keys["A"]), shape_of(adapter, keys["B"])
    expect(adapter, keys["A"], len(a) == 3 and a[1] == 1, "[r, 1, in]")
    expect(adapter, keys["B"], len(b) == 3 and b[2] == a[0], f"[out, n, {a[0]}]")
    return keys


def _patch(adapter: AdapterDir, keys: dict[str, str], scale: float, target: Target) -> Patch:
    n, short = shape_of(adapter, keys["gamma"])
    shape = target.spec.shape
    if len(shape) != 2 or min(shape) != short:
        raise misfit(adapter, keys["gamma"], target)
    if shape_of(adapter, keys["A"])[2] < short:
        raise misfit(adapter, keys["A"], target)
    if shape_of(adapter, keys["B"])[0] < max(shape) or shape_of(adapter, keys["B"])[1] < n:
        raise misfit(adapter, keys["B"], target)
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
        kept = torch.empty(self.shape, device=arena.device)
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
        return self.cols(0, self.shape[1], arena)

    def cols(self, start: int, stop: int, arena: Arena) -> torch.Tensor:
        strength = load(self._store, self._lambda, arena.device)  # float32 [r, n]
        a = self._a.cols(start, stop, arena)[:, None, :] * strength[:, :, None]  # float32 [r, n, stop - start]
        return a.mul_(self._gamma.cols(start, stop, arena)).flatten(end_dim=1)


class TurnedBasis:
    """B, transposed: a right factor, contiguous so that products of a part and of a whole round alike."""

    def __init__(self, basis: Basis) -> None:
        self._basis, self.nbytes = basis, basis.nbytes
        self.shape = basis.shape[::-1]

    def whole(self, arena: Arena) -> torch.Tensor:
        kept = torch.empty(self.shape, device=arena.device)
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
