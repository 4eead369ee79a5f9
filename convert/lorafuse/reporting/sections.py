"""The parts of the page, each from the receipt."""

import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from lorafuse.errors import sized
from lorafuse.receipt.fields import Receipt
from lorafuse.receipt.in_words import ACTIONS, percent, too_little_text
from lorafuse.receipt.no_update import no_update
from lorafuse.receipt.read import (
    ENOUGH_KEPT,
    kept_in_sum,
    merged_inputs,
    sizes_in_sum,
    worst_first,
)
from lorafuse.reporting.figures import Figures, Grid, figures_of, grids_of, modules_of
from lorafuse.reporting.files_and_sizes import MOST_LINES, is_number
from lorafuse.reporting.heat_map import HEAT_MAPS, heat_map, number
from lorafuse.reporting.markup import Child, Markup, element
from lorafuse.reporting.reproduce import convert_command, left_out, verify_command
from lorafuse.reporting.tables import code, command, facts, folded, rest, section, table

MOST_WORST, MOST_MODULES, MOST_GRIDS = 20, 300, 12
MEASURES = ("‖Δ‖ / ‖W‖", "kept", "noise")


def at_a_glance(receipt: Receipt) -> Markup:
    """What matters most, in a few large figures."""
    tensors, update, sizes = (
        receipt["tensors"],
        kept_in_sum(receipt["tensors"], receipt["settings"]),
        sizes_in_sum(receipt["tensors"]),
    )
    n_changed = sum(entry["action"] in ("merged", "replaced", "added") for entry in tensors.values())
    pairs = [("weights changed", f"{n_changed:,} of {len(tensors):,}")]
    if update["kept"] is not None:
        pairs = [
            ("of the update kept", percent(update["kept"])),
            ("kept where it is least", percent(update["least"])),
            ("noise of rounding", f"{update['noise']:.2g}"),
            *pairs,
        ]
    pairs.append(("weights in all", sized(sizes["nbytes"])))
    items = [element("div", element("dt", label), element("dd", figure)) for label, figure in pairs]
    return element("dl", items, class_="glance")


def warnings(receipt: Receipt) -> Markup:
    """What a reader should know before using the result; or that there is nothing."""
    found = [
        *too_little_text(kept_in_sum(receipt["tensors"], receipt["settings"])),
        *filter(None, [no_update(receipt["tensors"])]),
    ]
    ignored = receipt["adapter_tensors"]["ignored"]
    if ignored:
        were = (
            "1 tensor of the adapter was"
            if len(ignored) == 1
            else f"{len(ignored):,} tensors of the adapter were"
        )
        found.append(f"{were} ignored; “Left out” says why.")
    if not found:
        return element("p", element("strong", "Nothing to warn of: "), f"every weight keeps at least "
                       f"{ENOUGH_KEPT:.0%} of its update, and every tensor of the adapter was used.",
                       class_="notice good")  # fmt: skip
    items = [element("li", line) for line in found]
    return element("div", element("strong", "Warnings"), element("ul", items), class_="notice bad")


def what(receipt: Receipt, config: Mapping[str, Any]) -> Markup:
    """What was merged into what, and how."""
    tool = receipt["tool"]
    versions = ", ".join(f"{part} {tool[part]}" for part in ("torch", "python") if part in tool)
    ranks = Counter(
        (str(entry.get("rank")), str(entry.get("scale")))
        for entry in receipt["tensors"].values()
        if entry.get("rank") is not None
    )
    bases = [code(str(entry["path"])) for entry in merged_inputs(receipt, "checkpoint")]
    pairs: list[tuple[str, Child]] = [("base", bases or "not named"), ("base is", receipt["base_semantics"])]
    for adapter in merged_inputs(receipt, "adapter"):
        weight = "" if adapter["weight"] is None else f", weight {adapter['weight']}"
        pairs.append(("adapter", [code(str(adapter["path"])), weight]))
    pairs += [
        ("update", f"rank {rank}, scale {scale} ({n:,} weights)") for (rank, scale), n in ranks.most_common(5)
    ]
    architectures = config.get("architectures")
    names = f" ({', '.join(map(str, architectures))})" if isinstance(architectures, list) else ""
    actions = Counter(entry["action"] for entry in receipt["tensors"].values())
    pairs += [
        ("model", f"{config.get('model_type') or 'not named'}{names}"),
        ("settings", ", ".join(f"{name} {value}" for name, value in receipt["settings"].items())),
        ("weights", ", ".join(f"{n:,} {action}" for action, n in sorted(actions.items()))),
        ("made by", f"{tool.get('name')} {tool.get('version')} ({versions})"),
        ("cost", _cost(receipt)),
        ("plan", code(str(receipt.get("plan_id", "–")))),
    ]
    return section("What was merged", facts(pairs), folded("What these words mean", _legend()))


def _cost(receipt: Receipt) -> str:
    timing: Any = receipt.get("timing")
    spent: dict[str, Any] = timing if isinstance(timing, dict) else {}
    words = {"wall_s": "in all", "compute_cpu_s": "of a CPU to compute", "write_s": "to write"}
    said = [f"{spent[name]:,.1f} s {word}" for name, word in words.items() if is_number(spent.get(name))]
    peak = receipt.get("peak_rss")
    memory = [f"{sized(peak)} of memory at most"] if is_number(peak) else []
    return ", ".join([*said, *memory]) or "–"


