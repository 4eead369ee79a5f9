"""What an adapter says about the model itself: layers that repeat others, and a task head that the checkpoint
lacks.

Both are settled before names are looked up: the adapter's names are those of the model that was trained.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from lorafuse.adapters import AdapterDir, Choice, Update
from lorafuse.adapters.reading.modules import Warn
from lorafuse.codecs import Sources
from lorafuse.structure.heads import new_head
from lorafuse.structure.layers import replicate

__all__ = ["Structure", "structure_of"]


@dataclass
class Structure:
    """The model that was trained: `weights` before any update, the `config` by which its names are found, the
    `changes` of config.json that this takes, and `said`, what the adapter says beside. `added` maps weights
    that only the adapter has to their tensors there."""

    weights: Mapping[str, Sources]
    config: dict[str, Any]
    said: list[Update | Choice]
    changes: dict[str, Any] = field(default_factory=dict)
    added: dict[str, tuple[str, ...]] = field(default_factory=dict)


def structure_of(
    weights: Mapping[str, Sources],
    config: dict[str, Any],
    adapter: AdapterDir,
    said: list[Update | Choice],
    warn: Warn,
) -> Structure:
    """The checkpoint's own structure, unless the adapter changes it. Raises AdapterError."""
    model = Structure(weights, config, said)
    if replicated := replicate(model.weights, config, adapter, warn):
        model.weights, model.changes = replicated
    if head := new_head(model.weights, config, adapter, said, warn):
        brought = {name: update.replaced for name, update in head.updates.items() if update.replaced}
        model.weights = {
            name: sources for name, sources in model.weights.items() if name not in head.dropped
        } | brought
        taken = {update.parameter for update in head.updates.values()}
        model.said = [
            one for one in said if not (isinstance(one, Update) and one.replaced and one.parameter in taken)
        ]
        model.changes |= head.changes
        model.config = config | head.changes
        model.added = {name: update.keys for name, update in head.updates.items()}
    return model
