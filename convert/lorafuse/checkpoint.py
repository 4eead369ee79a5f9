"""A directory of safetensors files as {name: TensorInfo} with ranged reads, and the checkpoint's config.

Only files that the index names are read: a stale `model.safetensors` beside an index is refused, `.bin` files are ignored.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from lorafuse.errors import CheckpointError, StorageError, listed, shown
from lorafuse.plain import read_limited
from lorafuse.shardfile import Buffer, FormatError, Shard
from lorafuse.tensors import TensorInfo

SINGLE = "model.safetensors"
INDEX = f"{SINGLE}.index.json"
RECEIPT = "lorafuse_receipt.json"  # of a checkpoint that lorafuse wrote
MAX_JSON_NBYTES = 64_000_000
# Of the fields that are read somewhere.
CONFIG_TYPES = {"model_type": str, "architectures": list, "text_config": dict, "quantization_config": dict}


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


class ShardedStore:
    """`single`, or the safetensors files that its index (`single` + ".index.json") names, as one Store.

    Index and files must agree: a name in two files, in the wrong file or in only one of index and files is refused, and so is a
    `single` that its index does not name. Raises FormatError, ValueError for an index that is no JSON object, OSError.
    `warnings`: what is wrong and does no harm.
    """

    def __init__(self, path: Path, single: str) -> None:
        index = _read_index(path, single)
        weight_map = _weight_map(index, path, single)
        self.shards: list[Shard] = []
        self.tensors: dict[str, TensorInfo] = {}
        try:
            for number, name in enumerate(sorted(set(weight_map.values())) or [single]):
                self._add(path / name, number)
            if weight_map:
                _compare(path, single, weight_map, self)
            self.warnings = _wrong_total(index, path, single, self)
        except BaseException:
            self.close()
            raise

    def _add(self, path: Path, number: int) -> None:
        shard = Shard(path, number)
        self.shards.append(shard)
        both = self.tensors.keys() & shard.tensors.keys()
        if both:
            name = min(both)
            first = self.shards[self.tensors[name].file].path.name
            raise FormatError(f"{path}: {shown(name)} is also in {first}; a tensor must be in one file.")
        self.tensors.update(shard.tensors)

    def read_into(self, name: str, start: int, buffer: Buffer) -> None:
        info = self.tensors[name]
        self.shards[info.file].read_into(info, start, buffer)

    def will_need(self, name: str, start: int, nbytes: int) -> None:
        info = self.tensors[name]
        self.shards[info.file].will_need(info, start, nbytes)

    def close(self) -> None:
        for shard in self.shards:
            shard.close()


class Checkpoint(ShardedStore):
    """A checkpoint directory: its stored tensors and `config` (config.json as a dict)."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self.config = read_json_dict(path / "config.json")
            _check_types(self.config, path)
            _refuse_other_formats(path)
            super().__init__(path, SINGLE)
        except (FileNotFoundError, NotADirectoryError) as e:
            raise CheckpointError(f"{e.filename}: not found; {shown(path)} is no complete checkpoint.") from None
        except (FormatError, ValueError) as e:
            raise CheckpointError(str(e)) from None
        except OSError as e:
            raise StorageError(f"{e.filename}: cannot be read: {e.strerror}.") from None
        try:
            refuse_unknown_quantization(self.config, path)
        except BaseException:
            self.close()
            raise


def read_json_dict(path: Path) -> dict[str, Any]:
    """A JSON file that must hold an object. Raises ValueError with a message that names the file."""
    data = read_limited(path, MAX_JSON_NBYTES)
    try:
        value = json.loads(data)
    except (ValueError, RecursionError) as e:
        raise ValueError(f"{path}: is not valid JSON: {shown(e) or type(e).__name__}.") from None
    if not isinstance(value, dict):
        raise ValueError(f"{path}: holds {type(value).__name__}, expected an object.")
    return value


def _check_types(config: dict[str, Any], path: Path) -> None:
    for name, kind in CONFIG_TYPES.items():
        value = config.get(name)
        if value is not None and not isinstance(value, kind):
            raise ValueError(f"{path / 'config.json'}: {name} is {shown(value)}; expected {kind.__name__}.")


def _refuse_other_formats(path: Path) -> None:
    if not (path / SINGLE).exists() and not (path / INDEX).exists():
        found = [p.name for p in sorted(path.glob("*.bin"))]
        hint = f" It has {listed(found)}: convert these to safetensors first." if found else ""
        raise CheckpointError(f"{shown(path)}: holds neither {SINGLE} nor {INDEX}.{hint}")


def _read_index(path: Path, single: str) -> dict[str, Any] | None:
    """None where there is none."""
    file = path / f"{single}.index.json"
    return read_json_dict(file) if file.exists() else None


def _weight_map(content: dict[str, Any] | None, path: Path, single: str) -> dict[str, str]:
    """Tensor name → file name from the index; empty where there is none."""
    if content is None:
        return {}
    index, weight_map = path / f"{single}.index.json", content.get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise FormatError(f"{index}: has no weight_map.")
    for name, file in weight_map.items():
        if not isinstance(file, str) or not file.endswith(".safetensors") or not stays_inside(file):
            raise FormatError(f"{index}: maps {shown(name)} to {shown(file)}, which is no safetensors file of this directory.")
    if single not in weight_map.values() and (path / single).exists():
        raise FormatError(f"{shown(path)}: holds both {index.name} and {single}, which it does not name; remove the stale one.")
    return weight_map


def stays_inside(name: str) -> bool:
    """Whether a name from a file may be a path inside its directory, on any system."""
    plain = name.isprintable() and not set(name) & set("\\:")
    return plain and not name.startswith("/") and all(part != ".." and len(part.encode()) < 256 for part in name.split("/"))


def _compare(path: Path, single: str, weight_map: dict[str, str], store: ShardedStore) -> None:
    index = f"{single}.index.json"
    for name, file in weight_map.items():
        info = store.tensors.get(name)
        if info is None or store.shards[info.file].path != path / file:
            raise FormatError(f"{path / file}: lacks {shown(name)}, which {index} expects there.")
    extra = min(store.tensors.keys() - weight_map.keys(), default=None)
    if extra is not None:
        holder = store.shards[store.tensors[extra].file].path
        raise FormatError(f"{holder}: holds {shown(extra)}, which {index} does not list.")


def _wrong_total(content: dict[str, Any] | None, path: Path, single: str, store: ShardedStore) -> list[str]:
    """Sizes come from the headers, so a total_size that says otherwise is only a sign that files do not belong together."""
    metadata = content.get("metadata") if content else None
    said = metadata.get("total_size") if isinstance(metadata, dict) else None
    found = sum(info.spec.nbytes for info in store.tensors.values())
    if said is None or said == found:
        return []
    where = path / f"{single}.index.json"
    return [f"{shown(where)}: says that the tensors have {shown(said)} bytes, they have {found}; is a file of another version?"]


def refuse_unknown_quantization(config: dict[str, Any], path: Path) -> None:
    """Raises CheckpointError for a config of the directory `path` that names another quantization than bitsandbytes."""
    for part in [config, *(value for value in config.values() if isinstance(value, dict))]:
        quantization = part.get("quantization_config")
        method = quantization.get("quant_method") if isinstance(quantization, dict) else None
        # Very old bitsandbytes configs name no method.
        if method not in (None, "bitsandbytes"):
            raise CheckpointError(
                f"{path / 'config.json'}: the checkpoint is quantized with {shown(method)}; bitsandbytes 4-bit and 8-bit and "
                "full precision are supported. Dequantize it first, or merge into the full-precision checkpoint."
            )
