"""The interface of an adapter type, which a module of `types/` satisfies."""

from typing import Protocol

from lorafuse.adapters.reading.directory import AdapterDir
from lorafuse.adapters.reading.modules import Updates, Warn


class AdapterType(Protocol):
    """A kind of adapter: what it supports, in the words of docs/adapters.md, and how its files are read."""

    SUPPORTED: str  # layers and variants that are merged
    MEMORY: str  # held of one weight at a time; "tiles" where that is nothing beside them

    def updates(self, adapter: AdapterDir, scale: float, warn: Warn) -> Updates:
        """Returns what the adapter says of the base, its updates multiplied by `scale`, and the ignored
        tensors with reasons. Raises AdapterError where the files do not make such an adapter."""
