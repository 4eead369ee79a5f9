"""How transformers renames the tensors of a checkpoint when it loads them, as data.

`renames.json` (made by fixtures/make_renames.py, which says what is in it) and this module together do what
transformers 5.23 core_model_loading.py does in rename_source_key: every renaming in order, then at most one
converter. Adding or removing base_model_prefix, which needs the model, is left to the caller.
"""

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any


@cache
def load_table() -> dict[str, Any]:
    table: dict[str, Any] = json.loads(Path(__file__).with_name("renames.json").read_text(encoding="utf-8"))
    return table


@dataclass(frozen=True, slots=True)
class Component:
    """Which part of which conversion a stored weight is: source `source` of `n_sources`, target `target` of
    `n_targets`; `index` is the number that stood for `*` in the source."""

    ops: tuple[str, ...]
    source: int
    n_sources: int
    target: int
    n_targets: int
    index: int | None


class Rule:
    """One transform of transformers' registry, within `scopes`: prefixes that are set aside while it is
    applied."""

    def __init__(self, entry: dict[str, Any], scopes: tuple[str, ...]) -> None:
        self.sources: list[str] = entry["from"]
        self.targets: list[str] = entry["to"]
        self.ops = tuple(entry.get("ops", ()))
        self._guarded = bool(entry.get("guarded"))
        self._scopes = scopes
        self._pattern = _alternatives(self.sources)
        self._active = False

    def apply(self, name: str) -> tuple[str, Component | None] | None:
        """The new name, with a converter's first target in it; None when the rule does not match."""
        scope = next((scope for scope in self._scopes if name.startswith(scope)), None)
        if scope is None:
            return None
        inner = name.removeprefix(scope)
        match = self._pattern.search(inner)
        if match is None:
            return None
        source = next(int(group[1:]) for group, text in match.groupdict().items() if text is not None)
        if self._guarded:
            # The later pairs count only in a checkpoint that has the first, since their names overlap with
            # new ones.
            self._active |= source == 0
            if not self._active:
                return None
        target = self.targets[source if self._guarded else 0]
        first_group = self._pattern.groupindex[f"g{source}"]
        target = re.sub(r"\\(\d)", lambda digit: match.group(first_group + int(digit[1])) or "", target)
        renamed = scope + inner.replace(match.group(0), target, 1)
        return renamed, self._component(source, match.group(0)) if self.ops else None

    def names_of_targets(self, renamed: str) -> list[str]:
        """A converter makes one parameter or several from a stored weight."""
        before, first, after = renamed.partition(self.targets[0])
        return [before + target + after for target in self.targets] if first else [renamed]

    def _component(self, source: int, matched: str) -> Component:
        numbered = re.fullmatch(self.sources[source].replace("*.", r"(?P<index>\d{1,18})\."), matched)
        index = numbered.groupdict().get("index") if numbered else None
        return Component(
            self.ops, source, len(self.sources), 0, len(self.targets), int(index) if index else None
        )


def _alternatives(sources: list[str]) -> re.Pattern[str]:
    """The longest source first; a source that ends in a letter or digit ends at a boundary of the name."""
    branches = []
    for number, source in sorted(enumerate(sources), key=lambda item: -len(item[1])):
        pattern = source.replace("*.", r".*\.")
        branches.append(f"(?P<g{number}>{pattern}{boundary(pattern)})")
    return re.compile("|".join(branches))


def boundary(pattern: str) -> str:
    return r"(?!\w)" if re.search(r"[a-zA-Z0-9]$", pattern) else ""


class Renames:
    """Transformers 5's names in memory for the checkpoints of one model."""

    def __init__(self, config: dict[str, Any]) -> None:
        table = load_table()
        architectures = config.get("architectures")
        self.model_class = str(architectures[0]) if isinstance(architectures, list) and architectures else ""
        self.is_known = self.model_class in table["classes"]  # to transformers
        by_type = table["prefixes"].get(self.model_class) or table["prefixes"].get(
            str(config.get("model_type")), "model"
        )
        self.base_prefix = str(table["classes"].get(self.model_class, {}).get("prefix", by_type))
        self._rules = list(self._collect(self.model_class, "", config, frozenset()))
        self.trivial = not self._rules
        self._rules += [Rule(entry, ("",)) for entry in table["rules"]["legacy"]]

    def _collect(self, name: str, path: str, config: dict[str, Any], seen: frozenset[str]) -> Iterator[Rule]:
        """The rules of a model and then of those inside it; what an outer model has claimed is not claimed
        again (transformers 5.23 conversion_mapping.py, get_model_conversion_mapping)."""
        rules, classes = load_table()["rules"], load_table()["classes"]
        entry = classes.get(name, {})
        model_type = str(entry.get("type") or config.get("model_type"))
        found = next((key for key in (name, model_type) if key in rules), None)
        if name not in seen and found and found not in seen:
            entries = rules[found] if isinstance(rules[found], list) else rules[rules[found]]
            yield from (Rule(rule, self._scopes(path)) for rule in entries)
            seen |= {name, found}
        for inner_path, inner_name, section in entry.get("parts", ()):
            inner = config.get(section) if section else config
            inner = inner if isinstance(inner, dict) else {}
            yield from self._collect(
                _class_for(inner_name, inner), f"{path}.{inner_path}".strip("."), inner, seen
            )

    def _scopes(self, path: str) -> tuple[str, ...]:
        """A checkpoint of a base model lacks the base model's prefix."""
        if not path:
            return ("",)
        inner = path.removeprefix(self.base_prefix).removeprefix(".")
        inner = f"{inner}." if inner else ""
        return (f"{self.base_prefix}.{inner}", inner)

    def memory_names(self, name: str) -> list[tuple[str, Component | None]]:
        """The parameters in memory that a stored weight goes into, each with its part in the conversion."""
        for rule in self._rules:
            if not rule.ops and (renamed := rule.apply(name)):
                name = renamed[0]
        for rule in self._rules:
            if rule.ops and (made := rule.apply(name)) and (component := made[1]):
                return [
                    (
                        target,
                        Component(
                            component.ops,
                            component.source,
                            component.n_sources,
                            number,
                            component.n_targets,
                            component.index,
                        ),
                    )
                    for number, target in enumerate(rule.names_of_targets(made[0]))
                ]
        return [(name, None)]


def _class_for(default: str, config: dict[str, Any]) -> str:
    """The class of an inner model: where AutoModel chooses it, its config decides."""
    autos, classes = load_table()["autos"], load_table()["classes"]
    by_default = autos.get(classes.get(default, {}).get("type"))
    return str(autos.get(str(config.get("model_type")), default)) if by_default == default else default


def v4_name(model_class: str, name: str) -> str:
    """The name in memory of transformers 4.52 to 4.57: the first pattern of the class that matches
    (modeling_utils.py, _get_key_renaming_mapping)."""
    for pattern, replacement in load_table()["v4"]["classes"].get(model_class, {}).items():
        renamed, n_replaced = re.subn(pattern, replacement, name)
        if n_replaced:
            return renamed
    return name
