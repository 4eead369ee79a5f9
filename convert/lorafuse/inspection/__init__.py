"""What a directory or a hub id holds: a checkpoint, an adapter, or the result of a merge, as one JSON-able
dict.

Headers, configs and small tensors are read, no weight. Of a hub id, the files of an adapter are fetched, of a
checkpoint only its config and the headers of its shards.
"""

from os import PathLike
from typing import Any

from lorafuse.arguments import checked
from lorafuse.errors import CheckpointError, shown
from lorafuse.files.folders import open_folder
from lorafuse.files.hub import as_named, folder_of
from lorafuse.files.local_folder import directory_as_typed
from lorafuse.files.names import INDEX, RECEIPT, SINGLE, TORCH_INDEX, TORCH_SINGLE
from lorafuse.files.uncollected import uncollected
from lorafuse.inspection.merged import inspect_merged

__all__ = ["inspect"]


@checked
def inspect(path: str | PathLike[str]) -> dict[str, Any]:
    """What `path`, a directory or a hub id `org/name[@revision]`, holds; "kind" is "merged", "adapter",
    "adapters" (one in each of several sub-folders) or "checkpoint". What keeps it from being merged is in
    "problems". Raises CheckpointError, AdapterError or, for a damaged receipt, ResultError where there is
    nothing that could be shown, and StorageError.
    """
    name = directory_as_typed(path)
    folder = open_folder(name)
    is_local = folder.is_there()
    folder = folder if is_local else folder_of(name, CheckpointError)
    name = as_named(name)
    if folder.exists(RECEIPT):
        return inspect_merged(folder, name)
    with uncollected():  # these import torch
        from lorafuse.adapters.reading.directory import adapters_in
        from lorafuse.arithmetic.torch_state import own_torch_state
        from lorafuse.inspection.adapter import inspect_adapters
        from lorafuse.inspection.checkpoint import inspect_checkpoint, inspect_remote

    with own_torch_state():
        at_root, names = adapters_in(folder)
        has_config = folder.exists("config.json")
        has_weights = any(folder.exists(file) for file in (SINGLE, INDEX, TORCH_SINGLE, TORCH_INDEX))
        if at_root or (names and not has_weights):
            return inspect_adapters(name, [None] if at_root else names)
        if has_config or has_weights:
            return inspect_checkpoint(folder, name) if is_local else inspect_remote(folder, name)
    raise CheckpointError(
        f"{shown(name)}: holds no checkpoint (config.json, {SINGLE}), no adapter (adapter_config.json) and "
        f"no result of a merge ({RECEIPT})."
    )
