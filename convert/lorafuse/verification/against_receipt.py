"""Directories are what they should be: a staged one what the plan said, a finished one what its receipt says.

The first is a stage of every run, and reads as the reference implementation of the format does.
"""

import posixpath
from collections.abc import Callable, Collection
from contextlib import closing
from typing import Any

from lorafuse.errors import CheckpointError, ResultError, StorageError, shown
from lorafuse.files.checkpoint import Checkpoint
from lorafuse.files.folder import Folder
from lorafuse.files.hashing import FileHash, hash_file
from lorafuse.files.names import INDEX, RECEIPT, stays_inside
from lorafuse.files.safetensors_file import FormatError
from lorafuse.naming.vocabulary import conflict_in
from lorafuse.receipt.read import stored_tensors

LOADED = (".safetensors", ".bin", ".gguf", ".pt", ".pth")


def verify_directory(folder: Folder, receipt: dict[str, Any], on_nbytes: Callable[[int], object]) -> None:
    """Compare a merged directory with its receipt: every file's size and sha256, headers and index, names,
    dtypes and shapes of the weights, and that transformers would find a config. Raises ResultError at the
    first difference."""
    files: dict[str, FileHash] = {}
    for entry in receipt["outputs"]:
        if (
            not isinstance(entry, dict)
            or not isinstance(entry.get("file"), str)
            or not stays_inside(entry["file"])
        ):
            raise ResultError(
                f"{shown(folder / RECEIPT)}: has the output {shown(entry)}, which is no file of this "
                "directory."
            )
        files[entry["file"]] = FileHash(entry.get("size", -1), entry.get("sha256", ""))
    _refuse_strays(folder, files)
    for name, expected in files.items():
        _verify_file(folder, name, expected, on_nbytes)
    try:
        with closing(Checkpoint(folder)) as ckpt:
            _verify_tensors(ckpt, receipt["tensors"])
            if conflict := conflict_in(ckpt.tensors, ckpt.config):
                raise ResultError(f"{shown(folder)}: {conflict}.")
            quantized = any("stored" in entry for entry in receipt["tensors"].values())
            if ("quantization_config" in ckpt.config) != quantized or not ckpt.config.get("model_type"):
                raise ResultError(f"{shown(folder / 'config.json')}: is no config of a merged model.")
    except (CheckpointError, StorageError) as e:
        raise ResultError(str(e)) from None


def _refuse_strays(folder: Folder, files: Collection[str]) -> None:
    """Files that a loader would take for weights, or for an adapter to apply once more."""
    for name in sorted([*folder.names("*"), *folder.sub_folders()]):
        suffix = posixpath.splitext(name)[1]
        loaded = suffix in LOADED or name in (INDEX, "adapter_config.json")
        if loaded and name not in files:
            raise ResultError(
                f"{shown(folder / name)}: is not in the receipt; a loader may take it for a part of the "
                "model."
            )


def _verify_file(folder: Folder, name: str, expected: FileHash, on_nbytes: Callable[[int], object]) -> None:
    path = folder / name
    try:
        # Before its bytes are read: a file that is too long may be very long.
        nbytes = folder.facts(name).nbytes
        if nbytes != expected.size:
            raise ResultError(f"{shown(path)}: has {nbytes} bytes, the receipt says {shown(expected.size)}.")
        actual = hash_file(folder, name, on_nbytes)
    except (FileNotFoundError, NotADirectoryError):
        raise ResultError(f"{shown(path)}: is missing.") from None
    except FormatError as e:
        raise ResultError(str(e)) from None
    if actual != expected:
        raise ResultError(
            f"{shown(path)}: was changed: its sha256 is {actual.sha256}, the receipt says "
            f"{shown(expected.sha256)}."
        )


def _verify_tensors(ckpt: Checkpoint, planned: dict[str, Any]) -> None:
    stored = {name: (info.spec.torch_name, list(info.spec.shape)) for name, info in ckpt.tensors.items()}
    expected = {stored.name: (stored.dtype, stored.shape) for stored in stored_tensors(planned)}
    for name in sorted(stored.keys() | expected.keys()):
        if stored.get(name) != expected.get(name):
            raise ResultError(
                f"{shown(ckpt.folder)}: {shown(name)} is {shown(stored.get(name, 'missing'))}; the receipt "
                f"says {shown(expected.get(name, 'nothing of it'))}."
            )
