"""Stored tensors by name with ranged reads: one file, or the files that an index names."""

import posixpath
from collections.abc import Mapping
from typing import Any, Protocol

from lorafuse.errors import shown
from lorafuse.files.few_open import FewOpen
from lorafuse.files.folder import Buffer, Folder
from lorafuse.files.json_yaml import read_json_dict
from lorafuse.files.names import stays_inside
from lorafuse.files.safetensors_file import FormatError, Shard, read_header
from lorafuse.files.tensors import TensorInfo
from lorafuse.files.torch_file import read_torch_header
from lorafuse.files.uncollected import uncollected


class Store(Protocol):
    """Stored tensors by name, with ranged reads: a checkpoint or an adapter file."""

    @property
    def tensors(self) -> Mapping[str, TensorInfo]: ...

    def read_into(self, name: str, start: int, buffer: Buffer) -> None:
        """Fill `buffer` with the tensor's bytes from byte `start` on."""

    def will_need(self, name: str, start: int, nbytes: int) -> None:
        """Hint that these bytes are read soon."""


def read_all(store: Store, name: str) -> bytearray:
    """A small tensor's bytes."""
    buffer = bytearray(store.tensors[name].spec.nbytes)
    store.read_into(name, 0, buffer)
    return buffer


READERS = {".safetensors": read_header, ".bin": read_torch_header}


class ShardedStore:
    """`single`, or the files that its index (`single` + ".index.json") names, as one Store: safetensors
    files, or those of torch.save, by the suffix.

    Index and files must agree: a name in two files, in the wrong file or in only one of index and files is
    refused, and so is a `single` that its index does not name. Raises FormatError, ValueError for an index
    that is no JSON object, OSError. `warnings`: what is wrong and does no harm. `nbytes_read`: about how many
    bytes of tensors were read so far, over all threads.
    """

    @uncollected()
    def __init__(self, folder: Folder, single: str) -> None:
        index = _read_index(folder, single)
        weight_map = _weight_map(index, folder, single)
        self.shards: list[Shard] = []
        self._files = FewOpen(folder)
        self.nbytes_read = 0
        self.tensors: dict[str, TensorInfo] = {}
        try:
            for number, name in enumerate(sorted(set(weight_map.values())) or [single]):
                self._add(folder, name, number)
            if weight_map:
                _compare(folder, single, weight_map, self)
            self.warnings = _wrong_total(index, folder, single, self)
        except BaseException:
            self.close()
            raise

    def _add(self, folder: Folder, file: str, number: int) -> None:
        shard = Shard(folder, file, number, self._files, READERS[posixpath.splitext(file)[1]])
        self.shards.append(shard)
        both = self.tensors.keys() & shard.tensors.keys()
        if both:
            name = min(both)
            first = posixpath.basename(self.shards[self.tensors[name].file].name)
            raise FormatError(
                f"{shard.label}: {shown(name)} is also in {first}; a tensor must be in one file."
            )
        self.tensors.update(shard.tensors)
        shard.tensors.clear()  # one table of them is enough

    def read_into(self, name: str, start: int, buffer: Buffer) -> None:
        info = self.tensors[name]
        self.shards[info.file].read_into(info, start, buffer)
        self.nbytes_read += memoryview(buffer).nbytes

    def will_need(self, name: str, start: int, nbytes: int) -> None:
        info = self.tensors[name]
        self.shards[info.file].will_need(info, start, nbytes)

    def close(self) -> None:
        for shard in self.shards:
            shard.close()


def _read_index(folder: Folder, single: str) -> dict[str, Any] | None:
    """None where there is none."""
    index = f"{single}.index.json"
    return read_json_dict(folder, index) if folder.exists(index) else None


def _weight_map(content: dict[str, Any] | None, folder: Folder, single: str) -> dict[str, str]:
    """Tensor name → file name from the index; empty where there is none."""
    if content is None:
        return {}
    index, weight_map = folder / f"{single}.index.json", content.get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise FormatError(f"{index}: has no weight_map.")
    for name, file in weight_map.items():
        suffix = posixpath.splitext(single)[1]
        if not isinstance(file, str) or not file.endswith(suffix) or not stays_inside(file):
            raise FormatError(
                f"{index}: maps {shown(name)} to {shown(file)}, which is no {suffix[1:]} file of this "
                "directory."
            )
    if single not in weight_map.values() and folder.exists(single):
        raise FormatError(
            f"{shown(folder)}: holds both {single}.index.json and {single}, which it does not name; remove "
            "the stale one."
        )
    return weight_map


def _compare(folder: Folder, single: str, weight_map: dict[str, str], store: ShardedStore) -> None:
    index = f"{single}.index.json"
    for name, file in weight_map.items():
        info = store.tensors.get(name)
        if info is None or store.shards[info.file].name != file:
            raise FormatError(f"{folder / file}: lacks {shown(name)}, which {index} expects there.")
    extra = min(store.tensors.keys() - weight_map.keys(), default=None)
    if extra is not None:
        holder = store.shards[store.tensors[extra].file].label
        raise FormatError(f"{holder}: holds {shown(extra)}, which {index} does not list.")


def _wrong_total(
    content: dict[str, Any] | None, folder: Folder, single: str, store: ShardedStore
) -> list[str]:
    """Sizes come from the headers, so a total_size that says otherwise is only a sign that files do not
    belong together."""
    metadata = content.get("metadata") if content else None
    said = metadata.get("total_size") if isinstance(metadata, dict) else None
    nbytes = sum(info.spec.nbytes for info in store.tensors.values())
    if said is None or said == nbytes or not single.endswith(".safetensors"):  # tied tensors lie in .bin once
        return []
    where = folder / f"{single}.index.json"
    return [
        f"{shown(where)}: says that the tensors have {shown(said)} bytes, they have {nbytes}; is a file of "
        "another version?"
    ]
