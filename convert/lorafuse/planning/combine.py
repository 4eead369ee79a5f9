"""Several adapters into one output: W + Σ w_i (W'_i − W), where W'_i is what adapter i alone makes of the
base weight W.

For LoRA this is PEFT's add_weighted_adapter with combination_type "cat" (PEFT 0.21 lora/model.py; its
"linear" is a rougher approximation, and its other types prune or decompose, which is not done here). A
parameter that an adapter holds whole is no update that could be weighted or summed: it is taken as it is, and
two adapters must agree in it; PEFT refuses that too.

The result does not depend on the order in which adapters are named: their updates are summed in an order that
their contents and weights give.
"""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

from lorafuse.adapters import AdapterDir, Edit
from lorafuse.adapters.reading.directory import CONFIG
from lorafuse.codecs import Sources
from lorafuse.errors import AdapterError, listed, shown
from lorafuse.files.hashing import hash_file
from lorafuse.files.tensors import TensorSpec
from lorafuse.naming import Names
from lorafuse.patches.summed import Summed
from lorafuse.structure import Structure
from lorafuse.structure.layers import FIELD as LAYER_REPLICATION

WAY_OUT = "leave one of the two adapters out"


@dataclass(frozen=True)
class WeightedAdapter:
    """An adapter and what its updates are multiplied by."""

    adapter: AdapterDir
    weight: float

    @cached_property
    def identity(self) -> str:
        """sha256 of what the updates depend on: tensors, config and weight, but no name. Reads the whole
        files."""
        digest = hashlib.sha256()
        for name in self.adapter.files[1:]:  # the first is the config
            digest.update(bytes.fromhex(hash_file(self.adapter.folder, name).sha256))
        digest.update(json.dumps([self.adapter.config, float(self.weight)], sort_keys=True).encode())
        return digest.hexdigest()


@dataclass
class AdapterSays:
    """What one adapter says: the model that it was trained on and its updates, the edits that these make of
    weights, and the tensors that are ignored, with reasons."""

    adapter: AdapterDir
    weight: float
    model: Structure
    ignored: dict[str, str]
    edits: dict[str, Edit] = field(default_factory=dict)


def in_order(adapters: Sequence[WeightedAdapter]) -> list[WeightedAdapter]:
    """The adapters in the order in which their updates are summed, whatever the order given."""
    return sorted(adapters, key=lambda weighted: weighted.identity) if len(adapters) > 1 else list(adapters)


def common_model(said: Sequence[AdapterSays]) -> Structure:
    """The model of all adapters. Layers must be replicated by all alike, since names count them; a new head
    comes from one adapter, or several that agree. Raises AdapterError."""
    first = said[0]
    for says in said[1:]:
        a, b = (each.adapter.config.get(LAYER_REPLICATION) or None for each in (first, says))
        if a != b:
            raise AdapterError(
                f"{first.adapter.folder / CONFIG} and {says.adapter.folder / CONFIG}: {LAYER_REPLICATION} is "
                f"{shown(a)} and {shown(b)}; the adapters are for different models."
            )
    heads = [says for says in said if says.model.added]
    if len(said) == 1 or not heads:
        return first.model
    for says in heads[1:]:
        _refuse_other_head(heads[0], says)
    chosen = heads[0].model
    keys = {
        name: tuple(_label(says.adapter, key) for says in heads for key in says.model.added[name])
        for name in chosen.added
    }
    return replace(chosen, added=keys)


def _refuse_other_head(first: AdapterSays, says: AdapterSays) -> None:
    a, b = first.model, says.model
    same = a.added.keys() == b.added.keys() and a.changes == b.changes
    if not same or not all(Edit(a.weights[name]).same_as(Edit(b.weights[name])) for name in a.added):
        raise AdapterError(
            f"{first.adapter.file} and {says.adapter.file}: bring different heads, {listed(a.added)} and "
            f"{listed(b.added)}, which have no sum; {WAY_OUT}."
        )


def combine(
    said: Sequence[AdapterSays], model: Structure, names: Names
) -> tuple[dict[str, Edit], dict[str, str]]:
    """Weight → the edit of all adapters, and the ignored tensors. With several adapters the names of tensors
    begin with those of their adapters. Raises AdapterError for edits that have no sum."""
    if len(said) == 1:
        return said[0].edits, said[0].ignored
    parts: dict[str, list[tuple[AdapterDir, Edit]]] = {}
    for says in said:
        for weight, edit in says.edits.items():
            if weight in model.added and weight not in says.model.added:
                raise AdapterError(
                    f"{says.adapter.file}: {shown(edit.keys[0])} changes {shown(weight)}, which neither the "
                    "checkpoint nor this adapter holds."
                )
            parts.setdefault(weight, []).append((says.adapter, edit))
    edits = {weight: _sum(weight, several, names.base_of(weight).spec) for weight, several in parts.items()}
    return edits, {_label(says.adapter, key): reason for says in said for key, reason in says.ignored.items()}


def _label(adapter: AdapterDir, key: str) -> str:
    return f"{adapter.name}: {key}"


def _sum(weight: str, parts: Sequence[tuple[AdapterDir, Edit]], base: TensorSpec) -> Edit:
    replaced = _common_replacement(weight, parts, base)
    groups = [(adapter.name, edit.patches) for adapter, edit in parts if edit.patches]
    if len({patch.needs.stacked for _, patches in groups for patch in patches}) > 1:
        files = listed(adapter.file for adapter, edit in parts if edit.patches)
        raise AdapterError(
            f"{files} update {shown(weight)}, some as a whole and some by experts; that is not supported."
        )
    patches = [patch for _, own in groups for patch in own]
    if len(groups) > 1:
        patches = [Summed(groups, replaced.spec if replaced else base)]
    return Edit(replaced, patches, [_label(adapter, key) for adapter, edit in parts for key in edit.keys])


def _common_replacement(
    weight: str, parts: Sequence[tuple[AdapterDir, Edit]], base: TensorSpec
) -> Sources | None:
    """What the adapters put in the place of the weight, if any does. An adapter that does not must not mind:
    its updates were trained on the checkpoint's weight, and only those that do not depend on its values are
    the same on another."""
    holders = [(adapter, edit) for adapter, edit in parts if edit.replaced]
    if not holders:
        return None
    first, chosen = holders[0][0], holders[0][1].replaced
    assert chosen is not None
    for adapter, edit in parts:
        key = shown(edit.keys[0])
        if edit.replaced:
            if not Edit(edit.replaced).same_as(Edit(chosen)):
                other = shown(holders[0][1].keys[0])
                raise AdapterError(
                    f"{first.file} and {adapter.file}: both hold {shown(weight)} whole ({other}, {key}), "
                    f"with different values, which have no sum; {WAY_OUT}."
                )
        elif base.shape != chosen.spec.shape:
            raise AdapterError(
                f"{adapter.file}: {key} updates {shown(weight)} {list(base.shape)}, which {first.file} "
                f"resizes to {list(chosen.spec.shape)}; {WAY_OUT}."
            )
        elif any(patch.needs.reads_base or not patch.traits.additive for patch in edit.patches):
            raise AdapterError(
                f"{adapter.file}: {key} changes {shown(weight)} in a way that depends on its values, but "
                f"{first.file} holds other values of it; {WAY_OUT}."
            )
    return chosen
