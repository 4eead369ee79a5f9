"""Where CKPT and ADAPTER lie: a directory or a hub id, and the files that are fetched of it."""

import glob
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from os import PathLike, fspath
from typing import NamedTuple

from lorafuse.adapters import adapter_folder, open_adapter
from lorafuse.adapters.reading.directory import BIN, CONFIG, DEFAULT_NAME, INDEX, MLX, SAFETENSORS
from lorafuse.errors import AdapterError, CheckpointError, shown
from lorafuse.events import OnEvent, warn_by
from lorafuse.files.folder import Folder
from lorafuse.files.hub import folder_of
from lorafuse.files.names import RECEIPT
from lorafuse.outdir.sidecars import ALWAYS, PROCESSOR, TOKENIZER
from lorafuse.planning.combine import WeightedAdapter
from lorafuse.settings import checked_weight

Name = str | PathLike[str]
CHECKPOINT_FILES = (
    "config.json",
    "*.safetensors",
    "model.safetensors.index.json",
    RECEIPT,
    *ALWAYS,
    *TOKENIZER,
    *PROCESSOR,
)
ADAPTER_FILES = (CONFIG, SAFETENSORS, "adapter_model-*.safetensors", INDEX, BIN, MLX)
KIND_FILES = ("config.json", CONFIG, f"*/{CONFIG}", RECEIPT)  # which tell what a repository holds
# A pattern's * matches a slash too, and some repositories hold the same weights a second time under these
# names.
UNWANTED = ("*/*.safetensors", "*/*.py", "consolidated*.safetensors")


def named_weight(adapter: Name | tuple[Name, float]) -> tuple[str, float]:
    """(name, weight) of an adapter that may come without a weight. Raises UsageError for a weight that is no
    finite number."""
    name, weight = adapter if isinstance(adapter, tuple) else (adapter, 1.0)
    return fspath(name), checked_weight(name, weight)


def checkpoint_folder(name: str) -> Folder:
    """Where the checkpoint lies. Raises CheckpointError."""
    return folder_of(name, CHECKPOINT_FILES, CheckpointError, unwanted=UNWANTED)


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
        """Where files beside its tensors may be, the first first."""
        return [self.folder, self.root]


def located_adapter(name: str, weight: float, folder_name: str | None, on_event: OnEvent) -> LocatedAdapter:
    """Where the adapter lies, of which `folder_name` chooses one: `adapter_folder`. Raises AdapterError."""
    root = folder_of(name, adapter_files(folder_name), AdapterError)
    sub_folder = adapter_folder(root, folder_name)
    if folder_name is None and sub_folder is not None:
        warn_by(on_event)(f"{shown(name)}: the adapter in it, {shown(sub_folder)}, is taken.")
        # Of a hub id, only its config is here yet.
        root = folder_of(name, adapter_files(sub_folder), AdapterError)
    return LocatedAdapter(name, weight, root, sub_folder)


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
    beside = (*TOKENIZER, *PROCESSOR)
    named = tuple(f"{glob.escape(name)}/{file}" for file in (*ADAPTER_FILES, *beside)) if name else ()
    at_root = ADAPTER_FILES if name in (None, DEFAULT_NAME) else (CONFIG,)
    return (*at_root, *named, *beside, f"*/{CONFIG}")
