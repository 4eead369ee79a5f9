"""The safetensors format and nothing else: a strict reader and a streaming writer.

It replaces `safetensors.safe_open`, whose mmap makes every page read count as resident memory and turns a truncated source
into SIGBUS, and `safetensors.save_file`, which holds a whole shard. Format: 8 bytes of little-endian header length, a JSON
header, then the data without holes (https://github.com/huggingface/safetensors, README, "Format").
"""

import hashlib
import json
import os
import stat
import struct
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lorafuse.errors import LorafuseError, StorageError, shown
from lorafuse.tensors import DTYPES, TensorInfo, TensorSpec

MAX_HEADER_NBYTES = 100_000_000  # the limit of the reference implementation
LFS_MAGIC = b"version https://git-lfs"
Buffer = bytearray | memoryview


class FormatError(LorafuseError):
    """The file breaks the format; whoever opened it knows whether it is a checkpoint's or an adapter's and says so."""


class Shard:
    """One safetensors file, open for ranged reads. `tensors` maps names to specs in file order."""

    def __init__(self, path: Path, number: int = 0) -> None:
        self.path = path
        self._fd = open_regular(path)
        try:
            self.nbytes = os.fstat(self._fd).st_size
            header, data_start = _read_header(self._fd, self.nbytes, path)
            self.header_sha256 = hashlib.sha256(header).hexdigest()
            parsed = _parse_json(header, path)
            self.metadata: dict[str, str] = parsed.pop("__metadata__", None) or {}
            self.tensors = _check_entries(parsed, data_start, self.nbytes, number, path)
        except BaseException:
            os.close(self._fd)
            raise

    def read_into(self, info: TensorInfo, start: int, buffer: Buffer) -> None:
        """Fill `buffer` with the bytes of a tensor from byte `start` on. Raises StorageError when the file got shorter."""
        view = memoryview(buffer)
        offset = info.offset + start
        while view:
            try:
                n = os.preadv(self._fd, [view], offset)
            except OSError as e:
                raise StorageError(f"{self.path}: reading at byte {offset} failed: {e.strerror}.") from e
            if n == 0:
                raise StorageError(f"{self.path}: ends at byte {offset}; it was changed or truncated during the run.")
            view = view[n:]
            offset += n

    def will_need(self, info: TensorInfo, start: int, nbytes: int) -> None:
        """Ask the kernel to read ahead."""
        os.posix_fadvise(self._fd, info.offset + start, nbytes, os.POSIX_FADV_WILLNEED)

    def close(self) -> None:
        os.close(self._fd)


def open_regular(path: Path) -> int:
    """Open a file for reading. A FIFO, a socket or a directory is refused instead of waited for."""
    # O_NONBLOCK: opening a FIFO without a writer would hang.
    fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    if not stat.S_ISREG(os.fstat(fd).st_mode):
        os.close(fd)
        raise FormatError(f"{shown(path)}: is not a regular file.")
    return fd


def _read_header(fd: int, nbytes: int, path: Path) -> tuple[bytes, int]:
    head = os.pread(fd, len(LFS_MAGIC), 0)
    if head == LFS_MAGIC:
        raise FormatError(f"{path}: is a git-LFS pointer, not the file itself; fetch it with `git lfs pull`.")
    if nbytes < 8:
        raise FormatError(f"{path}: {nbytes} bytes are too few for a safetensors file.")
    (n,) = struct.unpack("<Q", head[:8])
    if n > MAX_HEADER_NBYTES or 8 + n > nbytes:
        raise FormatError(
            f"{path}: says that its header has {n} bytes, but the file has {nbytes}; it is truncated or no safetensors file."
        )
    header = os.pread(fd, n, 8)
    if not header.startswith(b"{"):
        raise FormatError(f"{path}: the header does not start with '{{'; it is no safetensors file.")
    return header, 8 + n


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    unique = dict(pairs)
    if len(unique) != len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"the name {shown(next(n for n in names if names.count(n) > 1))!r} occurs twice")
    return unique


def _parse_json(header: bytes, path: Path) -> dict[str, Any]:
    try:
        return json.loads(header.decode("utf-8"), object_pairs_hook=_unique)  # type: ignore[no-any-return]
    except (ValueError, RecursionError) as e:
        raise FormatError(f"{path}: the header is not valid: {shown(e) or type(e).__name__}.") from None


