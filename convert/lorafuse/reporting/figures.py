"""The weights of a receipt in groups: by module, and by layer and module. Experts of a layer are one group.

The figures of a group are those of one long vector of all its weights.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from lorafuse.files.names import Place, natural_key, place_of
from lorafuse.receipt.read import Entries, delta_rel_in_sum, kept_in_sum

MAX_CELLS = 3600  # of all grids, so that a page has few megabytes whatever the model is
MAX_COLUMNS, MAX_ROWS = 128, 40


class Figures(NamedTuple):
    """How many merged weights a group has, and the measures over all of them; None where none has a
    meaning."""

    n: int
    delta_rel: float | None
    kept: float | None
    noise: float | None
    least: float | None


def figures_of(merged: Entries) -> Figures:
    """The figures of merged weights."""
    update = kept_in_sum(merged, {})
    return Figures(len(merged), delta_rel_in_sum(merged), update["kept"], update["noise"], update["least"])


@dataclass
class Module:
    """The weights of one module in all layers of a stack."""

    name: str
    n_layers: int = 0
    weights: dict[str, Mapping[str, Any]] = field(default_factory=dict)

    @property
    def merged(self) -> Entries:
        return {name: entry for name, entry in self.weights.items() if entry["action"] == "merged"}


def modules_of(tensors: Entries) -> list[Module]:
    """The weights by module, in their natural order: `model.layers.*.mlp.up_proj`."""
    modules: dict[str, Module] = {}
    layers: dict[str, set[int | None]] = {}
    for name, entry in tensors.items():
        place = place_of(name)
        key = place.kind
        modules.setdefault(key, Module(key)).weights[name] = entry
        layers.setdefault(key, set()).add(place.layer)
    for key, module in modules.items():
        module.n_layers = len(layers[key] - {None})
    return [modules[key] for key in sorted(modules, key=natural_key)]


class Cell(NamedTuple):
    """The merged weights of one module in one layer, or in a few layers that follow each other."""

    column: int
    row: int
    figures: Figures


@dataclass(frozen=True)
class Grid:
    """A stack of layers: modules with merged weights in `rows`, layers in `columns`, as first and last layer
    of each. `n_left_out`: modules that have no row."""

    stack: str
    rows: list[str]
    columns: list[tuple[int, int]]
    cells: list[Cell]
    n_left_out: int

    def column_name(self, column: int) -> str:
        first, last = self.columns[column]
        return f"layer {first}" if first == last else f"layers {first}–{last}"


def grids_of(tensors: Entries) -> list[Grid]:
    """A grid for each stack of layers that has merged weights, those with the most first, within
    MAX_CELLS."""
    layers: dict[str, set[int]] = {}
    merged: dict[str, dict[str, Place]] = {}
    for name, entry in tensors.items():
        place = place_of(name)
        if place.layer is not None:
            layers.setdefault(place.stack, set()).add(place.layer)
            if entry["action"] == "merged":
                merged.setdefault(place.stack, {})[name] = place
    grids: list[Grid] = []
    left = MAX_CELLS
    for stack in sorted(merged, key=lambda stack: (-len(merged[stack]), stack)):
        grid = _grid(stack, sorted(layers[stack]), merged[stack], tensors, left)
        if grid:
            grids.append(grid)
            left -= len(grid.rows) * len(grid.columns)
    return grids


def _grid(
    stack: str, layers: list[int], merged: Mapping[str, Place], tensors: Entries, most_cells: int
) -> Grid | None:
    """The grid of a stack in at most so many cells; None where not even one column fits."""
    modules = sorted({place.module for place in merged.values()}, key=natural_key)
    rows = modules[:MAX_ROWS]
    n_columns = min(MAX_COLUMNS, most_cells // len(rows))
    if not n_columns:
        return None
    width = -(-len(layers) // n_columns)
    parts = [layers[i : i + width] for i in range(0, len(layers), width)]
    column_of = {layer: column for column, part in enumerate(parts) for layer in part}
    row_of = {module: row for row, module in enumerate(rows)}
    groups: dict[tuple[int, int], dict[str, Mapping[str, Any]]] = {}
    for name, place in merged.items():
        if place.layer is not None and place.module in row_of:
            where = column_of[place.layer], row_of[place.module]
            groups.setdefault(where, {})[name] = tensors[name]
    cells = [Cell(column, row, figures_of(group)) for (column, row), group in groups.items()]
    columns = [(part[0], part[-1]) for part in parts]
    return Grid(stack, rows, columns, sorted(cells, key=lambda cell: cell[:2]), len(modules) - len(rows))
