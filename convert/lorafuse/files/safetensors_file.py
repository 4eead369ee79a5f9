"""The safetensors format and nothing else: a strict reader and a streaming writer.

It replaces `safetensors.safe_open`, whose mmap makes every page read count as resident memory and turns a
truncated source into SIGBUS, and `safetensors.save_file`, which holds a whole shard. Format: 8 bytes of
little-endian header length, a JSON header, then the data without holes
(https://github.com/huggingface/safetensors, README, "Format").
"""

import hashlib
import json
import math
import struct
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any, NamedTuple

from lorafuse.errors import CheckpointError, LorafuseError, StorageError, shown
from lorafuse.files.few_open import FewOpen
from lorafuse.files.folder import Buffer, Folder, OpenFile, read_fully
from lorafuse.files.tensors import DTYPES, StoredTensor, TensorInfo, TensorSpec

MAX_HEADER_NBYTES = 100_000_000  # the limit of the reference implementation
LFS_MAGIC = b"version https://git-lfs"
LFS_HINT = "is a git-LFS pointer, not the file itself; fetch it with `git lfs pull`."


class FormatError(LorafuseError):
    """The file breaks the format; whoever opened it knows whether it is a checkpoint's or an adapter's and
    says so."""


class Header(NamedTuple):
    """The hash of the bytes that say what a file holds, its metadata, and its tensors in the order of the
    file."""

    sha256: str
    metadata: dict[str, str]
    tensors: dict[str, TensorInfo]


ReadHeader = Callable[[OpenFile, int, str, int], Header]
"""(file, its size, what messages call it, its number in its store) → header. Raises FormatError, OSError."""


def read_header(file: OpenFile, nbytes: int, path: str, number: int) -> Header:
    """That of a safetensors file. Raises FormatError, OSError."""
    header, data_start = _read_header(file, nbytes, path)
    sha256 = hashlib.sha256(header).hexdigest()
    parsed = _parse_json(header, path)
    del header  # tens of megabytes for a model of many experts
    metadata = _check_metadata(_dict_of(parsed.pop("__metadata__", None)), path)
    return Header(sha256, metadata, _check_entries(parsed, data_start, nbytes, number, path))


class Shard:
    """The file `name` of a folder, open for ranged reads: a safetensors file, unless `read` says otherwise.
    `tensors` maps names to specs in file order; `facts` are the file's when it was opened; `label` is what
    messages call it."""

    def __init__(
        self,
        folder: Folder,
        name: str,
        number: int = 0,
        files: FewOpen | None = None,
        read: ReadHeader = read_header,
    ) -> None:
        self.name, self.label = name, folder / name
        self._files = files or FewOpen(folder)
        try:
            with self._files.opened(name) as file:
                self.facts = file.facts
                self.nbytes = self.facts.nbytes
                self.header_sha256, self.metadata, self.tensors = read(file, self.nbytes, self.label, number)
        except BaseException:
            self.close()
            raise

    def read_into(self, info: TensorInfo, start: int, buffer: Buffer) -> None:
        """Fill `buffer` with the bytes of a tensor from byte `start` on. Raises CheckpointError when the file
        got shorter."""
        view = memoryview(buffer)
        offset = info.offset + start
        try:
            file = self._files.take(self.name)
            try:
                while view:
                    n = file.read_into(offset, view)
                    if n == 0:
                        raise CheckpointError(
                            f"{self.label}: ends at byte {offset}; it was changed or truncated during the "
                            "run."
                        )
                    view = view[n:]
                    offset += n
            finally:
                self._files.give_back(self.name)
        except OSError as e:
            raise StorageError(f"{self.label}: reading at byte {offset} failed: {e.strerror}.") from e

    def will_need(self, info: TensorInfo, start: int, nbytes: int) -> None:
        """Hint that these bytes of a tensor are read soon."""
        with suppress(OSError), self._files.opened(self.name) as file:  # reading it tells what is wrong
            file.will_need(info.offset + start, nbytes)

    def close(self) -> None:
        self._files.close(self.name)


def _read_header(file: OpenFile, nbytes: int, path: str) -> tuple[bytearray, int]:
    head = read_fully(file, 0, len(LFS_MAGIC))
    if head == LFS_MAGIC:
        raise FormatError(f"{path}: {LFS_HINT}")
    if nbytes < 8:
        raise FormatError(f"{path}: {nbytes} bytes are too few for a safetensors file.")
    (n,) = struct.unpack("<Q", head[:8])
    if n > MAX_HEADER_NBYTES or 8 + n > nbytes:
        raise FormatError(
            f"{path}: says that its header has {n} bytes, but the file has {nbytes}; it is truncated or no "
            "safetensors file."
        )
    header = read_fully(file, 8, n)
    if not header.startswith(b"{"):
        raise FormatError(f"{path}: the header does not start with '{{'; it is no safetensors file.")
    return header, 8 + n


