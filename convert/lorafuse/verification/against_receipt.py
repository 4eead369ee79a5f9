"""Directories are what they should be: a staged one what the plan said, a finished one what its receipt says.

The first is a stage of every run, and reads as the reference implementation of the format does.
"""

import posixpath
from collections.abc import Callable, Collection, Iterator
from contextlib import closing
from typing import Any

from lorafuse.errors import CheckpointError, ResultError, StorageError, shown
from lorafuse.files.checkpoint import Checkpoint
from lorafuse.files.folder import FileHash, Folder
from lorafuse.files.hashing import hash_file
from lorafuse.files.names import RECEIPT, stays_inside
from lorafuse.files.safetensors_file import FormatError
from lorafuse.formats.not_converted import quantization_of
from lorafuse.naming.vocabulary import conflict_in
from lorafuse.receipt.fields import Receipt
from lorafuse.receipt.read import stored_tensors

HARMLESS = (".md", ".html", ".png", ".svg", ".log")  # of files that people put beside a model


def verify_directory(folder: Folder, receipt: Receipt, on_nbytes: Callable[[int], object]) -> None:
    """Compare a merged directory with its receipt: every file's size and sha256, headers and index, names,
    dtypes and shapes of the weights, and whether the config says that they are quantized. Raises ResultError
    at the first difference."""
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
        if entry["file"] in files:
            raise ResultError(f"{shown(folder / RECEIPT)}: lists {shown(entry['file'])} twice.")
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
            if bool(quantization_of(ckpt.config)) != quantized:
                says = "says nothing of" if quantized else "speaks of"
                raise ResultError(
                    f"{shown(folder / 'config.json')}: {says} a quantization, which is not as the receipt "
                    "has the weights."
                )
    except (CheckpointError, StorageError) as e:
        raise ResultError(str(e)) from None


def _refuse_strays(folder: Folder, files: Collection[str]) -> None:
    """Files that the merge did not write, but those that no loader looks at. One may be taken for weights,
    for an adapter to apply once more, for the tokenizer, or for the code of the model."""
    for name in _strays(folder, "", files):
        raise ResultError(
            f"{shown(folder / name)}: is not in the receipt; a loader may take it for a part of the model."
        )


def _strays(folder: Folder, prefix: str, files: Collection[str]) -> Iterator[str]:
    """Names of files, and of whole folders that hold no file of the merge."""
    own = {prefix + name for name in folder.names("*") if not _is_harmless(name)} - {RECEIPT}
    yield from sorted(own - {*files})
    for name in folder.sub_folders():
        inner = f"{prefix}{name}/"
        if any(file.startswith(inner) for file in files):
            yield from _strays(folder.sub_folder(name), inner, files)
        elif not name.startswith("."):
            yield prefix + name


def _is_harmless(name: str) -> bool:
    return name.startswith(".") or posixpath.splitext(name)[1].lower() in HARMLESS


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
