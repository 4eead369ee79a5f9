"""Adapter parameters → weights, all of them by one rule: a naming of the checkpoint's weights, and perhaps
one edit of prefixes.

The rules are tried in tiers: first the namings as they are, then with the base model's prefix added or taken
off, which transformers does too, then with the prefixes by which the same text model is found in other
models. In the first tier in which a rule finds every parameter, all rules that do must agree. A rule never
drops the name of a tower, so text and vision are not confused.
"""

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from lorafuse.errors import AdapterError, listed, nearest, shown
from lorafuse.naming.aliases import IN_OUT, FoundAs, MemoryNames, Shape, Unsupported, find
from lorafuse.naming.other_names import OtherNames, whose
from lorafuse.naming.table import Component, Renames, v4_name
from lorafuse.patches.target import Parameter

# Under these a text model lies in a model that has more than text, or in none.
_TEXT_PREFIXES = ("", "model.", "language_model.", "model.language_model.", "language_model.model.")

# Leaves that transformers renames in all classes, by the rules called "legacy" in renames.json.
_OLD_LEAVES = (".gamma", ".beta", ".weight_g", ".weight_v")

Warn = Callable[[str], None]


@dataclass(frozen=True)
class Naming:
    """Names in memory for the names of weights, and what to do to an adapter's names before they are looked
    up."""

    title: str
    memory_names: MemoryNames
    prepare: Callable[[str], str] = lambda name: name


@dataclass(frozen=True)
class PrefixEdit:
    """Take `old` off a name and put `new` before it. Names without `old` stay as they are, such as heads; but
    not those of layers, which would mix two kinds of names."""

    old: str = ""
    new: str = ""
    remarkable: bool = False

    def apply(self, name: str) -> str | None:
        if name.startswith(self.old):
            return self.new + name[len(self.old) :]
        return None if re.search(r"\.\d+\.", name) else name


@dataclass(frozen=True, slots=True)
class Group:
    """Parameters of which the checkpoint has to have `least`, since the adapter does not say which are
    meant."""

    parameters: tuple[str, ...]
    least: int


@dataclass
class NameAttempt:
    """One rule, what it finds, and the parameters that it should have found."""

    naming: Naming
    edit: PrefixEdit
    found: dict[str, FoundAs]
    missing: list[str]


class Resolver:
    """The parameters of one checkpoint, by the names that adapters may use for them."""

    def __init__(
        self, shapes: Mapping[str, Shape], config: Mapping[str, object], head: str | None = None
    ) -> None:
        self._shapes, self._model_type = shapes, str(config.get("model_type"))
        self._renames = Renames(dict(config))
        self._others = OtherNames(shapes, config, head, self._is_in_out)

    def resolve(
        self, wanted: Mapping[str, str], file: object, warn: Warn, groups: Sequence[Group] = ()
    ) -> dict[str, Parameter]:
        """`wanted` maps parameters to the adapter tensors that name them. Raises AdapterError."""
        attempts: list[NameAttempt] = []
        for tier in self._tiers():
            attempts += (tried := list(self._attempts(tier, wanted, groups)))
            complete = [attempt for attempt in tried if not attempt.missing]
            if complete:
                most = max(len(attempt.found) for attempt in complete)
                complete = [attempt for attempt in complete if len(attempt.found) == most]
                return _supported(self._agreed(complete, wanted, file), wanted, file, warn)
        raise _unresolved(attempts, wanted, self._shapes, file)

    def _tiers(self) -> Iterator[list[PrefixEdit]]:
        base = f"{self._renames.base_prefix}."
        yield [PrefixEdit()]
        yield [PrefixEdit(old=base), PrefixEdit(new=base)]
        prefixes = dict.fromkeys((*_TEXT_PREFIXES, base))
        yield [PrefixEdit(old, new, remarkable=True) for old in prefixes for new in prefixes if old != new]

    def _attempts(
        self, edits: list[PrefixEdit], wanted: Mapping[str, str], groups: Sequence[Group]
    ) -> Iterator[NameAttempt]:
        grouped = {parameter for group in groups for parameter in group.parameters}
        single = [parameter for parameter in wanted if parameter not in grouped]
        for naming in self._namings():
            prepared = {parameter: naming.prepare(parameter) for parameter in wanted}
            edited = [{parameter: edit.apply(name) for parameter, name in prepared.items()} for edit in edits]
            found = self._find({name for names in edited for name in names.values() if name}, naming)
            for edit, names in zip(edits, edited, strict=True):
                hits = {parameter: found[name] for parameter, name in names.items() if name and name in found}
                missing = [parameter for parameter in single if parameter not in hits]
                missing += [
                    group.parameters[0]
                    for group in groups
                    if sum(parameter in hits for parameter in group.parameters) < group.least
                ]
                yield NameAttempt(naming, edit, hits, missing)

    def _find(self, asked: set[str], naming: Naming) -> dict[str, FoundAs]:
        """What is asked for, also by the names that other trainers have for it."""
        # Of the weights of experts, the names of their stacks are few; all origins would be 2 kB for each.
        behind = {origin.name for name in asked for origin in self._others.origins(name)}
        found = find(self._shapes, asked | behind, naming.memory_names, self._model_type)
        for name in asked - found.keys():
            origins = (origin for origin in self._others.origins(name) if origin.name in found)
            made = [origin.cut(found[origin.name]) for origin in origins]
            for other in (*made, self._others.find_head(name)):
                if other is not None:
                    found.setdefault(name, other)
        return found

    def _is_in_out(self, weight: str) -> bool | None:
        """Whether a stack of matrices is stored as (experts, in, out); None where versions differ, or for
        models that transformers does not have."""
        if self._model_type in IN_OUT:
            return True
        turned = any(component and "transpose" in component.ops[0] for _, component in self._memory(weight))
        return None if turned or not self._renames.is_known else False

    def _memory(self, weight: str) -> list[tuple[str, Component | None]]:
        return [] if self._renames.trivial else self._renames.memory_names(weight)

    def _namings(self) -> list[Naming]:
        namings = [Naming("the checkpoint's", lambda name: [(name, None)])]
        if not self._renames.trivial or any(self._has_old_leaf(name) for name in self._shapes):
            namings.append(Naming("transformers 5's", self._renames.memory_names))
        if self._stored_as_in_memory():
            namings.append(Naming("older checkpoints'", self._renames.memory_names, self._name_in_memory))
        model_class = self._renames.model_class
        if any(v4_name(model_class, name) != name for name in self._shapes):
            namings.append(Naming("transformers 4's", lambda name: [(v4_name(model_class, name), None)]))
        return namings

    def _has_old_leaf(self, name: str) -> bool:
        """Whether transformers renames a weight whatever its class is, such as `LayerNorm.gamma`."""
        return name.endswith(_OLD_LEAVES) and self._renames.memory_names(name) != [(name, None)]

    def _stored_as_in_memory(self) -> bool:
        """Transformers 5 can save its own names; then an adapter with the older ones is renamed, not the
        weights."""
        return not self._renames.trivial and all(
            self._renames.memory_names(name) == [(name, None)] for name in self._shapes
        )

    def _name_in_memory(self, name: str) -> str:
        (renamed, component), *_ = self._renames.memory_names(name)
        if component and component.ops[0] == "stack0" and component.index is not None:
            return _of_expert(renamed, component) or name
        return name if component else renamed

    def _agreed(self, complete: list[NameAttempt], wanted: Mapping[str, str], file: object) -> NameAttempt:
        """The first of the rules. Raises AdapterError where another finds something else, unless it is the
        same stack of matrices in the other orientation: transformers 5 transposes some when it loads
        them."""
        first = complete[0]
        for other in complete[1:]:
            for parameter, found in first.found.items():
                if _as_stored(other.found.get(parameter)) == _as_stored(found):
                    if other.found[parameter] != found and isinstance(found, Parameter):
                        first.found[parameter] = replace(found, either_way=True)
                else:
                    one, two = _weights(found), _weights(other.found.get(parameter))
                    raise AdapterError(
                        f"{file}: {shown(wanted[parameter])} may belong to {one}, by {first.naming.title} "
                        f"names, or to {two}, by {other.naming.title} names; which is meant?"
                    )
        return first


