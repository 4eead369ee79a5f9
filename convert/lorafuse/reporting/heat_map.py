"""Heat maps of a grid as SVG: a row for each module, a column for each layer, a shade for each figure."""

import math
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from lorafuse.errors import shown
from lorafuse.reporting.figures import Figures, Grid
from lorafuse.reporting.markup import Markup, element

ROW, GAP, AXIS, CHARACTER = 18, 2, 20, 7.0  # pixels; the width of a character of a label
WIDTH, NARROWEST, WIDEST = 860, 6, 30  # of all columns, and of one
LONGEST_LABEL = 36
N_SHADES = 7
TICK_WIDTH = 28


@dataclass(frozen=True)
class Scale:
    """Shades of a figure: the n-th of them up to the n-th bound. `ramp` is the colours' name in page.css."""

    ramp: str
    bounds: Sequence[float]
    labels: Sequence[str]
    at: Callable[[float], float] = lambda value: value

    def shade(self, value: float) -> str:
        return f"{self.ramp}{bisect_left(self.bounds, self.at(value))}"


@dataclass(frozen=True)
class HeatMap:
    """One figure of a grid."""

    title: str
    explained: str
    of: Callable[[Figures], float | None]
    scale: Callable[[Sequence[float]], Scale]


def number(value: float | None) -> str:
    """A figure with four digits."""
    return "–" if value is None else f"{value:.4g}"


def _by_size(values: Sequence[float]) -> Scale:
    """Bounds that divide what there is into equal factors."""
    positive = [value for value in values if value > 0]
    low, high = (min(positive), max(positive)) if positive else (0.0, 0.0)
    if not low or high / low < 1.01:
        return Scale("size-", (), [number(high)])
    factor = (high / low) ** (1 / N_SHADES)
    bounds = [low * factor**i for i in range(1, N_SHADES)]
    edges = [low, *bounds, high]
    labels = [f"{edges[i]:.2g} – {edges[i + 1]:.2g}" for i in range(N_SHADES)]
    return Scale("size-", bounds, labels)


def _by_loss(values: Sequence[float]) -> Scale:
    """How far `kept` is from all of the update."""
    bounds = (0.001, 0.01, 0.03, 0.1, 0.5)
    labels = [*(f"within {bound:.1%} of 1".replace(".0%", "%") for bound in bounds), "further from 1"]
    return Scale("loss-", bounds, labels, lambda kept: abs(1 - kept))


def _by_noise(values: Sequence[float]) -> Scale:
    bounds = (0.03, 0.1, 0.3, 1.0, 3.0)
    return Scale("loss-", bounds, [*(f"up to {bound:g}" for bound in bounds), "more than 3"])


HEAT_MAPS = (
    HeatMap(
        "Size of the update, ‖Δ‖ / ‖W‖",
        "The stronger the shade, the more training changed the weight, in relation to the weight.",
        lambda figures: figures.delta_rel,
        _by_size,
    ),
    HeatMap(
        "Kept",
        "The share of the update that is in the stored weights: 1 is all of it. The stronger the shade, the "
        "further from 1.",
        lambda figures: figures.kept,
        _by_loss,
    ),
    HeatMap(
        "Noise",
        "What rounding added, in relation to the update. The stronger the shade, the more.",
        lambda figures: figures.noise,
        _by_noise,
    ),
)


def heat_map(grid: Grid, which: HeatMap) -> Markup:
    """A figure with its caption, the map, and the legend of its shades."""
    known = [(cell, value) for cell in grid.cells if (value := which.of(cell.figures)) is not None]
    scale = which.scale([value for _, value in known])
    label_width = CHARACTER * min(max(map(len, grid.rows)), LONGEST_LABEL) + 12
    step = min(max(WIDTH / len(grid.columns), NARROWEST), WIDEST)
    width, height = label_width + step * len(grid.columns), AXIS + ROW * len(grid.rows)
    values = {(cell.column, cell.row): value for cell, value in known}
    cells = [
        _cell(grid, column, row, values.get((column, row)), scale, (label_width + step * column, step))
        for column in range(len(grid.columns))
        for row in range(len(grid.rows))
    ]
    labels = [
        element("text", shown(name, LONGEST_LABEL), x=_px(label_width - 8), y=AXIS + ROW * row + 13,
                text_anchor="end")
        for row, name in enumerate(grid.rows)
    ]  # fmt: skip
    svg = element(
        "svg", labels, _axis(grid, label_width, step), cells, role="img", width=_px(width), height=height,
        aria_label=_summary(which, grid, known), viewBox=f"0 0 {_px(width)} {height}",
    )  # fmt: skip
    scroll = element("div", svg, class_="scroll", tabindex=0, role="group", aria_label=which.title)
    caption = element("figcaption", element("strong", which.title), " ", which.explained)
    return element("figure", caption, scroll, _legend(scale))


def _cell(
    grid: Grid, column: int, row: int, value: float | None, scale: Scale, x_and_step: tuple[float, float]
) -> Markup:
    x, step = x_and_step
    said = "not changed" if value is None else number(value)
    title = element("title", f"{grid.column_name(column)}, {grid.rows[row]}: {said}")
    gap = GAP if step > 2 * NARROWEST else 1
    return element(
        "rect", title, class_="none" if value is None else scale.shade(value), x=_px(x),
        y=AXIS + ROW * row, width=_px(step - gap), height=ROW - GAP,
    )  # fmt: skip


def _axis(grid: Grid, x: float, step: float) -> list[Markup]:
    """The numbers of layers over the columns, as many as there is room for."""
    apart = math.ceil(TICK_WIDTH / step)
    nice = (1, 2, 4, 5, 8, 10, 16, 20, 32)
    every = nice[min(bisect_right(nice, apart - 1), len(nice) - 1)]
    return [
        element("text", first, x=_px(x + step * (column + 0.5)), y=AXIS - 7, text_anchor="middle")
        for column, (first, _) in enumerate(grid.columns)
        if column % every == 0
    ]


def _legend(scale: Scale) -> Markup:
    """The shades and what they stand for."""
    items = [
        element("li", element("svg", element("rect", class_=f"{scale.ramp}{i}", width=14, height=14),
                              width=14, height=14, aria_hidden="true"), label)
        for i, label in enumerate(scale.labels)
    ]  # fmt: skip
    return element("ul", items, class_="legend")


def _summary(which: HeatMap, grid: Grid, known: Sequence[tuple[object, float]]) -> str:
    """What a person sees at a glance, for those who do not see it."""
    shape = f"{which.title}: {len(grid.rows)} modules in {len(grid.columns)} columns of layers"
    if not known:
        return f"{shape}, no figures."
    values = [value for _, value in known]
    return f"{shape}, from {number(min(values))} to {number(max(values))}. The table below has all figures."


def _px(value: float) -> str:
    return f"{value:.1f}".removesuffix(".0")
