"""`lorafuse report`: the result of a merge as one HTML page, from its receipt.

Needs neither torch nor the weights.
"""

from contextlib import suppress
from os import PathLike
from typing import Any

from lorafuse.errors import CheckpointError, ResultError, shown
from lorafuse.files.hub import as_named, folder_of
from lorafuse.files.json_yaml import read_json_dict
from lorafuse.files.local_folder import directory_as_typed
from lorafuse.files.names import RECEIPT
from lorafuse.files.safetensors_file import FormatError
from lorafuse.receipt.read import read_receipt
from lorafuse.reporting.page import page

__all__ = ["report"]


def report(out_dir: str | PathLike[str]) -> str:
    """The result of a merge, a directory or a hub id `org/name[@revision]`, as an HTML page that needs
    nothing beside itself. Only the receipt and config.json are read. Raises CheckpointError where there is no
    such directory, ResultError where it has no receipt or a damaged one, and StorageError."""
    name = directory_as_typed(out_dir)
    folder = folder_of(name, CheckpointError)
    name = as_named(name)
    receipt = read_receipt(folder)
    if receipt is None:
        raise ResultError(
            f"{shown(name)}: has no {RECEIPT}, so it is no result of lorafuse; `lorafuse inspect` says what "
            "it is."
        )
    config: dict[str, Any] = {}
    with suppress(FormatError, OSError, ValueError):
        config = read_json_dict(folder, "config.json")
    return page(receipt, config, name)
