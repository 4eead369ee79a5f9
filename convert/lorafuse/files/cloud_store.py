"""The objects below a URL of an object store, by obstore, which is imported when the first such URL is used.

Names are relative to the URL. Errors: FileNotFoundError for an object that is not there, StorageError for
all else; where a condition of a call did not hold, the function says so.
"""

import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import datetime
from functools import partial
from time import sleep
from typing import Any, NamedTuple, TypeVar

from lorafuse.errors import StorageError, shown
from lorafuse.files import cloud_client
from lorafuse.files.cloud_errors import NoConditionsError, asking, is_broken, is_unmet
from lorafuse.files.cloud_url import cloud_url, with_account

N_BREAKS = 4  # of an answer, before it is given up
LARGEST_COPY_NBYTES = 5 << 30  # of one call of S3
COPIED_NBYTES = 8 << 20
CHUNK_NBYTES = 1 << 17  # of an answer, which is not here twice
T = TypeVar("T")


class Meta(NamedTuple):
    """What a store says of an object: `e_tag` changes with its contents, `modified` is by its own clock."""

    name: str
    nbytes: int
    e_tag: str
    version: str
    modified: datetime

    @property
    def tag(self) -> "Tag":
        return Tag(self.e_tag, self.version)


class Tag(NamedTuple):
    """What a condition of a call is about: some stores look at the one, some at the other."""

    e_tag: str
    version: str = ""


