"""What adapters do to each weight: their updates, brought to the weights that hold the parameters."""

from collections.abc import Callable, Mapping
from dataclasses import replace

from lorafuse.adapters import AdapterDir, Choice, Edit, Patch, Target, Update
from lorafuse.adapters.reading.keys import unusual_prefixes
from lorafuse.codecs import Sources
from lorafuse.codecs.conv1d import is_conv1d
from lorafuse.errors import AdapterError, listed, shown
from lorafuse.files.tensors import FLOATS, TensorSpec
from lorafuse.naming import Group, Names
from lorafuse.patches.matrices import joined
from lorafuse.patches.on_rows import OnRows
from lorafuse.patches.target import Parameter, Part
from lorafuse.planning.base_check import naming_the_base
from lorafuse.planning.combine import AdapterSays
from lorafuse.planning.one_matrix import patch_of_matrix
from lorafuse.planning.tied import fill_tied


def own_edits(one: AdapterSays, names: Names, warn: Callable[[str], None]) -> dict[str, Edit]:
    """What the adapter alone does to each weight."""
    with naming_the_base(one.adapter):
        edits = _edits(one.model.said, names, one.adapter, warn)
    fill_tied(names, edits, one.adapter, warn)
    whole = [weight for weight, edit in edits.items() if edit.replaced] + list(one.model.added)
    if whole and one.weight != 1:
        warn(
            f"{one.adapter.file}: holds {listed(whole)} whole, which a weight of {one.weight:g} does not "
            "change."
        )
    return edits


def _edits(
    said: list[Update | Choice], names: Names, adapter: AdapterDir, warn: Callable[[str], None]
) -> dict[str, Edit]:
    """Weight → edit. Replacements first: an update goes on top of them."""
    unusual = unusual_prefixes(adapter)
    if unusual:
        warn(unusual)
    groups = [
        Group(one.parameters, one.least) for one in said if isinstance(one, Choice) and one.least is not None
    ]
    found = names.resolve(_parameters(said), adapter.file, warn, groups)
    updates: list[Update] = []
    for one in said:
        if isinstance(one, Choice):
            updates += one.settle({name: found[name] for name in one.parameters if name in found})
        else:
            updates.append(one)
    edits: dict[str, Edit] = {}
    for update in sorted(updates, key=lambda update: update.make is not None):
        parameter = found.get(update.parameter) or _beside_weight(update.parameter, found, names)
        if parameter is None:
            continue
        for part in parameter.parts:
            edit = edits.setdefault(part.weight, Edit())
            edit.keys += update.keys
            sources = edit.replaced or names.base_of(part.weight)
            if update.replaced:
                _replace(update, parameter, part, sources.spec, edit, names, adapter)
            if update.make:
                beside = _sources_beside(update, found, names, edits)
                edit.patches.append(_patch(update, parameter, part, sources, beside, names, adapter))
    for edit in edits.values():
        edit.patches = joined(edit.patches)
    return edits


def _parameters(said: list[Update | Choice]) -> dict[str, str]:
    """The parameters to find, each with a tensor that names it."""
    wanted: dict[str, str] = {}
    for one in said:
        if isinstance(one, Choice):
            wanted |= dict.fromkeys(one.parameters, one.keys[0])
        else:
            names = [one.beside] if one.optional else [one.parameter, one.beside]
            wanted |= {name: one.keys[0] for name in names if name is not None}
    return wanted


def _beside_weight(parameter: str, found: Mapping[str, Parameter], names: Names) -> Parameter | None:
    """An optional parameter, a bias: what stands beside the weight of its module, if anything does."""
    module, _, leaf = parameter.rpartition(".")
    weight = found.get(f"{module}.weight")
    if weight is None or len(weight.parts) != 1 or not weight.parts[0].whole:
        return None
    name = f"{weight.parts[0].weight.rpartition('.')[0]}.{leaf}"
    return Parameter(names.weights[name].spec.shape, (Part(name),)) if name in names.weights else None


def _sources_beside(
    update: Update, found: Mapping[str, Parameter], names: Names, edits: dict[str, Edit]
) -> Sources | None:
    if update.beside is None:
        return None
    weight = found[update.beside].parts[0].weight
    return edits.get(weight, Edit()).replaced or names.base_of(weight)


def _replace(
    update: Update,
    parameter: Parameter,
    part: Part,
    spec: TensorSpec,
    edit: Edit,
    names: Names,
    adapter: AdapterDir,
) -> None:
    if edit.replaced:
        both = listed(edit.keys)
        raise AdapterError(
            f"{adapter.file}: {both} replace the same weight, {shown(part.weight)}; which is meant?"
        )
    square_either_way = parameter.either_way and spec.shape[-1] == spec.shape[-2]
    if not part.whole or part.transposed or square_either_way:
        raise AdapterError(
            f"{adapter.file}: {shown(update.keys[0])} replaces a parameter that the checkpoint stores in "
            f"another form, in {shown(part.weight)}; that is not supported."
        )
    _check_replacement(update, part.weight, spec, names, adapter)
    edit.replaced = update.replaced


def _patch(
    update: Update,
    parameter: Parameter,
    part: Part,
    sources: Sources,
    beside: Sources | None,
    names: Names,
    adapter: AdapterDir,
) -> Patch:
    """The update's patch for this weight, moved to the rows that it has of the parameter."""
    assert update.make is not None
    key, spec, quantized = shown(update.keys[0]), sources.spec, not sources.as_stored
    if spec.dtype not in FLOATS or not spec.shape:  # nor does any update fit a single number
        raise AdapterError(f"{adapter.file}: {key} updates {shown(part.weight)}, which is {spec}.")
    conv1d = is_conv1d(names.config, part.weight) != part.transposed
    model_type = names.config.get("model_type")
    target = Target(part.weight, spec, conv1d, None, beside, quantized, model_type)
    if part.in_stack is not None:
        return patch_of_matrix(update.make, part.in_stack, target, f"{adapter.file}: {key}")
    if update.stacked:
        return update.make(replace(target, part=part))
    if part.expert is not None:
        raise AdapterError(
            f"{adapter.file}: {key} updates {shown(part.weight)} and others as one matrix; that is not "
            "supported."
        )
    if part.whole:
        return update.make(target)
    inner = update.make(replace(target, spec=TensorSpec(spec.dtype, parameter.shape)))
    if inner.needs.reads_base or inner.needs.row_multiple > 1:
        raise AdapterError(
            f"{adapter.file}: {key} changes {shown(update.parameter)} as a whole, which the checkpoint "
            f"stores in another form, in {shown(part.weight)}; that is not supported."
        )
    return OnRows(inner, part)


def _check_replacement(
    update: Update, weight: str, spec: TensorSpec, names: Names, adapter: AdapterDir
) -> None:
    assert update.replaced is not None
    new = update.replaced.spec
    if (new.dtype in FLOATS) != (spec.dtype in FLOATS):
        raise AdapterError(
            f"{adapter.file}: {shown(update.keys[0])} is {new}, but {shown(weight)} is {spec}.", misfit=True
        )
    rows_only = new.shape[1:] == spec.shape[1:] and len(new.shape) == len(spec.shape) > 0
    if new.shape != spec.shape and not (rows_only and names.may_resize(weight)):
        raise AdapterError(
            f"{adapter.file}: {shown(update.keys[0])} is {list(new.shape)}, but {shown(weight)} is "
            f"{list(spec.shape)}; is the adapter for another base?",
            misfit=True,
        )
