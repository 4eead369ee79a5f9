"""Where CKPT and ADAPTER lie: in a directory, or on the hub."""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from os import PathLike
from typing import Any, NamedTuple

from lorafuse.adapters import adapter_folder, open_adapter
from lorafuse.adapters.reading.directory import base_name_of
from lorafuse.errors import AdapterError, CheckpointError, shown
from lorafuse.events import OnEvent, warn_by
from lorafuse.files.folder import Folder
from lorafuse.files.folders import open_folder
from lorafuse.files.hub import as_named, folder_of, hub_name
from lorafuse.files.local_folder import directory_as_typed
from lorafuse.planning.combine import WeightedAdapter
from lorafuse.settings import THE_BASE, checked_weight

Name = str | PathLike[str]


def named_weight(adapter: Name | tuple[Name, float]) -> tuple[str, float]:
    """(name, weight) of an adapter that may come without a weight. Raises UsageError for a weight that is no
    finite number."""
    name, weight = adapter if isinstance(adapter, tuple) else (adapter, 1.0)
    return directory_as_typed(name), checked_weight(name, weight)


def checkpoint_folder(name: str) -> Folder:
    """Where the checkpoint lies; nothing of it is read. Raises CheckpointError, StorageError."""
    return folder_of(name, CheckpointError)


def asks_for_base(ckpt: str) -> bool:
    """Whether CKPT stands for the base that adapters name: a directory of that name is a checkpoint."""
    return ckpt in THE_BASE and not open_folder(ckpt).is_there()


def named_base(folder: Folder, config: dict[str, Any]) -> str:
    """The base that the config of an adapter in `folder` names, at its revision. Raises AdapterError where it
    names none."""
    base, revision = base_name_of(config), config.get("revision")
    where = f"{shown(folder)}: the config"
    if base is None:
        raise AdapterError(f"{where} names no base; give the checkpoint.")
    if open_folder(base).is_there():
        return base
    found = hub_name(base)
    if found is None:
        raise AdapterError(
            f"{where} names {shown(base)} as its base, which is no directory here; give the checkpoint."
        )
    return f"{base}@{revision}" if isinstance(revision, str) and not found.revision else base


class LocatedAdapter(NamedTuple):
    """An adapter as the user named it, what its update is multiplied by, and where it lies: in the folder
    that was named, or in a sub-folder of it."""

    name: str
    weight: float
    root: Folder
    sub_folder: str | None

    @property
    def folder(self) -> Folder:
        """Where its tensors are."""
        return self.root if self.sub_folder is None else self.root.sub_folder(self.sub_folder)

    @property
    def folders(self) -> list[Folder]:
        """Where files about it may lie."""
        return [self.root] if self.sub_folder is None else [self.folder, self.root]


def located_adapter(name: str, weight: float, folder_name: str | None, on_event: OnEvent) -> LocatedAdapter:
    """Where the adapter lies, of which `folder_name` chooses one: `adapter_folder`. Raises AdapterError,
    StorageError."""
    root = folder_of(name, AdapterError, whole=True)
    sub_folder = adapter_folder(root, folder_name)
    if folder_name is None and sub_folder is not None:
        warn_by(on_event)(f"{shown(as_named(name))}: the adapter in it, {shown(sub_folder)}, is taken.")
    return LocatedAdapter(as_named(name), weight, root, sub_folder)


@contextmanager
def opened(located: Sequence[LocatedAdapter]) -> Iterator[list[WeightedAdapter]]:
    """The adapters. Raises AdapterError."""
    with ExitStack() as stack:
        weighted = []
        for name, weight, root, sub_folder in located:
            adapter = stack.enter_context(closing(open_adapter(root, sub_folder, name)))
            weighted.append(WeightedAdapter(adapter, weight))
        yield weighted
