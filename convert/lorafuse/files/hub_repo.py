"""One commit of a repository on the hub: its files as they are listed, and as they are fetched.

What was fetched is compared with the hash that the hub lists.
"""

import hashlib
import os
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import NamedTuple

from lorafuse.errors import LorafuseError, StorageError
from lorafuse.files.hashing import hash_file
from lorafuse.files.hub_calls import AGENT, asking, retried, watched
from lorafuse.files.local_folder import LocalFolder

# What tells what a repository holds; fetching it makes the library remember the commit for runs without a
# network.
CONFIGS = ("config.json", "adapter_config.json", "*/adapter_config.json")


class Entry(NamedTuple):
    """What the hub lists of a file: `sha256` of a large one, else `blob_id`, git's own hash."""

    nbytes: int
    sha256: str | None
    blob_id: str | None

    @property
    def identity(self) -> str:
        return self.sha256 or self.blob_id or ""


@dataclass(eq=False)
class HubRepo:
    """One commit of a repository. `named`: the id as the user gave it. `kind`: the errors of this input.
    `unlisted`: why the hub could not be asked, where only the cache is known. `placed`: files that were
    fetched to a place of their own. `checked`: files whose copy on this machine is what the hub lists.
    `in_use`: a merge reads all of the weights, so that what is opened is fetched as a whole; into `scratch`,
    where the cache is not wanted."""

    repo: str
    commit: str
    named: str
    kind: type[LorafuseError]
    entries: dict[str, Entry]
    unlisted: LorafuseError | None = None
    placed: dict[str, Path] = field(default_factory=dict)
    checked: set[str] = field(default_factory=set)
    in_use: bool = False
    scratch: Path | None = None

    @classmethod
    def at(cls, repo: str, revision: str | None, kind: type[LorafuseError]) -> "HubRepo":
        """The newest commit of a branch or tag, or a commit. Raises `kind`, StorageError."""
        named = f"{repo}@{revision}" if revision else repo
        with asking(repo, revision, kind):
            from huggingface_hub import snapshot_download

            options = {"revision": revision, "allow_patterns": list(CONFIGS), "max_workers": 1, **AGENT}
            snapshot = Path(retried(partial(snapshot_download, repo, **options)))
        try:
            with asking(repo, revision, kind):
                entries = retried(lambda: dict(listed_files(repo, snapshot.name)))
        except LorafuseError as e:  # the library found the commit in its cache
            return cls(repo, snapshot.name, named, kind, dict(_cached(repo, snapshot)), e)
        return cls(repo, snapshot.name, named, kind, entries)

    def local(self, path: str) -> Path | None:
        """Where a file lies on this machine, if it does. Of a small file only a right copy counts; a large
        one is compared by whoever reads all of it."""
        if path in self.placed:
            return self.placed[path]
        from huggingface_hub import try_to_load_from_cache

        cached = try_to_load_from_cache(self.repo, path, revision=self.commit)
        if not isinstance(cached, str):
            return None
        entry = self.entries[path]
        if entry.sha256 or path in self.checked:
            return Path(cached)
        if _identity_of(Path(cached), entry) != entry.identity:
            return None
        self.checked.add(path)
        return Path(cached)

    def fetch(
        self, path: str, into: Path | None = None, on_nbytes: Callable[[int], None] = lambda n: None
    ) -> Path:
        """A file, fetched into the hub's cache or into a folder, and compared with what the hub lists. Raises
        `kind`, StorageError."""
        label, entry, where = f"{self.named}/{path}", self.entries[path], str(into) if into else None
        if into and self._is_left(into / path, entry):
            return self._arrived(path, into / path, into)
        from huggingface_hub import hf_hub_download

        for force in (False, True):
            options = {"revision": self.commit, "local_dir": where, "force_download": force, **AGENT}
            options |= watched(on_nbytes)
            with asking(self.repo, self.commit, self.kind, label):
                local = Path(retried(partial(hf_hub_download, self.repo, path, **options)))
            if self.unlisted and not entry.identity:  # the hub came back: what it lists is not known
                raise self.unlisted
            found = _identity_of(local, entry)
            if found == entry.identity:
                break
        else:
            local.unlink(missing_ok=True)
            raise StorageError(
                f"{label}: what the hub sends is not what it lists: the hash is {found}, expected "
                f"{entry.identity}."
            )
        return self._arrived(path, local, into)

    def _is_left(self, path: Path, entry: Entry) -> bool:
        """Whether a run that was cut off left the file, which is removed if it is not whole."""
        if not path.exists():
            return False
        if _identity_of(path, entry) == entry.identity:
            return True
        path.unlink()
        return False

    def _arrived(self, path: str, local: Path, into: Path | None) -> Path:
        if into:
            self.placed[path] = local
        self.checked.add(path)
        return local

    def forget(self, path: str) -> None:
        """Remove a file that was fetched into a folder."""
        self.checked.discard(path)
        self.placed.pop(path).unlink(missing_ok=True)


def listed_files(repo: str, revision: str | None) -> Iterator[tuple[str, Entry]]:
    """What the hub lists."""
    from huggingface_hub import HfApi
    from huggingface_hub.hf_api import RepoFile

    for file in HfApi(**AGENT).list_repo_tree(repo, recursive=True, revision=revision):
        if isinstance(file, RepoFile):
            yield file.path, Entry(file.size, file.lfs.sha256 if file.lfs else None, file.blob_id)


def _cached(repo: str, snapshot: Path) -> Iterator[tuple[str, Entry]]:
    """What the hub's cache knows of a commit: the files that there are, as newer versions of the library
    keep them, and more of those that were fetched. Such a file is a link to a blob, whose name is its hash.
    """
    with suppress(Exception):  # no function, or no class of its error, in older versions
        from huggingface_hub import get_cached_repo_tree

        for file in get_cached_repo_tree(repo, revision=snapshot.name):
            yield file.path, Entry(file.size, None, None)
    for path in snapshot.rglob("*"):
        if path.is_file():
            blob = os.path.basename(os.path.realpath(path))
            known = blob if set(blob) <= set("0123456789abcdef") else ""
            sha256, blob_id = (known, None) if len(known) == 64 else (None, known or None)
            yield path.relative_to(snapshot).as_posix(), Entry(path.stat().st_size, sha256, blob_id)


def _identity_of(path: Path, entry: Entry) -> str:
    """The hash of a file, of the kind that the hub lists."""
    if entry.sha256 or not entry.blob_id:
        return hash_file(LocalFolder(path.parent), path.name).sha256 if entry.sha256 else ""
    digest = hashlib.sha1(b"blob %d\0" % path.stat().st_size, usedforsecurity=False)
    with open(path, "rb") as f:
        while chunk := f.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()
