"""Files of torch.save, read by ranges: what `pytorch_model.bin` holds, and where in the file.

It replaces `torch.load`, which reads everything, and whose mmap makes every page that is read count as
resident memory. torch's own `weights_only` unpickler reads the object, with storages on the meta device,
which have a size and no memory. Format: an uncompressed zip archive with the pickle in `*/data.pkl` and each
storage in `*/data/KEY` (torch/serialization.py, `_save`).
"""

import hashlib
import pickle
import struct
import zipfile
from io import BytesIO
from typing import Any, NamedTuple

from lorafuse.errors import shown
from lorafuse.files.folder import OpenFile, read_fully, stream
from lorafuse.files.safetensors_file import LFS_HINT, LFS_MAGIC, FormatError, Header
from lorafuse.files.tensors import SAFETENSORS_NAMES, TensorInfo, TensorSpec

MAX_PICKLE_NBYTES = 100_000_000  # as much as a header of safetensors may have
_LOCAL_HEADER = struct.Struct("<26xHH")  # of a file in a zip archive: the lengths of its name and extra field
SAVE_AGAIN = "Load it with transformers and save it with save_pretrained, which makes safetensors."


class _Record(NamedTuple):
    """Where the bytes of an archive's file are in the archive."""

    start: int
    nbytes: int


def read_torch_header(file: OpenFile, nbytes: int, path: str, number: int) -> Header:
    """The tensors of a file of torch.save. Raises FormatError, OSError."""
    if read_fully(file, 0, len(LFS_MAGIC)) == LFS_MAGIC:
        raise FormatError(f"{path}: {LFS_HINT}")
    records = _records(file, nbytes, path)
    names = [name for name in records if name.endswith("/data.pkl")]
    if len(names) != 1:
        raise FormatError(
            f"{path}: is no file of torch.save: it has {len(names)} files data.pkl, expected 1."
        )
    root = names[0].removesuffix("data.pkl")
    order = records.get(f"{root}byteorder")
    if order and bytes(read_fully(file, *order)) != b"little":
        raise FormatError(f"{path}: was written on a machine with another order of bytes. {SAVE_AGAIN}")
    if records[names[0]].nbytes > MAX_PICKLE_NBYTES:
        raise FormatError(f"{path}: its data.pkl has {records[names[0]].nbytes} bytes. {SAVE_AGAIN}")
    pickled = bytes(read_fully(file, *records[names[0]]))
    loaded, key_of = _unpickled(pickled, path)
    record_of = {storage: f"{root}data/{key}" for storage, key in key_of.items()}
    tensors: dict[str, TensorInfo] = {}
    for name, tensor in loaded.items():
        tensors[name] = _located(name, tensor, records, record_of, number, path)
    return Header(hashlib.sha256(pickled).hexdigest(), {}, tensors)


def _records(file: OpenFile, nbytes: int, path: str) -> dict[str, _Record]:
    """What the archive holds. Raises FormatError."""
    try:
        with zipfile.ZipFile(stream(_Kept(file))) as archive:
            entries = archive.infolist()
    except (zipfile.BadZipFile, NotImplementedError, ValueError) as e:
        legacy = "" if read_fully(file, 0, 2) == b"PK" else " (torch before 1.6 wrote others)"
        raise FormatError(
            f"{path}: is no whole archive of torch.save{legacy}: {shown(e)}. {SAVE_AGAIN}"
        ) from None
    records = {}
    for entry in entries:
        if entry.compress_type != zipfile.ZIP_STORED or entry.file_size != entry.compress_size:
            raise FormatError(f"{path}: {shown(entry.filename)} is compressed; torch.save does not compress.")
        lengths = bytes(read_fully(file, entry.header_offset, _LOCAL_HEADER.size))
        if len(lengths) < _LOCAL_HEADER.size:
            raise FormatError(f"{path}: is truncated.")
        offset = entry.header_offset + _LOCAL_HEADER.size + sum(_LOCAL_HEADER.unpack(lengths))
        if offset + entry.file_size > nbytes:
            raise FormatError(f"{path}: {shown(entry.filename)} ends behind the end of the file.")
        records[entry.filename] = _Record(offset, entry.file_size)
    return records


class _Kept:
    """A file that stays open when the stream that reads it is closed."""

    def __init__(self, file: OpenFile) -> None:
        self.facts, self.read_into = file.facts, file.read_into

    def will_need(self, offset: int, nbytes: int) -> None:
        """Nothing is read ahead of a header."""

    def close(self) -> None:
        """The file is another's."""


def _unpickled(pickled: bytes, path: str) -> tuple[dict[str, Any], dict[int, str]]:
    """The tensors on the meta device, and the key of each storage. Raises FormatError."""
    import torch
    from torch._weights_only_unpickler import Unpickler

    storages: dict[str, Any] = {}

    def storage_of(saved_id: Any) -> Any:
        kind, storage_type, key, _, numel = saved_id
        if kind != "storage" or not isinstance(key, str):
            raise pickle.UnpicklingError(f"it refers to {shown(saved_id)}")
        dtype = torch.uint8 if storage_type is torch.UntypedStorage else storage_type.dtype
        if key not in storages:
            nbytes = numel * dtype.itemsize
            untyped = torch.UntypedStorage(nbytes, device="meta")  # type: ignore[no-untyped-call]
            storages[key] = torch.storage.TypedStorage(  # type: ignore[no-untyped-call]
                wrap_storage=untyped, dtype=dtype, _internal=True
            )
        return storages[key]

    try:
        reader = Unpickler(BytesIO(pickled), encoding="utf-8")
        reader.persistent_load = storage_of  # type: ignore[method-assign]
        loaded = reader.load()  # type: ignore[no-untyped-call]
    except Exception as e:  # a damaged pickle is another program, which may end in any way
        reason = shown(str(e).partition("\n")[0] or type(e).__name__, 300)
        raise FormatError(f"{path}: cannot be loaded safely (weights_only): {reason}") from None
    if not isinstance(loaded, dict) or not all(isinstance(value, torch.Tensor) for value in loaded.values()):
        raise FormatError(f"{path}: does not hold a dict of tensors.")
    return loaded, {storage._untyped_storage._cdata: key for key, storage in storages.items()}


def _located(
    name: object, tensor: Any, records: dict[str, _Record], key_of: dict[int, str], number: int, path: str
) -> TensorInfo:
    """Where a tensor's values are, by the storages of the archive. Raises FormatError."""
    if not isinstance(name, str):
        raise FormatError(f"{path}: has the key {shown(repr(name))}, which is no name of a tensor.")
    dtype = SAFETENSORS_NAMES.get(str(tensor.dtype).removeprefix("torch."))
    if dtype is None:
        raise FormatError(f"{path}: {shown(name)} has the dtype {tensor.dtype}, which is not supported.")
    dense = tensor.is_meta and str(tensor.layout) == "torch.strided" and not tensor.is_nested
    if not dense or tensor.is_conj() or tensor.is_neg() or not tensor.is_contiguous():
        raise FormatError(f"{path}: {shown(name)} is not stored row after row. {SAVE_AGAIN}")
    record = records.get(key_of.get(tensor.untyped_storage()._cdata, ""))
    start = tensor.storage_offset() * tensor.itemsize
    spec = TensorSpec(dtype, tuple(tensor.shape))
    if record is None or start + spec.nbytes > record.nbytes:
        raise FormatError(f"{path}: the values of {shown(name)} are not in the file.")
    return TensorInfo(spec, number, record.start + start)
