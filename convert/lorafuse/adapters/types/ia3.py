"""PEFT's (IA)³: outputs or inputs of a layer times a trained vector, on Linear, HF Conv1D, Conv2d and Conv3d
(arXiv 2205.05638; PEFT 0.21 ia3/layer.py, merge).

A vector on the outputs scales rows (columns of an HF Conv1D) and the bias, one on the inputs (a feedforward
module) the other side. Its shape says which, (out, 1) or (1, in), except in convolutions, where
`feedforward_modules` of the config does.
"""

import math
import re
from functools import partial

import torch

from lorafuse.adapters.reading.check_tensors import misfit, shape_of, unexpected
from lorafuse.adapters.reading.directory import CONFIG, AdapterDir
from lorafuse.adapters.reading.keys import check_float
from lorafuse.adapters.reading.modules import NAMED, Leaves, Updates, Warn, collect
from lorafuse.adapters.updates import Update
from lorafuse.errors import AdapterError, shown
from lorafuse.files.patterns import Pattern
from lorafuse.patches.patch import Patch
from lorafuse.patches.row_function import RowFunction, Tensors, UpdateRows, tile_nbytes
from lorafuse.patches.target import Target

SUPPORTED = "Linear, HF Conv1D, Conv2d, Conv3d; feedforward, biases"
MEMORY = "tiles"

_LEAVES = rf"ia3_\w+{NAMED}"


def updates(adapter: AdapterDir, scale: float, warn: Warn) -> Updates:
    """One for the weight of each module, and one for its bias if the checkpoint has it and the outputs are
    scaled."""
    return collect(adapter, _LEAVES, partial(_rescale, adapter, scale), warn)


def _rescale(adapter: AdapterDir, scale: float, module: str, leaves: Leaves) -> list[Update]:
    key = leaves.pop("ia3_l", None)
    if key is None:
        return []
    check_float(adapter, key)
    shape = shape_of(adapter, key)
    numel = math.prod(shape)
    if len(shape) not in (2, 4, 5) or numel == 0 or numel != max(shape):
        raise unexpected(adapter, key, "a vector as PEFT stores it")
    on_inputs = _on_inputs(adapter, module, shape)
    make = _inputs_patch if on_inputs else _outputs_patch
    result = [Update(f"{module}.weight", (key,), make=partial(make, adapter, key, numel, scale))]
    if not on_inputs:
        result.append(
            Update(
                f"{module}.bias", (key,), make=partial(_rows_patch, adapter, key, numel, scale), optional=True
            )
        )
    return result


def _on_inputs(adapter: AdapterDir, module: str, shape: tuple[int, ...]) -> bool:
    """PEFT 0.21 ia3/model.py, _check_target_module_feedforward, where the shape leaves a choice."""
    if len(shape) == 2 and max(shape) > 1:
        return shape[0] == 1
    names, where = adapter.config.get("feedforward_modules"), adapter.folder / CONFIG
    if isinstance(names, str):
        try:
            return Pattern(rf"(?:{names})\Z").matches(module)
        except re.error as e:
            raise AdapterError(
                f"{where}: feedforward_modules is not a regular expression: {shown(e)}."
            ) from None
    if not isinstance(names, list):
        raise AdapterError(
            f"{where}: feedforward_modules is {shown(names)}, expected a list or a regular expression."
        )
    return any(module.endswith(str(name)) for name in names)


def _outputs_patch(adapter: AdapterDir, key: str, numel: int, scale: float, target: Target) -> Patch:
    shape = target.spec.shape
    plain = len(shape) == 2
    if numel == shape[0] and not (plain and target.is_conv1d and shape[0] == shape[1]):
        return _rows_patch(adapter, key, numel, scale, target)
    if plain and numel == shape[1]:
        return _columns_patch(adapter, key, numel, scale, target, n_groups=1)
    raise misfit(adapter, target, key)


def _inputs_patch(adapter: AdapterDir, key: str, numel: int, scale: float, target: Target) -> Patch:
    shape = target.spec.shape
    if len(shape) == 2 and numel == shape[0] and (target.is_conv1d or numel != shape[1]):
        return _rows_patch(adapter, key, numel, scale, target)
    # A convolution with groups has only the inputs of its group in each row.
    n_groups = numel // shape[1] if len(shape) > 1 and shape[1] else 0
    if (
        n_groups == 0
        or n_groups * shape[1] != numel
        or shape[0] % n_groups
        or (len(shape) == 2 and n_groups > 1)
    ):
        raise misfit(adapter, target, key)
    return _columns_patch(adapter, key, numel, scale, target, n_groups)


def _rows_patch(adapter: AdapterDir, key: str, numel: int, scale: float, target: Target) -> Patch:
    if numel != target.spec.shape[0]:
        raise misfit(adapter, target, key)
    return _patch(adapter, key, numel, _scale_rows, scale, 0)


def _columns_patch(
    adapter: AdapterDir, key: str, numel: int, scale: float, target: Target, n_groups: int
) -> Patch:
    update = partial(_scale_columns, n_groups=n_groups, rows_per_group=target.spec.shape[0] // n_groups)
    # The factors of each row, and the numbers of rows and of their groups.
    scratch_nbytes = (tile_nbytes(target.spec) if n_groups > 1 else 0) + 24 * target.spec.shape[0]
    return _patch(adapter, key, numel, update, scale, scratch_nbytes)


def _patch(
    adapter: AdapterDir, key: str, numel: int, update: UpdateRows, scale: float, scratch_nbytes: int
) -> Patch:
    return RowFunction(
        adapter.store,
        {"l": key},
        update,
        begin=partial(_begin, scale=scale),
        begin_nbytes=20 * numel,
        scratch_nbytes=scratch_nbytes,
        facts={"scale": scale},
    )


def _begin(tensors: Tensors, scale: float) -> Tensors:
    factor = tensors["l"].flatten()
    return {"by": factor if scale == 1 else (1 + scale * (factor.double() - 1)).float()}


def _scale_rows(tile: torch.Tensor, first_row: int, tensors: Tensors) -> None:
    tile.mul_(tensors["by"][first_row : first_row + tile.shape[0], None])


def _scale_columns(
    tile: torch.Tensor, first_row: int, tensors: Tensors, n_groups: int, rows_per_group: int
) -> None:
    rows = torch.arange(first_row, first_row + tile.shape[0], device=tile.device)
    by = tensors["by"].view(n_groups, -1)  # [n_groups, inputs of a group]
    by = by[rows.div(rows_per_group, rounding_mode="floor")] if n_groups > 1 else by
    tile.view(len(rows), by.shape[1], -1).mul_(by[:, :, None])