class _Entry(NamedTuple):
    """A tensor's entry in the header. Most of a large header's memory would be its dictionaries and lists."""

    dtype: object
    shape: object
    data_offsets: object


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any] | _Entry:
    unique = dict(pairs)
    if len(unique) != len(pairs):
        n_times = Counter(name for name, _ in pairs)
        raise ValueError(
            f"the name {shown(next(name for name in n_times if n_times[name] > 1))} occurs twice"
        )
    return _Entry(**unique) if unique.keys() == set(_Entry._fields) else unique


def _integer(text: str) -> int | float:
    # Rust takes -0 for a float, and Python takes its time over a thousand digits; no field of a header takes
    # NaN.
    return int(text) if text.isdigit() and len(text) < 20 else math.nan


def _parse_json(header: bytearray, path: str) -> dict[str, Any]:
    try:
        parsed = json.loads(header.decode("utf-8"), object_pairs_hook=_unique, parse_int=_integer)
    except (ValueError, RecursionError) as e:
        raise FormatError(f"{path}: the header is not valid: {shown(e) or type(e).__name__}.") from None
    return _dict_of(parsed)  # type: ignore[no-any-return]


def _dict_of(value: Any) -> Any:
    """Undoes what _unique does to a dictionary that happens to have an entry's keys: three tensors may be
    called like that."""
    return value._asdict() if isinstance(value, _Entry) else value


def _is_count(value: object) -> bool:
    return type(value) is int and 0 <= value < 2**63


def _overflows(shape: list[int]) -> bool:
    """Whether the number of elements, multiplied up in order, leaves 63 bits, even if a later dimension is
    0."""
    numel = 1
    for n in shape:
        numel *= n
        if not _is_count(numel):
            return True
    return False


def _is_unicode(text: str) -> bool:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:  # a lone surrogate, which JSON can spell and UTF-8 can't
        return False
    return True


def _check_metadata(metadata: object, path: str) -> dict[str, str]:
    if metadata is None:
        return {}
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise FormatError(f"{path}: __metadata__ is not a dictionary of strings.")
    if not all(map(_is_unicode, (*metadata, *metadata.values()))):
        raise FormatError(f"{path}: __metadata__ is not valid Unicode.")
    return metadata


def _check_entries(
    entries: dict[str, Any], data_start: int, nbytes: int, number: int, path: str
) -> dict[str, TensorInfo]:
    tensors: dict[str, TensorInfo] = {}
    specs: dict[TensorSpec, TensorSpec] = {}
    spans: list[tuple[int, int, str]] = []
    for name, entry in entries.items():
        if not _is_unicode(name):
            raise FormatError(f"{path}: the tensor name {shown(name)} is not valid Unicode.")
        if (
            not isinstance(entry, _Entry)
            or not isinstance(entry.data_offsets, list)
            or len(entry.data_offsets) != 2
        ):
            raise FormatError(
                f"{path}: the entry of {shown(name)} must have dtype, shape and two data_offsets, nothing "
                "else."
            )
        dtype, shape = entry.dtype, entry.shape
        begin, end = entry.data_offsets
        if not isinstance(dtype, str) or dtype not in DTYPES:
            raise FormatError(f"{path}: {shown(name)} has the dtype {shown(dtype)}, which is not known here.")
        if not isinstance(shape, list) or not all(map(_is_count, [*shape, begin, end])) or _overflows(shape):
            raise FormatError(f"{path}: {shown(name)} has an impossible shape or offset.")
        spec = TensorSpec(dtype, tuple(shape))
        spec = specs.setdefault(spec, spec)  # thousands of experts share a few
        if end - begin != spec.nbytes:
            raise FormatError(
                f"{path}: {shown(name)} is {shown(spec)}, {spec.nbytes} bytes, but has {end - begin} bytes "
                "of data."
            )
        tensors[name] = TensorInfo(spec, number, data_start + begin)
        spans.append((begin, end, name))
    at = 0
    spans.sort()
    for begin, end, name in spans:
        if begin != at:
            raise FormatError(
                f"{path}: the data of {shown(name)} starts at {begin}, expected {at}; tensors overlap or "
                "leave a hole."
            )
        at = end
    if data_start + at != nbytes:
        raise FormatError(
            f"{path}: has {nbytes} bytes, its header describes {data_start + at}; it is truncated or damaged."
        )
    return tensors


def header_of(tensors: Sequence[StoredTensor]) -> bytes:
    """The bytes before the data: length, JSON, padding to 8. Byte for byte what safetensors 0.8 writes for
    that order."""
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    at = 0
    for name, spec in tensors:
        entries[name] = {
            "dtype": spec.dtype,
            "shape": list(spec.shape),
            "data_offsets": [at, at + spec.nbytes],
        }
        at += spec.nbytes
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode("utf-8")
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text
