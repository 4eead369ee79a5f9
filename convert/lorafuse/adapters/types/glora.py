"""PEFT's GLoRA: W' = W + W ∘ A + B and b' = b + b ∘ D + E + W @ C, W and b being the base's.

(arXiv:2306.07967; PEFT 0.21 glora/layer.py, merge.) Each of A to E is a product `Xd @ Xu`, a vector or one
number `X`, or switched off, which PEFT saves as a tensor `zeros`; which one it is, the tensors say. C, D and
E exist for layers with a bias. Linear only.
"""

from functools import partial

import torch

from lorafuse.adapters.reading.check_tensors import check_shapes, misfit, shape_of
from lorafuse.adapters.reading.directory import AdapterDir
from lorafuse.adapters.reading.keys import check_float
from lorafuse.adapters.reading.modules import Leaves, Updates, Warn, each_module, read_modules, take
from lorafuse.adapters.updates import Update
from lorafuse.arithmetic.arena import Arena
from lorafuse.codecs.sources import Sources
from lorafuse.patches.patch import Base, Patch
from lorafuse.patches.row_function import RowFunction, Tensors, reading_nbytes, tile_nbytes
from lorafuse.patches.target import Target

SUPPORTED = "Linear: weight and bias"
MEMORY = "tiles"

_LEAVES = r"glora_[A-E](\.(?P<name>[^.]+))?\.(Xd|Xu|X|zeros)"
_OFF = "zeros of a path that is switched off"


def updates(adapter: AdapterDir, scale: float, warn: Warn) -> Updates:
    """One for the weight and one for the bias of each module that changes it."""
    modules, ignored = read_modules(adapter, _LEAVES)

    def of_module(module: str, leaves: Leaves) -> list[Update]:
        for leaf in [leaf for leaf in leaves if leaf.endswith(".zeros")]:
            ignored[leaves.pop(leaf)] = _OFF
        weight, bias = (_take_paths(adapter, module, leaves, letters) for letters in ("AB", "CDE"))
        result: list[Update] = []
        name = f"{module}.weight"
        if weight:
            result.append(
                Update(name, tuple(weight.values()), make=partial(_weight_patch, adapter, weight, scale))
            )
        if bias:
            make = partial(_bias_patch, adapter, bias, scale)
            result.append(Update(f"{module}.bias", tuple(bias.values()), make=make, beside=name))
        return result

    return each_module(adapter, modules, of_module, warn), ignored


def _take_paths(adapter: AdapterDir, module: str, leaves: Leaves, letters: str) -> dict[str, str]:
    """{"A.Xd": key}, taken."""
    keys: dict[str, str] = {}
    for letter in letters:
        single = leaves.pop(f"glora_{letter}.X", None)
        if single is not None:
            check_float(adapter, single)
            keys[f"{letter}.X"] = single
            continue
        pair = take(adapter, module, leaves, (f"glora_{letter}.Xd", f"glora_{letter}.Xu"))
        if pair is not None:
            check_shapes(adapter, (pair[0], ("out", "r")), (pair[1], ("r", "in")))
            keys |= {f"{letter}.Xd": pair[0], f"{letter}.Xu": pair[1]}
    return keys


def _check_path(
    adapter: AdapterDir, keys: dict[str, str], letter: str, n_rows: int, n_cols: int, target: Target
) -> None:
    """A path is [n_rows, n_cols] as a product; as a vector it has one number a row."""
    if f"{letter}.Xd" in keys:
        down, up = keys[f"{letter}.Xd"], keys[f"{letter}.Xu"]
        if (shape_of(adapter, down)[0], shape_of(adapter, up)[1]) != (n_rows, n_cols):
            raise misfit(adapter, target, down)
    elif f"{letter}.X" in keys:
        key = keys[f"{letter}.X"]
        if shape_of(adapter, key) not in ((1,), (n_rows,), (n_rows, 1)):
            raise misfit(adapter, target, key)


def _rows(t: Tensors, letter: str, start: int, stop: int) -> torch.Tensor | None:
    """Rows of a path: [stop - start, n_cols], [stop - start, 1] or [1]; None where it is switched off."""
    if f"{letter}.Xd" in t:
        return t[f"{letter}.Xd"][start:stop] @ t[f"{letter}.Xu"]
    single = t.get(f"{letter}.X")
    return single if single is None or single.shape == (1,) else single.view(-1, 1)[start:stop]


def _weight_patch(adapter: AdapterDir, keys: dict[str, str], scale: float, target: Target) -> Patch:
    if len(target.spec.shape) != 2:
        raise misfit(adapter, target, next(iter(keys.values())))
    for letter in "AB":
        _check_path(adapter, keys, letter, *target.spec.shape, target)
    facts = {"scale": scale} | ({"rank": shape_of(adapter, keys["A.Xd"])[1]} if "A.Xd" in keys else {})
    update = partial(_add, factor="A", summand="B", scale=scale)
    return RowFunction(adapter.store, keys, update, scratch_nbytes=2 * tile_nbytes(target.spec), facts=facts)


def _bias_patch(adapter: AdapterDir, keys: dict[str, str], scale: float, target: Target) -> Patch:
    weight = target.beside
    assert weight is not None, "the update asked for the weight"
    n_out = weight.spec.shape[0]
    if target.spec.shape != (n_out,) or len(weight.spec.shape) != 2:
        raise misfit(adapter, target, next(iter(keys.values())))
    _check_path(adapter, keys, "C", weight.spec.n_cols, 1, target)
    for letter in "DE":
        _check_path(adapter, keys, letter, n_out, 1, target)
    return RowFunction(
        adapter.store,
        keys,
        partial(_add_to_bias, scale=scale),
        begin=partial(_begin_bias, weight=weight),
        begin_nbytes=reading_nbytes(weight.spec) + weight.nbytes + 4 * (n_out + weight.spec.n_cols),
        scratch_nbytes=2 * tile_nbytes(target.spec),
        facts={"scale": scale},
    )


def _add(tile: torch.Tensor, first_row: int, t: Tensors, factor: str, summand: str, scale: float) -> None:
    """W += scale · (W ∘ factor + summand), of W before either."""
    by, more = (_rows(t, letter, first_row, first_row + tile.shape[0]) for letter in (factor, summand))
    if by is not None:
        tile.addcmul_(tile, by, value=scale)
    if more is not None:
        tile.add_(more, alpha=scale)


def _add_to_bias(tile: torch.Tensor, first_row: int, t: Tensors, scale: float) -> None:
    _add(tile, first_row, t, "D", "E", scale)
    if "W @ C" in t:
        tile.add_(t["W @ C"][first_row : first_row + tile.shape[0]], alpha=scale)


def _begin_bias(t: Tensors, weight: Sources) -> Tensors:
    n_out, n_in = weight.spec.shape
    column = _rows(t, "C", 0, n_in)
    if column is None:
        return t
    product = torch.empty(n_out, 1, dtype=torch.float32, device=column.device)
    for start, rows in Base(weight, Arena(column.device)).tiles():
        torch.mm(rows, column.expand(n_in, 1), out=product[start : start + rows.shape[0]])
    return t | {"W @ C": product}
