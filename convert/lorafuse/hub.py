"""CKPT and ADAPTER by hub id `org/name[@revision]`: the files that are needed, in the hub's own cache."""

import glob
from pathlib import Path

from lorafuse.adapters.store import BIN, CONFIG, DEFAULT_NAME, INDEX, MLX, SAFETENSORS
from lorafuse.errors import LorafuseError, StorageError, shown
from lorafuse.settings import HUB_ID
from lorafuse.sidecars import ALWAYS, PROCESSOR, TOKENIZER

CHECKPOINT_FILES = ("config.json", "*.safetensors", "model.safetensors.index.json", *ALWAYS, *TOKENIZER, *PROCESSOR)
ADAPTER_FILES = (CONFIG, SAFETENSORS, "adapter_model-*.safetensors", INDEX, BIN, MLX)
# A pattern's * matches a slash too, and some repositories hold the same weights a second time under these names.
UNWANTED: dict[tuple[str, ...], tuple[str, ...]] = {CHECKPOINT_FILES: ("*/*.safetensors", "*/*.py", "consolidated*.safetensors")}


def adapter_files(name: str | None = None) -> tuple[str, ...]:
    """Patterns of an adapter's files, of the sub-folder when it has a name, and of the configs that tell which others there are."""
    beside = (*TOKENIZER, *PROCESSOR)
    named = tuple(f"{glob.escape(name)}/{file}" for file in (*ADAPTER_FILES, *beside)) if name else ()
    at_root = ADAPTER_FILES if name in (None, DEFAULT_NAME) else (CONFIG,)
    return (*at_root, *named, *beside, f"*/{CONFIG}")


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
        GatedRepoError,
        HFValidationError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    unwanted = list(UNWANTED.get(patterns, ()))
    try:
        return Path(snapshot_download(repo, revision=revision, allow_patterns=list(patterns), ignore_patterns=unwanted))
    except HFValidationError:
        raise kind(f"{shown(repo)}: no such directory.") from None
    except GatedRepoError:
        raise kind(f"{repo}: is gated; ask for access on its page on the hub, and log in.") from None
    except RepositoryNotFoundError:
        raise kind(f"{repo}: no such directory, and no such repository on the hub (or it is private: log in first).") from None
    except RevisionNotFoundError:
        raise kind(f"{repo}: has no revision {shown(revision)}.") from None
    except LocalEntryNotFoundError:
        raise StorageError(
            f"{repo}: no such directory, and the hub cannot be reached to look for a repository of that name."
        ) from None
    except Exception as e:
        # Everything, since the HTTP library behind the hub changes, and only some have errors that are OSErrors.
        raise StorageError(f"{repo}: downloading failed: {shown(e)}") from None