def _of_expert(stack: str, component: Component) -> str | None:
    """The name of an expert's own matrix beside the stack that it goes into."""
    experts, _, leaf = stack.rpartition(".")
    kinds = {("gate_up_proj", 2): ("gate_proj", "up_proj"), ("down_proj", 1): ("down_proj",)}
    own = kinds.get((leaf, component.n_sources))
    return f"{experts}.{component.index}.{own[component.source]}.weight" if own else None


def _as_stored(found: FoundAs | None) -> FoundAs | None:
    """A stack of matrices without its orientation in memory."""
    if not isinstance(found, Parameter) or len(found.shape) != 3:
        return found
    parts = tuple(replace(part, transposed=False) for part in found.parts)
    return Parameter(found.shape, parts)


def _weights(found: FoundAs | None) -> str:
    if found is None:
        return "nothing"
    if isinstance(found, Unsupported):
        return f"one that {found.why}"
    return listed((part.weight for part in found.parts), most=1)


def _supported(
    attempt: NameAttempt, wanted: Mapping[str, str], file: object, warn: Warn
) -> dict[str, Parameter]:
    result = {}
    for parameter, found in attempt.found.items():
        if isinstance(found, Unsupported):
            raise AdapterError(
                f"{file}: {shown(wanted[parameter])} belongs to {shown(parameter)}, which {found.why}."
            )
        result[parameter] = found
    if attempt.edit.remarkable:
        some = next(name for name in wanted if name in attempt.found)
        warn(
            f"{file}: the adapter's names are those of a model with other prefixes; {shown(some)} is taken "
            f"for {_weights(attempt.found[some])}."
        )
    return result


def _unresolved(
    attempts: list[NameAttempt], wanted: Mapping[str, str], shapes: Mapping[str, Shape], file: object
) -> AdapterError:
    """The rule that found most says what is missing."""
    best = max(
        attempts, key=lambda attempt: len(attempt.found)
    )  # the first of equals, which changes names least
    missing = best.missing
    elsewhere = [a for a in attempts if a.edit == PrefixEdit() and missing[0] in a.found]
    if elsewhere:
        one, other = next(iter(best.found)), missing[0]
        return AdapterError(
            f"{file}: {shown(one)} is one of {best.naming.title} names and {shown(other)} one of "
            f"{elsewhere[0].naming.title}; an adapter's names must all be of one kind."
        )
    parameter = missing[0]
    message = (
        f"{file}: {shown(wanted[parameter])} belongs to {shown(parameter)}, which the checkpoint does not "
        "have"
    )
    trainer = whose(parameter)
    if trainer is not None:
        message += f", a name that {trainer} gives"
    more = missing[1:]
    also = f" The same is true of {len(more)} more: {listed(more)}." if more else ""
    return AdapterError(f"{message}{nearest(parameter, shapes)}.{also}", misfit=True)
