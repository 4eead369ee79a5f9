"""An adapter directory: its config and its tensors, from `adapter_model.safetensors` or, with weights_only, from `.bin`."""

import pickle
import zipfile
from pathlib import Path
from typing import Any

import torch

from lorafuse.checkpoint import ShardedStore, Store, read_json_dict
from lorafuse.errors import AdapterError, StorageError, shown
from lorafuse.shardfile import LFS_MAGIC, Buffer, FormatError, open_regular
from lorafuse.tensors import SAFETENSORS_NAMES, TensorInfo, TensorSpec

CONFIG = "adapter_config.json"
SAFETENSORS = "adapter_model.safetensors"
BIN = "adapter_model.bin"


class AdapterDir:
    """`config` (adapter_config.json as a dict), `store`, and `nbytes`: what the store keeps in memory as long as it is open.
    `name` is the adapter as the user named it."""

    def __init__(self, path: Path, name: str | None = None) -> None:
        self.path, self.name = path, str(path) if name is None else name
        try:
            self.config = read_json_dict(path / CONFIG)
            self.store: Store
            self.file = path / SAFETENSORS
            self.nbytes = 0
            if self.file.exists():
                self.store = ShardedStore([self.file])
            elif (path / BIN).exists():
                self.file = path / BIN
                self.store = BinStore(self.file)
                self.nbytes = self.file.stat().st_size
            else:
                raise AdapterError(f"{shown(path)}: holds neither {SAFETENSORS} nor {BIN}.")
        except FileNotFoundError as e:
            raise AdapterError(f"{e.filename}: not found; {shown(path)} is no PEFT adapter.") from None
        except (FormatError, ValueError) as e:
            raise AdapterError(str(e)) from None
        except OSError as e:
            raise StorageError(f"{e.filename}: cannot be read: {e.strerror}.") from None

    def close(self) -> None:
        if isinstance(self.store, ShardedStore):
            self.store.close()


class BinStore:
    """A `.bin` adapter as a Store. The whole file is loaded: the format of torch.save offers no ranged reads."""

    def __init__(self, path: Path) -> None:
        _refuse_bad_archive(path)
        try:
            loaded = torch.load(path, map_location="cpu", weights_only=True)
        except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError, KeyError, TypeError, AttributeError) as e:
            reason = shown(str(e).partition("\n")[0], 300)
            raise AdapterError(f"{path}: cannot be loaded safely (weights_only): {reason}") from None
        if not isinstance(loaded, dict) or not all(isinstance(t, torch.Tensor) for t in loaded.values()):
            raise AdapterError(f"{path}: does not hold a dict of tensors.")
        self._data: dict[str, torch.Tensor] = {}
        self.tensors: dict[str, TensorInfo] = {}
        for name, tensor in loaded.items():
            dtype = SAFETENSORS_NAMES.get(str(tensor.dtype).removeprefix("torch."))
            if dtype is None:
                raise AdapterError(f"{path}: {shown(name)} has the dtype {tensor.dtype}, which is not supported.")
            self._data[name] = tensor.contiguous().reshape(-1).view(torch.uint8)
            self.tensors[name] = TensorInfo(TensorSpec(dtype, tuple(tensor.shape)), 0, 0)

    def read_into(self, name: str, start: int, buffer: Buffer) -> None:
        data: Any = self._data[name].numpy()
        memoryview(buffer)[:] = memoryview(data)[start : start + len(buffer)]

    def will_need(self, name: str, start: int, nbytes: int) -> None:
        """Everything is in memory."""


def _refuse_bad_archive(path: Path) -> None:
    """torch.load unpacks whatever size the archive declares, so sizes are compared with the file's before."""
    with open(open_regular(path), "rb") as f:
        head = f.read(len(LFS_MAGIC))
    if head == LFS_MAGIC:
        raise AdapterError(f"{path}: is a git-LFS pointer, not the file itself; fetch it with `git lfs pull`.")
    if not zipfile.is_zipfile(path):
        return
    with zipfile.ZipFile(path) as archive:
        unpacked = sum(entry.file_size for entry in archive.infolist())
    if unpacked > path.stat().st_size:
        raise AdapterError(f"{path}: unpacks to {unpacked} bytes from {path.stat().st_size}; torch.save does not compress.")
