"""The weights of a checkpoint under other names: those that transformers 5 or 4 gives its parameters in
memory.

A naming maps the name of a weight to names in memory. `find` collects the weights that lie behind the names
asked for, and tells how they make up each parameter.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

from lorafuse.errors import shown
from lorafuse.naming.table import Component
from lorafuse.patches.target import Parameter, Part

Shape = tuple[int, ...]
MemoryNames = Callable[[str], list[tuple[str, Component | None]]]
# Model types whose stacks of experts are (E, in, out) in memory, from `grep is_transposed=True` in
# transformers 5.23 models.
_IN_OUT = frozenset({"gpt_oss", "openai_privacy_filter", "aria", "aria_text"})
# Those, and others whose code multiplies inputs with stacks that are (E, in, out).
IN_OUT = _IN_OUT | {"llama4", "llama4_text"}


@dataclass(frozen=True, slots=True)
class Unsupported:
    """A parameter whose weights are there, but whose update cannot be brought to them; `why` completes a
    sentence."""

    why: str


FoundAs = Parameter | Unsupported


def find(
    shapes: Mapping[str, Shape], wanted: Iterable[str], memory_names: MemoryNames, model_type: str
) -> dict[str, FoundAs]:
    """Those of the wanted parameters that the weights (name → shape) make up."""
    wanted = frozenset(wanted)
    behind: dict[str, list[tuple[str, Component | None]]] = {}
    for weight in sorted(shapes):
        for name, component in memory_names(weight):
            if name in wanted:
                behind.setdefault(name, []).append((weight, component))
    return {name: _make_up(weights, shapes, model_type) for name, weights in behind.items()}


def _make_up(
    weights: list[tuple[str, Component | None]], shapes: Mapping[str, Shape], model_type: str
) -> FoundAs:
    first, component = weights[0]
    if any(other is not component and (other is None or component is None) for _, other in weights):
        return Unsupported(f"is made from {_few(weights)} in two ways")
    if component is None:
        if len(weights) > 1:
            return Unsupported(f"is {_few(weights)}")
        return whole(first, shapes[first], in_out=model_type in _IN_OUT)
    parts = {(c.index, c.source): weight for weight, c in weights if c is not None}
    if len(parts) != len(weights):
        return Unsupported(f"is made from {_few(weights)} in two ways")
    if component.ops in (("stack0",), ("stack0", "cat1")):
        return _stacked(parts, component.n_sources, shapes, model_type)
    if component.ops == ("cat0",):
        return _joined(parts, component.n_sources, shapes)
    if component.ops == ("chunk0",) and component.n_sources == 1:
        return _cut(first, component, shapes[first])
    if component.ops in (("transpose12",), ("transpose01",)) and component.n_sources == 1:
        # The shape stays that of the weight, since orientation is decided by what is stored.
        return Parameter(shapes[first], (Part(first, transposed=True),), model_type in _IN_OUT)
    return Unsupported(
        f"is made from {_few(weights)} by {' and '.join(component.ops)}, which is not supported"
    )


def whole(weight: str, shape: Shape, *, in_out: bool = False) -> Parameter:
    """A parameter that is one weight."""
    return Parameter(shape, (Part(weight),), in_out and len(shape) == 3)


def _stacked(
    parts: Mapping[tuple[int | None, int], str], n_sources: int, shapes: Mapping[str, Shape], model_type: str
) -> FoundAs:
    """[E, rows of all sources, n_cols] from one matrix for each expert and source."""
    n_experts = 1 + max(index or 0 for index, _ in parts)
    some = next(iter(parts.values()))
    for expert in range(n_experts):
        for source in range(n_sources):
            if (expert, source) not in parts:
                return Unsupported(
                    f"is made from {shown(some)} and others, but one of expert {expert} is missing"
                )
    rows = [shapes[parts[0, source]] for source in range(n_sources)]
    if any(
        len(shapes[weight]) != 2 or shapes[weight] != rows[source] for (_, source), weight in parts.items()
    ):
        return Unsupported(f"is made from {shown(some)} and others, whose shapes differ")
    found = []
    for (expert_or_none, source), weight in sorted(
        parts.items(), key=lambda item: (item[0][0] or 0, item[0][1])
    ):
        before = sum(shape[0] for shape in rows[:source])
        found.append(Part(weight, rows[source][0], row=before, expert=expert_or_none))
    shape = (n_experts, sum(shape[0] for shape in rows), rows[0][1])
    return Parameter(shape, tuple(found), model_type in _IN_OUT)


def _joined(
    parts: Mapping[tuple[int | None, int], str], n_sources: int, shapes: Mapping[str, Shape]
) -> FoundAs:
    """Rows of all sources, one after another."""
    weights = [parts.get((None, source)) for source in range(n_sources)]
    found: list[Part] = []
    row = 0
    for weight in weights:
        if weight is None or not shapes[weight]:
            return Unsupported(
                f"is made from {shown(next(iter(parts.values())))} and others, of which one is missing"
            )
        found.append(Part(weight, shapes[weight][0], row=row))
        row += shapes[weight][0]
    return Parameter((row, *shapes[found[0].weight][1:]), tuple(found))


def _cut(weight: str, component: Component, shape: Shape) -> FoundAs:
    """An equal share of the rows."""
    n_rows, rest = divmod(shape[0], component.n_targets) if shape else (0, 1)
    if rest:
        return Unsupported(f"is a part of {shown(weight)}, whose rows cannot be cut in {component.n_targets}")
    return Parameter((n_rows, *shape[1:]), (Part(weight, n_rows, weight_row=component.target * n_rows),))


def _few(weights: list[tuple[str, Component | None]]) -> str:
    names = [shown(weight) for weight, _ in weights]
    return names[0] if len(names) == 1 else f"{names[0]} and {names[1]}"