def _is_count(value: object) -> bool:
    return type(value) is int and 0 <= value < 2**63


def _is_unicode(name: str) -> bool:
    try:
        name.encode("utf-8")
    except UnicodeEncodeError:  # a lone surrogate, which JSON can spell and UTF-8 can't
        return False
    return True


def _check_entries(entries: dict[str, Any], data_start: int, nbytes: int, number: int, path: Path) -> dict[str, TensorInfo]:
    tensors, spans = {}, []
    for name, entry in entries.items():
        if not _is_unicode(name):
            raise FormatError(f"{path}: the tensor name {shown(name)} is not valid Unicode.")
        try:
            dtype, shape, (begin, end) = entry["dtype"], entry["shape"], entry["data_offsets"]
        except (TypeError, KeyError, ValueError):
            raise FormatError(f"{path}: the header's entry of {shown(name)} lacks dtype, shape or data_offsets.") from None
        if dtype not in DTYPES:
            raise FormatError(f"{path}: {shown(name)} has the dtype {shown(dtype)}, which is not known here.")
        if not isinstance(shape, list) or not all(map(_is_count, [*shape, begin, end])):
            raise FormatError(f"{path}: {shown(name)} has an impossible shape or offset.")
        spec = TensorSpec(dtype, tuple(shape))
        if end - begin != spec.nbytes:
            raise FormatError(f"{path}: {shown(name)} is {spec}, {spec.nbytes} bytes, but has {end - begin} bytes of data.")
        tensors[name] = TensorInfo(spec, number, data_start + begin)
        spans.append((begin, end, name))
    at = 0
    for begin, end, name in sorted(spans):
        if begin != at:
            raise FormatError(
                f"{path}: the data of {shown(name)} starts at {begin}, expected {at}; tensors overlap or leave a hole."
            )
        at = end
    if data_start + at != nbytes:
        raise FormatError(f"{path}: has {nbytes} bytes, its header describes {data_start + at}; it is truncated or damaged.")
    return tensors


def header_of(tensors: Sequence[tuple[str, TensorSpec]]) -> bytes:
    """The bytes before the data: length, JSON, padding to 8. Byte for byte what safetensors 0.8 writes for that order."""
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    at = 0
    for name, spec in tensors:
        entries[name] = {"dtype": spec.dtype, "shape": list(spec.shape), "data_offsets": [at, at + spec.nbytes]}
        at += spec.nbytes
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode("utf-8")
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text


class ShardWriter:
    """Writes one safetensors file front to back, hashing on the way.

    The file is `PATH.part` until `finish`, which fsyncs it and gives it its name. Errors of the file system pass through.
    """

    WRITEBACK_NBYTES = 32 << 20

    def __init__(self, path: Path, tensors: Sequence[tuple[str, TensorSpec]]) -> None:
        self.path = path
        self._part = path.with_name(path.name + ".part")
        # 0o666 less the umask, as every other program's files; save_file's 0600 surprises those who share a directory.
        self._fd = os.open(self._part, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o666)
        self._sha256 = hashlib.sha256()
        header = header_of(tensors)
        self.nbytes = 0
        self._flushed = 0
        self._expected = len(header) + sum(spec.nbytes for _, spec in tensors)
        self.write(header)

    def write(self, data: bytes | memoryview) -> None:
        """Append bytes. The order of calls must be the order of the tensors."""
        self._sha256.update(data)
        view = memoryview(data)
        while view:
            view = view[os.write(self._fd, view) :]
        self.nbytes += len(data)
        if self.nbytes - self._flushed >= self.WRITEBACK_NBYTES:
            # Starts the writeback of what is dirty, without waiting: the final fsync then finds little to do.
            os.posix_fadvise(self._fd, self._flushed, self.nbytes - self._flushed, os.POSIX_FADV_DONTNEED)
            self._flushed = self.nbytes

    def finish(self) -> str:
        """fsync, close and rename. Returns the file's sha256."""
        if self.nbytes != self._expected or os.fstat(self._fd).st_size != self._expected:
            raise StorageError(f"{self.path}: {self.nbytes} bytes were written, the plan has {self._expected}.")
        os.fsync(self._fd)
        self.close()
        os.rename(self._part, self.path)
        return self._sha256.hexdigest()

    def close(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1
