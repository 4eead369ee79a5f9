"""Where CKPT and ADAPTER lie: a directory or a hub id, and the files that are fetched of it."""

import glob
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from os import PathLike
from typing import NamedTuple

from lorafuse.adapters import adapter_folder, open_adapter
from lorafuse.adapters.reading.beside import TRAINED_BESIDE
from lorafuse.adapters.reading.directory import BIN, CONFIG, DEFAULT_NAME, INDEX, MLX, SAFETENSORS
from lorafuse.errors import AdapterError, CheckpointError, shown
from lorafuse.events import OnEvent, warn_by
from lorafuse.files.folder import Folder
from lorafuse.files.hub import folder_of
from lorafuse.files.kinds import (
    CARDS,
    HIDDEN,
    INDEXES,
    OTHER_WEIGHTS,
    TRAINING_STATE,
    any_case,
    in_other_folders,
)
from lorafuse.files.local_folder import directory_as_typed
from lorafuse.files.names import RECEIPT
from lorafuse.planning.combine import WeightedAdapter
from lorafuse.settings import checked_weight
from lorafuse.side_files.further import further_files
from lorafuse.side_files.sets import FOLDERS, SETS
from lorafuse.trained_base.beside_adapter import SAYING

Name = str | PathLike[str]
# Everything that a result may be made from, but what is UNWANTED.
CHECKPOINT_FILES = ("*",)
ADAPTER_FILES = (
    *(CONFIG, SAFETENSORS, "adapter_model-*.safetensors", INDEX, BIN, MLX, *TRAINED_BESIDE),
    *SAYING,
)
KIND_FILES = ("config.json", CONFIG, f"*/{CONFIG}", RECEIPT)  # which tell what a repository holds
# Weights of other formats; some repositories hold the same weights a second time under `consolidated`. The
# index of safetensors files is read, though it is not copied.
UNWANTED = (
    *(any_case(kind) for kind in (*OTHER_WEIGHTS, *TRAINING_STATE, *CARDS) if kind not in INDEXES),
    *(f"*.{kind}.index*.json" for kind in ("bin", "h5", "msgpack")),
    *HIDDEN,
    *in_other_folders(FOLDERS),
)


def named_weight(adapter: Name | tuple[Name, float]) -> tuple[str, float]:
    """(name, weight) of an adapter that may come without a weight. Raises UsageError for a weight that is no
    finite number."""
    name, weight = adapter if isinstance(adapter, tuple) else (adapter, 1.0)
    return directory_as_typed(name), checked_weight(name, weight)


def checkpoint_folder(name: str) -> Folder:
    """Where the checkpoint lies. Raises CheckpointError."""
    return folder_of(name, CHECKPOINT_FILES, CheckpointError, unwanted=UNWANTED, further=further_files)


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
    """Where the adapter lies, of which `folder_name` chooses one: `adapter_folder`. Raises AdapterError."""
    root = folder_of(name, adapter_files(folder_name), AdapterError, further=_further(folder_name))
    sub_folder = adapter_folder(root, folder_name)
    if folder_name is None and sub_folder is not None:
        warn_by(on_event)(f"{shown(name)}: the adapter in it, {shown(sub_folder)}, is taken.")
        # Of a hub id, only its config is here yet.
        root = folder_of(name, adapter_files(sub_folder), AdapterError, further=_further(sub_folder))
    return LocatedAdapter(name, weight, root, sub_folder)


def _further(sub_folder: str | None) -> Callable[[Folder], list[str]]:
    """`further_files` of an adapter's folder and of its sub-folder."""

    def further(root: Folder) -> list[str]:
        inner = further_files(root.sub_folder(sub_folder)) if sub_folder else []
        return [*further_files(root), *(f"{glob.escape(str(sub_folder))}/{pattern}" for pattern in inner)]

    return further


@contextmanager
def opened(located: Sequence[LocatedAdapter]) -> Iterator[list[WeightedAdapter]]:
    """The adapters. Raises AdapterError."""
    with ExitStack() as stack:
        weighted = []
        for name, weight, root, sub_folder in located:
            adapter = stack.enter_context(closing(open_adapter(root, sub_folder, name)))
            weighted.append(WeightedAdapter(adapter, weight))
        yield weighted


def adapter_files(name: str | None = None) -> tuple[str, ...]:
    """Patterns of an adapter's files, of the sub-folder when it has a name, and of the configs that tell
    which others there are."""
    beside = tuple(name for file_set in SETS for name in file_set.names)
    named = tuple(f"{glob.escape(name)}/{file}" for file in (*ADAPTER_FILES, *beside)) if name else ()
    at_root = ADAPTER_FILES if name in (None, DEFAULT_NAME) else (CONFIG,)
    return (*at_root, *named, *beside, f"*/{CONFIG}")