def _legend() -> Markup:
    return facts([
        *ACTIONS.items(),
        ("‖Δ‖ / ‖W‖", "the norm of the update over the norm of the base weight"),
        ("kept", "⟨S − W, Δ⟩ / ⟨Δ, Δ⟩ for the stored weight S: 1 is the whole update, 0 is none of it"),
        ("noise", "‖S − W − Δ‖ / ‖Δ‖: what rounding added, relative to the update"),
        ("changed", "the share of elements whose stored value differs from the base's"),
    ])  # fmt: skip


def by_layer(receipt: Receipt) -> Markup | None:
    """The heat maps of each stack of layers, and their figures as a table."""
    grids = grids_of(receipt["tensors"])
    if not grids:
        return None
    n_left_out = len(grids) - MOST_GRIDS
    return section(
        "Layer by layer",
        [_grid(grid) for grid in grids[:MOST_GRIDS]],
        rest(n_left_out, "stacks of layers are in the table of modules only"),
    )


def _grid(grid: Grid) -> Markup:
    rows = (
        (
            f"{grid.column_name(cell.column)}, {grid.rows[cell.row]}",
            f"{cell.figures.n:,}",
            *_row(cell.figures),
        )
        for cell in grid.cells
    )
    head = ("where", "weights", *MEASURES, "least kept")
    maps = [heat_map(grid, which) for which in HEAT_MAPS]
    name = grid.stack or "layers"
    figures = table(f"Figures of {name}", head, rows, head[1:])
    left_out = rest(grid.n_left_out, "modules are in the table of modules only")
    return element("div", element("h3", code(name)), maps, left_out, folded("All figures", figures))


def _row(figures: Figures) -> list[str]:
    return [number(figures.delta_rel), number(figures.kept), number(figures.noise), number(figures.least)]


def worst(receipt: Receipt) -> Markup | None:
    """The weights that keep the least of their update."""
    names = worst_first(receipt["tensors"])
    if not names:
        return None
    head = ("weight", "rank", "scale", *MEASURES, "changed", "dtype", "shape")
    rows = ([*_worst_row(name, receipt["tensors"][name])] for name in names[:MOST_WORST])
    return section(
        "Worst weights",
        table("The weights that keep the least of their update", head, rows, head[1:7]),
        rest(len(names) - MOST_WORST, "weights were merged"),
    )


def _worst_row(name: str, entry: Mapping[str, Any]) -> Iterator[Child]:
    low = element("strong", " low", class_="low") if kept_in_sum({name: entry}, {})["n_below"] else None
    yield code(name)
    yield from (_value(entry.get(figure)) for figure in ("rank", "scale", "delta_rel"))
    yield [_value(entry.get("kept")), low]
    yield from (_value(entry.get(figure)) for figure in ("noise", "changed"))
    yield str(entry["dtype"])
    yield _shape(entry["shape"])


def _value(value: object) -> str:
    if isinstance(value, float):
        return number(value)
    return "–" if value is None else str(value)


def _shape(shape: Sequence[int]) -> str:
    return " × ".join(map(str, shape)) or "one value"


def modules(receipt: Receipt) -> Markup:
    """Every weight, those of a module as one line."""
    found = modules_of(receipt["tensors"])
    head = ("module", "layers", "weights", "what became of them", "parameters", *MEASURES)
    rows = []
    for module in found[:MOST_MODULES]:
        actions = Counter(entry["action"] for entry in module.weights.values())
        said = (
            next(iter(actions)) if len(actions) == 1 else ", ".join(f"{n:,} {a}" for a, n in actions.items())
        )
        numel = sum(math.prod(entry["shape"]) for entry in module.weights.values())
        figures = _row(figures_of(module.merged))[:3]
        rows.append(
            (
                code(module.name),
                module.n_layers or "–",
                f"{len(module.weights):,}",
                said,
                f"{numel:,}",
                *figures,
            )
        )
    return section(
        "All weights",
        element("p", "The weights of a module in all layers are one line; a star stands for a number.",
                class_="note"),
        table("All weights by module", head, rows, (head[1], head[2], *head[4:])),
        rest(len(found) - MOST_MODULES, "modules"),
    )  # fmt: skip


def left_over(receipt: Receipt) -> Markup | None:
    """Tensors that went nowhere, with the reason."""
    ignored, dropped = receipt["adapter_tensors"]["ignored"], receipt.get("dropped", {})
    lists = (("Ignored tensors of the adapter", ignored), ("Dropped tensors of the base", dropped))
    tables = [
        [table(caption, ("tensor", "why"), _reasons(reasons)), rest(len(reasons) - MOST_LINES, "tensors")]
        for caption, reasons in lists
        if reasons
    ]
    return section("Left out", tables) if tables else None


def _reasons(reasons: Mapping[str, object]) -> list[tuple[Child, Child]]:
    return [(code(name), str(reason)) for name, reason in list(reasons.items())[:MOST_LINES]]


def again(receipt: Receipt, out_dir: str) -> Markup:
    """How to make the result again, and how to check it."""
    version = receipt["tool"].get("version")
    hint = left_out(receipt)
    return section(
        "Make it again",
        element("p", f"With lorafuse {version} and the same inputs, this makes the same bytes:"),
        command(convert_command(receipt)),
        element("p", hint) if hint else None,
        element("p", "To check every file against the receipt, and with the inputs every byte of the merge:"),
        command(verify_command(receipt, out_dir)),
    )
