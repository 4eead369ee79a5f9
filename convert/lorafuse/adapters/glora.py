"""PEFT's GLoRA: W' = W + W ∘ A + B and b' = b + b ∘ D + E + W @ C, W and b being the base's.

(arXiv:2306.07967; PEFT 0.21 glora/layer.py, merge.) Each of A to E is a product `Xd @ Xu`, a vector or one number `X`, or
switched off, which PEFT saves as a tensor `zeros`; which one it is, the tensors say. C, D and E exist for layers with a bias.
Linear only.
"""

from functools import partial

import torch

from lorafuse.adapters.keys import check_float
from lorafuse.adapters.patch import TILE_NUMEL, Base, Patch, Target, Update
from lorafuse.adapters.rowwise import RowWise, Tensors
from lorafuse.adapters.shared import Found, Leaves, Warn, each_module, expect, misfit, read_modules, shape_of, take
from lorafuse.adapters.store import AdapterDir

_LEAVES = r"glora_[A-E](\.(?P<name>[^.]+))?\.(Xd|Xu|X|zeros)"
_OFF = "zeros of a path that is switched off"


def updates(adapter: AdapterDir, scale: float, warn: Warn) -> Found:
    """One for the weight and one for the bias of each module that changes it."""
    modules, ignored = read_modules(adapter, _LEAVES)

    def of_module(module: str, leaves: Leaves) -> list[Update]:
        for leaf in [leaf for leaf in leaves if leaf.endswith(".zeros")]:
            ignored[leaves.pop(leaf)] = _OFF
        weight, bias = (_take_paths(adapter, module, leaves, letters) for letters in ("AB", "CDE"))
        result: list[Update] = []
        name = f"{module}.weight"
        if weight:
            result.append(Update(name, tuple(weight.values()), make=partial(_weight_patch, adapter, weight, scale)))
        if bias:
            make = partial(_bias_patch, adapter, bias, scale)
            result.append(Update(f"{module}.bias", tuple(bias.values()), make=make, beside=name))
        return result

    return each_module(adapter, modules, of_module), ignored


def _take_paths(adapter: AdapterDir, module: str, leaves: Leaves, letters: str) -> dict[str, str]:
    """{"A.Xd": key}, taken."""
    keys: dict[str, str] = {}
    for letter in letters:
        single = leaves.pop(f"glora_{letter}.X", None)
        if single is not None:
            check_float(adapter, single)
            keys[f"{letter}.X"] = single
            continue
        for leaf, key in (take(adapter, module, leaves, (f"glora_{letter}.Xd", f"glora_{letter}.Xu")) or {}).items():
            keys[leaf.removeprefix("glora_")] = key
    return keys


def _check_path(adapter: AdapterDir, keys: dict[str, str], letter: str, n_rows: int, n_cols: int, target: Target) -> None:
    """A path is [n_rows, n_cols] as a product; as a vector it has one number a row."""
    if f"{letter}.Xd" in keys:
        down, up = (shape_of(adapter, keys[f"{letter}.{leaf}"]) for leaf in ("Xd", "Xu"))
        expect(adapter, keys[f"{letter}.Xu"], len(down) == len(up) == 2 and up[0] == down[1], "[r, in] beside Xd [out, r]")
        if (down[0], up[1]) != (n_rows, n_cols):
            raise misfit(adapter, keys[f"{letter}.Xd"], target)
    elif f"{letter}.X" in keys:
        key = keys[f"{letter}.X"]
        expect(adapter, key, True, "one number, or a vector")
        if shape_of(adapter, key) not in ((1,), (n_rows,), (n_rows, 1)):
            raise misfit(adapter, key, target)


def _rows(t: Tensors, letter: str, start: int, stop: int) -> torch.Tensor | None:
    """Rows of a path: [stop - start, n_cols], [stop - start, 1] or [1]; None where it is switched off."""
    if f"{letter}.Xd" in t:
        return t[f"{letter}.Xd"][start:stop] @ t[f"{letter}.Xu"]
    single = t.get(f"{letter}.X")
    return single if single is None or single.shape == (1,) else single.view(-1, 1)[start:stop]


def _weight_patch(adapter: AdapterDir, keys: dict[str, str], scale: float, target: Target) -> Patch:
    if len(target.spec.shape) != 2:
        raise misfit(adapter, next(iter(keys.values())), target)
    for letter in "AB":
        _check_path(adapter, keys, letter, *target.spec.shape, target)

    def update(tile: torch.Tensor, first_row: int, t: Tensors) -> None:
        factor, summand = (_rows(t, letter, first_row, first_row + tile.shape[0]) for letter in "AB")
        if factor is not None:
            tile.addcmul_(tile, factor, value=scale)
        if summand is not None:
            tile.add_(summand, alpha=scale)

    facts = {"scale": scale} | ({"rank": shape_of(adapter, keys["A.Xd"])[1]} if "A.Xd" in keys else {})
    return RowWise(adapter.store, keys, update, scratch_nbytes=8 * max(TILE_NUMEL, target.spec.n_cols), facts=facts)


def _bias_patch(adapter: AdapterDir, keys: dict[str, str], scale: float, target: Target) -> Patch:
    weight = target.beside
    assert weight is not None, "the update asked for the weight"
    n_out = weight.spec.shape[0]
    if target.spec.shape != (n_out,) or len(weight.spec.shape) != 2:
        raise misfit(adapter, next(iter(keys.values())), target)
    _check_path(adapter, keys, "C", weight.spec.n_cols, 1, target)
    for letter in "DE":
        _check_path(adapter, keys, letter, n_out, 1, target)

    def begin(t: Tensors, base: Base) -> Tensors:
        column = _rows(t, "C", 0, weight.spec.n_cols)
        if column is None:
            return t
        product = torch.empty(n_out, 1, device=column.device)
        for start, rows in Base(weight, base.arena).tiles():
            torch.mm(rows, column.expand(weight.spec.n_cols, 1), out=product[start : start + rows.shape[0]])
        return t | {"W @ C": product}

    def update(tile: torch.Tensor, first_row: int, t: Tensors) -> None:
        start, stop = first_row, first_row + tile.shape[0]
        factor, summand = (_rows(t, letter, start, stop) for letter in "DE")
        if factor is not None:
            tile.addcmul_(tile, factor, value=scale)
        if summand is not None:
            tile.add_(summand, alpha=scale)
        if "W @ C" in t:
            tile.add_(t["W @ C"][start:stop], alpha=scale)

    # The weight's tiles: packed, decoded in two dtypes, and what the codec holds.
    reading_nbytes = 12 * max(TILE_NUMEL, weight.spec.n_cols) + weight.nbytes + 4 * n_out
    return RowWise(adapter.store, keys, update, begin=begin, begin_nbytes=reading_nbytes, facts={"scale": scale})