@dataclass(frozen=True)
class CloudPlace:
    """The objects of the bucket `root` whose keys begin with `prefix`: empty, or with a slash at its end."""

    store: Any = field(compare=False, repr=False)
    root: str
    prefix: str = ""

    @classmethod
    def at(cls, url: str) -> "CloudPlace":
        """Raises UsageError for a URL that names no bucket, or where obstore is not installed."""
        parts = cloud_url(url)
        return cls(cloud_client.opened(parts), parts.root, f"{parts.prefix}/" if parts.prefix else "")

    def __str__(self) -> str:
        return f"{self.root}/{self.prefix}".rstrip("/") if self.prefix else self.root

    @property
    def address(self) -> str:
        """The same URL for all names of the place: one of Azure may name its account or leave it out."""
        root = with_account(self.root, os.environ)
        return f"{root}/{self.prefix}".rstrip("/") if self.prefix else root

    def __truediv__(self, name: str) -> str:
        """The URL of an object."""
        return f"{self.root}/{self.prefix}{name}"

    def below(self, name: str) -> "CloudPlace":
        return CloudPlace(self.store, self.root, f"{self.prefix}{name}/")

    def head(self, name: str) -> Meta:
        """What is known of an object. Raises FileNotFoundError."""
        return self._read(name, lambda: _meta(self.store.head(self.prefix + name), self.prefix))

    def get(self, name: str) -> tuple[bytes, Meta]:
        """A small object. Raises FileNotFoundError."""

        def get() -> tuple[bytes, Meta]:
            found = self.store.get(self.prefix + name)
            return bytes(found.bytes()), _meta(found.meta, self.prefix)

        return self._read(name, get)

    def get_range(self, name: str, start: int, stop: int) -> bytearray:
        """Bytes [start, stop) of an object. Raises FileNotFoundError."""
        data = bytearray(stop - start)
        self.read_into(name, start, memoryview(data))
        return data

    def read_into(self, name: str, start: int, data: memoryview, e_tag: str = "") -> bool:
        """Fill `data` with the bytes of an object from `start` on. False where the object has another `e_tag`
        by now. Raises FileNotFoundError."""
        options = {"range": (start, start + len(data)), **({"if_match": e_tag} if e_tag else {})}

        def fill() -> int:
            at = 0
            for chunk in self.store.get(self.prefix + name, options=options).stream(CHUNK_NBYTES):
                piece = memoryview(chunk)[: len(data) - at]
                data[at : at + len(piece)] = piece
                at += len(piece)
            return at

        try:
            at = self._read(name, fill)
        except Exception as e:
            if is_unmet(e):
                return False
            raise
        if at < len(data):
            raise StorageError(
                f"{shown(self / name)}: the store sent {at} bytes where {len(data)} were asked for; try "
                "again later."
            )
        return True

    def everything(self) -> Iterator[Meta]:
        """All objects, in sub-folders too."""

        def pages() -> list[Any]:
            return list(self.store.list(self.prefix.rstrip("/") or None))

        for page in self._read("", pages):
            yield from (_meta(entry, self.prefix) for entry in page)

    def list_here(self) -> tuple[list[Meta], list[str]]:
        """The objects that are in no sub-folder, and the sub-folders, sorted."""
        found = self._read("", lambda: self.store.list_with_delimiter(self.prefix.rstrip("/") or None))
        folders = [path.removeprefix(self.prefix).rstrip("/") for path in found["common_prefixes"]]
        return sorted(_meta(entry, self.prefix) for entry in found["objects"]), sorted(folders)

    def is_there(self) -> bool:
        """Whether there is any object."""
        pages = partial(self.store.list, self.prefix.rstrip("/") or None, chunk_size=1)
        return self._read("", lambda: any(pages()))

    def _read(self, name: str, call: Callable[[], T]) -> T:
        """What a call returns that changes nothing; it is made again when an answer broke off."""
        label = self / name if name else str(self)
        for wait_s in (cloud_client.FIRST_WAIT_S * 2**n for n in range(N_BREAKS)):
            with asking(label, self.root):
                try:
                    return call()
                except Exception as e:
                    if not is_broken(e):
                        raise
            sleep(wait_s)
        with asking(label, self.root):
            return call()

    def put(self, name: str, data: bytes) -> None:
        with asking(self / name, self.root):
            self.store.put(self.prefix + name, data, use_multipart=False)

    def put_new(self, name: str, data: bytes) -> Tag | None:
        """Make an object if it is not there. Returns its tag; None where it is there. Raises
        NoConditionsError where the store knows no such condition."""
        return self._put_if(name, data, "create")

    def replace(self, name: str, data: bytes, tag: Tag) -> Tag | None:
        """Replace an object if it still has that tag. Returns the new one; None where it has not. Raises
        NoConditionsError where the store knows no such condition."""
        return self._put_if(name, data, {name: value for name, value in tag._asdict().items() if value})

    def _put_if(self, name: str, data: bytes, mode: Any) -> Tag | None:
        try:
            with asking(self / name, self.root):
                put = self.store.put(self.prefix + name, data, mode=mode, use_multipart=False)
                return Tag(put["e_tag"] or "", put["version"] or "")
        except FileNotFoundError:  # what was to be replaced is gone
            return None
        except Exception as e:
            if is_unmet(e):
                return None
            if " 501 " in str(e) or "not supported" in str(e):
                raise NoConditionsError from None
            raise

    def writer(self, name: str, part_nbytes: int) -> "CloudWriter":
        return CloudWriter(self, name, part_nbytes)

    def delete(self, names: Iterable[str]) -> None:
        """What is not there does no harm."""
        for name in names:
            with suppress(FileNotFoundError), asking(self / name, self.root):
                self.store.delete(self.prefix + name)

    def copy(self, name: str, to: "CloudPlace", new_name: str, nbytes: int) -> None:
        """A copy of an object of that size in the same bucket; by this machine where the store makes none."""
        with asking(to / new_name, to.root):
            if nbytes <= LARGEST_COPY_NBYTES:
                self.store.copy(self.prefix + name, to.prefix + new_name)
                return
        part_nbytes = max(COPIED_NBYTES, -(-nbytes // 9_000))
        with to.writer(new_name, part_nbytes) as writer:
            for start in range(0, nbytes, COPIED_NBYTES):
                data = self.get_range(name, start, min(start + COPIED_NBYTES, nbytes))
                writer.write(data)


class CloudWriter:
    """An object on its way, in order; nothing shows before the context is left, and nothing is left after an
    error. What is written may not change any more: it is kept until it is sent. At most one part is on its
    way."""

    def __init__(self, place: CloudPlace, name: str, part_nbytes: int) -> None:
        self.label, self._root, self._is_open = place / name, place.root, True
        with asking(self.label, self._root):
            from obstore import open_writer

            self._writer = open_writer(
                place.store, place.prefix + name, buffer_size=part_nbytes, max_concurrency=1
            )

    def write(self, data: Any) -> None:
        with self._asking():
            self._writer.write(data)

    def finish(self) -> None:
        """The object is complete."""
        with self._asking():
            self._writer.close()
        self._is_open = False

    @contextmanager
    def _asking(self) -> Iterator[None]:
        try:
            with asking(self.label, self._root):
                yield
        except FileNotFoundError:
            raise StorageError(f"{shown(self.label)}: its upload is gone; something removed it.") from None

    def close(self) -> None:
        """Give it up, unless it is finished. What cannot be removed now is left to a rule of the bucket."""
        if self._is_open:
            self._is_open = False
            with suppress(StorageError, OSError), asking(self.label, self._root):
                self._writer.__exit__(GivenUp, GivenUp(), None)

    def __enter__(self) -> "CloudWriter":
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        try:
            if error is None:
                self.finish()
        finally:
            self.close()


class GivenUp(Exception):  # noqa: N818 (what obstore is told, so that it removes what was sent)
    """The object is not wanted any more."""


def _meta(entry: Any, prefix: str) -> Meta:
    return Meta(
        entry["path"].removeprefix(prefix),
        entry["size"],
        entry["e_tag"] or "",
        entry["version"] or "",
        entry["last_modified"],
    )
