"""CKPT and ADAPTER by hub id `org/name[@revision]`: the files that are needed, in the hub's own cache, or
headers alone."""

import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lorafuse.errors import CheckpointError, LorafuseError, StorageError, shown
from lorafuse.files.folder import Folder
from lorafuse.files.folders import open_folder
from lorafuse.files.local_folder import LocalFolder
from lorafuse.files.names import SINGLE
from lorafuse.files.tensors import DTYPES, TensorInfo, TensorSpec
from lorafuse.settings import HUB_ID


def folder_of(
    name: str,
    patterns: Sequence[str],
    kind: type[LorafuseError],
    *,
    unwanted: Sequence[str] = (),
    further: Callable[[Folder], Sequence[str]] = lambda _: (),
) -> Folder:
    """The folder of that name, else a snapshot of the repository of that id: the files that match `patterns`
    and not `unwanted`, then those that match the patterns that `further` returns when it sees the first.
    Raises `kind` when there is neither."""
    folder = open_folder(name)
    if folder.is_there():
        return folder
    match = HUB_ID.fullmatch(name)
    if not match or folder.exists(""):
        what = "is not a directory" if folder.exists("") else "no such directory"
        raise kind(f"{shown(name)}: {what}.")
    snapshot = _snapshot(match, match["revision"], kind, patterns, unwanted)
    folder, fetched = LocalFolder(snapshot, name), set[str]()
    while more := sorted(set(further(folder)) - fetched):
        # The same commit, whatever happens on the hub meanwhile.
        folder = LocalFolder(_snapshot(match, snapshot.name, kind, more), name)
        fetched.update(more)
    return folder


def _snapshot(
    match: re.Match[str],
    revision: str | None,
    kind: type[LorafuseError],
    patterns: Sequence[str],
    unwanted: Sequence[str] = (),
) -> Path:
    """Where the hub's library put the files. Raises `kind`, StorageError."""
    with _hub_errors(match["repo"], match["revision"], kind):
        # Imported here: it costs as much as the rest of the start-up, and most runs have local inputs.
        from huggingface_hub import snapshot_download

        snapshot = snapshot_download(
            match["repo"],
            revision=revision,
            allow_patterns=list(patterns),
            ignore_patterns=list(unwanted),
        )
        return Path(snapshot)


def remote_tensors(name: str) -> dict[str, dict[str, TensorInfo]]:
    """The tensors of each shard of a checkpoint on the hub, by the headers alone; `offset` is not known.
    Raises CheckpointError, StorageError."""
    match = HUB_ID.fullmatch(name)
    assert match
    with _hub_errors(match["repo"], match["revision"], CheckpointError):
        from huggingface_hub import get_safetensors_metadata

        metadata = get_safetensors_metadata(match["repo"], revision=match["revision"]).files_metadata
    return {
        file: {
            tensor: TensorInfo(_spec(name, tensor, info.dtype, info.shape), number, 0)
            for tensor, info in part.tensors.items()
        }
        for number, (file, part) in enumerate(sorted(metadata.items()))
    }


def _spec(name: str, tensor: str, dtype: Any, shape: Any) -> TensorSpec:
    """What the hub's library read in a header, and does not check."""
    known = isinstance(dtype, str) and dtype in DTYPES and isinstance(shape, list)
    if not known or not all(type(n) is int and n >= 0 for n in shape):
        raise CheckpointError(
            f"{name}: {shown(tensor)} is {shown(dtype)} {shown(shape)}, which is not known here."
        )
    return TensorSpec(dtype, tuple(shape))


@contextmanager
def _hub_errors(repo: str, revision: str | None, kind: type[LorafuseError]) -> Iterator[None]:
    """Turns what the hub's library raises into errors of `kind`, or StorageError."""
    from huggingface_hub.errors import (
        GatedRepoError,
        HFValidationError,
        LocalEntryNotFoundError,
        NotASafetensorsRepoError,
        OfflineModeIsEnabled,
        RepositoryNotFoundError,
        RevisionNotFoundError,
        SafetensorsParsingError,
    )

    try:
        yield
    except HFValidationError:
        raise kind(f"{shown(repo)}: no such directory.") from None
    except GatedRepoError:
        raise kind(f"{repo}: is gated; ask for access on its page on the hub, and log in.") from None
    except RepositoryNotFoundError:
        raise kind(
            f"{repo}: no such directory, and no such repository on the hub (or it is private: log in first)."
        ) from None
    except RevisionNotFoundError:
        raise kind(f"{repo}: has no revision {shown(revision)}.") from None
    except NotASafetensorsRepoError:
        raise kind(f"{repo}: holds neither {SINGLE} nor {SINGLE}.index.json.") from None
    except SafetensorsParsingError as e:
        raise kind(f"{repo}: {shown(e)}") from None
    except (LocalEntryNotFoundError, OfflineModeIsEnabled):
        raise StorageError(
            f"{repo}: no such directory, and the hub cannot be reached to look for a repository of that name."
        ) from None
    except Exception as e:
        # Everything, since the HTTP library behind the hub changes, and only some have errors that are
        # OSErrors.
        raise StorageError(f"{repo}: downloading failed: {shown(e)}") from None
