"""CKPT and ADAPTER by hub id `org/name[@revision]`: the files that are needed, in the hub's own cache."""

import re
from pathlib import Path

from lorafuse.errors import LorafuseError, StorageError, shown
from lorafuse.sidecars import ALWAYS, PROCESSOR, TOKENIZER

HUB_ID = re.compile(r"(?P<repo>[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)(@(?P<revision>[^@]+))?")
CHECKPOINT_FILES = ("config.json", "*.safetensors", "model.safetensors.index.json", *ALWAYS, *TOKENIZER, *PROCESSOR)
ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors", "adapter_model.bin", *TOKENIZER, *PROCESSOR)


def local_dir(name: str, patterns: tuple[str, ...], kind: type[LorafuseError]) -> Path:
    """The directory of that name, else a snapshot of the repository of that id. Raises `kind` when there is neither."""
    path = Path(name)
    if path.is_dir():
        return path
    match = HUB_ID.fullmatch(name)
    if not match or path.exists():
        what = "is not a directory" if path.exists() else "no such directory"
        raise kind(f"{shown(name)}: {what}.")
    return _download(match["repo"], match["revision"], patterns, kind)


def _download(repo: str, revision: str | None, patterns: tuple[str, ...], kind: type[LorafuseError]) -> Path:
    # Imported here: it costs as much as the rest of the start-up, and most runs have local inputs.
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        HfHubHTTPError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    try:
        return Path(snapshot_download(repo, revision=revision, allow_patterns=list(patterns)))
    except RepositoryNotFoundError:
        raise kind(f"{repo}: no such directory, and no such repository on the hub (or it is private: log in first).") from None
    except RevisionNotFoundError:
        raise kind(f"{repo}: has no revision {shown(revision)}.") from None
    except LocalEntryNotFoundError:
        raise StorageError(
            f"{repo}: no such directory, and the hub cannot be reached to look for a repository of that name."
        ) from None
    except (HfHubHTTPError, OSError) as e:
        raise StorageError(f"{repo}: downloading failed: {shown(e)}") from None
