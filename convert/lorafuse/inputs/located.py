"""Where CKPT and ADAPTER lie: a directory or a hub id, and the files that are fetched of it."""

import glob
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from os import PathLike, fspath
from pathlib import Path
from typing import Any, NamedTuple

from lorafuse.adapters import adapter_folder, open_adapter
from lorafuse.adapters.reading.directory import BIN, CONFIG, DEFAULT_NAME, INDEX, MLX, SAFETENSORS
from lorafuse.errors import AdapterError, CheckpointError, shown
from lorafuse.files.hub import local_dir
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


def checkpoint_dir(name: str) -> Path:
    """Where the checkpoint lies. Raises CheckpointError."""
    return local_dir(name, CHECKPOINT_FILES, CheckpointError, unwanted=UNWANTED)


class LocalAdapter(NamedTuple):
    """An adapter as the user named it, what its update is multiplied by, and where it lies: in the directory
    that was named, or in a sub-folder of that."""

    name: str
    weight: float
    root: Path
    path: Path

    @property
    def folders(self) -> list[Path]:
        """Where files beside its tensors may be, the first first."""
        return [self.path, self.root]


def local_adapter(
    name: str, weight: float, folder_name: str | None, on_event: Callable[[dict[str, Any]], None]
) -> LocalAdapter:
    """Where the adapter lies, of which `folder_name` chooses one: `adapter_folder`. Raises AdapterError."""
    root = local_dir(name, adapter_files(folder_name), AdapterError)
    path = adapter_folder(root, folder_name)
    if folder_name is None and path != root:
        on_event(
            {
                "event": "warning",
                "message": f"{shown(name)}: the adapter in it, {shown(path.name)}, is taken.",
            }
        )
        # Of a hub id, only its config is here yet.
        path = local_dir(name, adapter_files(path.name), AdapterError) / path.name
        root = path.parent
    return LocalAdapter(name, weight, root, path)


@contextmanager
def opened(found: Sequence[LocalAdapter]) -> Iterator[list[WeightedAdapter]]:
    """The adapters. Raises AdapterError."""
    with ExitStack() as stack:
        adapters = [stack.enter_context(closing(open_adapter(one.path, one.name, one.root))) for one in found]
        yield [WeightedAdapter(adapter, one.weight) for adapter, one in zip(adapters, found, strict=True)]


def adapter_files(name: str | None = None) -> tuple[str, ...]:
    """Patterns of an adapter's files, of the sub-folder when it has a name, and of the configs that tell
    which others there are."""
    beside = (*TOKENIZER, *PROCESSOR)
    named = tuple(f"{glob.escape(name)}/{file}" for file in (*ADAPTER_FILES, *beside)) if name else ()
    at_root = ADAPTER_FILES if name in (None, DEFAULT_NAME) else (CONFIG,)
    return (*at_root, *named, *beside, f"*/{CONFIG}")
