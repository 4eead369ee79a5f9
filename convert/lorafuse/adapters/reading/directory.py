"""An adapter directory: which one is meant, its config, and its tensors, from safetensors or, with
weights_only, from `.bin`."""

import errno
import re
import zipfile
from typing import Any, BinaryIO

import torch

from lorafuse.adapters.reading.beside import Stores, trained_beside
from lorafuse.adapters.reading.module_patterns import ModulePatterns
from lorafuse.errors import AdapterError, StorageError, listed, shown
from lorafuse.files.folder import Buffer, Folder, stream
from lorafuse.files.instead import instead_of_adapter
from lorafuse.files.json_yaml import read_json_dict
from lorafuse.files.safetensors_file import LFS_HINT, LFS_MAGIC, FormatError
from lorafuse.files.stores import ShardedStore, Store
from lorafuse.files.tensors import SAFETENSORS_NAMES, TensorInfo, TensorSpec

CONFIG = "adapter_config.json"
SAFETENSORS = "adapter_model.safetensors"
INDEX = f"{SAFETENSORS}.index.json"
BIN = "adapter_model.bin"
MLX = "adapters.safetensors"
# Of a `.bin`, which is held whole. The plan compares it with --memory-limit, but only once it is loaded.
MAX_BIN_NBYTES = 16 << 30
# The reason in a refusal of torch.load, whose other lines advise to load without weights_only.
_REASON = re.compile(
    r"(?:WeightsUnpickler error:|\n(?=Trying to load))\s*(.+?)(?:\s+Please use|\s+Check the doc|\n|$)"
)
DEFAULT_NAME = "default"  # of the adapter that PEFT saves into the directory itself


def is_mlx(config: dict[str, Any]) -> bool:
    """Whether a config was written by MLX-LM, which knows no `peft_type`."""
    return "peft_type" not in config and not {"fine_tune_type", "lora_parameters"}.isdisjoint(config)


def base_name_of(config: dict[str, Any]) -> str | None:
    """What a config calls the base that its adapter was trained on: a repository or a path, if anything."""
    name = config.get("model" if is_mlx(config) else "base_model_name_or_path")
    return name if isinstance(name, str) and name else None


def adapters_in(root: Folder) -> tuple[bool, list[str]]:
    """Whether a folder itself holds an adapter, and the names of the sub-folders that hold adapters."""
    at_root = any(root.exists(file) for file in (CONFIG, SAFETENSORS, INDEX, BIN, MLX))
    return at_root, [name for name in root.sub_folders() if root.exists(f"{name}/{CONFIG}")]


def adapter_folder(root: Folder, name: str | None) -> str | None:
    """The sub-folder of `root` with the adapter that is meant, where PEFT saves every adapter not called
    "default"; None for `root` itself.

    Without a name it is `root` if that holds an adapter, whatever its sub-folders (a trainer's checkpoints)
    hold, else the only sub-folder with one. Raises AdapterError when there are several, or none of that name.
    """
    at_root, names = adapters_in(root)
    if name is None:
        if len(names) > 1 and not at_root:
            raise AdapterError(
                f"{shown(root)}: holds several adapters: {listed(names)}; choose one by its name "
                "(--adapter-name)."
            )
        return None if at_root or not names else names[0]
    if name == DEFAULT_NAME and at_root:
        return None
    if name not in names:
        choices = [DEFAULT_NAME, *names] if at_root else names
        has = f"it has {listed(choices)}" if choices else "it has none"
        raise AdapterError(f"{shown(root)}: has no adapter named {shown(name)}; {has}.")
    return name


class AdapterDir:
    """The adapter in the folder `root`, which the user called `name`, or in a sub-folder of it.

    `root` is that folder, `folder` where its files are, `config` adapter_config.json as a dict, `file_name`
    the file of its tensors or their index, `file` what messages about tensors name, `files` all that is read,
    `nbytes` what the store keeps in memory as long as it is open. `beside` are the files of weights that were
    trained beside the adapter, and `beside_tensors` the names of these.
    """

    def __init__(self, root: Folder, sub_folder: str | None = None, name: str | None = None) -> None:
        self.root, self.sub_folder = root, sub_folder
        folder = self.folder = root if sub_folder is None else root.sub_folder(sub_folder)
        self.name = str(folder) if name is None else name
        try:
            self.config = read_json_dict(folder, CONFIG)
            self.store: Store
            self.patterns: dict[str, ModulePatterns] = {}  # those that were looked into
            self.nbytes = 0
            self._bins: list[ShardedStore] = []
            single = MLX if is_mlx(self.config) else SAFETENSORS
            index = f"{single}.index.json"
            self.file_name = index if folder.exists(index) else single
            if folder.exists(self.file_name):
                self.store = ShardedStore(folder, single)
            elif single == MLX:
                raise AdapterError(f"{folder / CONFIG}: is an MLX-LM config, but {_missing_mlx(folder)}")
            elif folder.exists(BIN):
                self.file_name = BIN
                self.store = self._open_bin(BIN)
            else:
                raise AdapterError(
                    f"{shown(folder)}: holds neither {SAFETENSORS} nor {BIN}: the adapter's weights are "
                    "missing. Was its upload or download cut off?"
                )
            self._own_store = self.store
            self._open_beside()
        except FileNotFoundError as e:
            raise AdapterError(
                f"{e.filename}: not found; {shown(folder)} is no PEFT adapter.{instead_of_adapter(folder)}"
            ) from None
        except (FormatError, ValueError) as e:
            raise AdapterError(str(e)) from None
        except OSError as e:
            raise StorageError(f"{e.filename}: cannot be read: {e.strerror}.") from None

    def _open_beside(self) -> None:
        """Add the tensors of the files in `beside`."""
        self.beside = [] if is_mlx(self.config) else trained_beside(self.folder)
        self.beside_tensors: frozenset[str] = frozenset()
        if not self.beside:
            return
        try:
            stores = {self.folder / name: self._open_bin(name) for name in self.beside}
            self.beside_tensors = frozenset(key for store in stores.values() for key in store.tensors)
            self.store = Stores({self.file: self._own_store, **stores})
        except BaseException:
            self.close()
            raise

    def _open_bin(self, name: str) -> Store:
        """A file of torch.save: read by ranges, and only where that cannot be done (torch before 1.6 wrote
        it, or its tensors do not lie row after row) loaded whole. Raises AdapterError."""
        try:
            store = ShardedStore(self.folder, name)
        except FormatError:
            self.nbytes += self.folder.facts(name).nbytes
            return BinStore(self.folder, name)
        self._bins.append(store)
        return store

    @property
    def file(self) -> str:
        return ", ".join(map(self.folder.__truediv__, (self.file_name, *self.beside)))

    @property
    def ties_embeddings(self) -> bool:
        """Whether an update of one of two tied embeddings is one of the other too: by the config, and in MLX,
        where the two are one module unless the head has an update of its own."""
        if is_mlx(self.config):
            return not any("lm_head." in key for key in self.store.tensors)
        return bool(self.config.get("ensure_weight_tying"))

    @property
    def base_name(self) -> str | None:
        """What the config calls the base that the adapter was trained on: a repository or a path, if
        anything."""
        return base_name_of(self.config)

    @property
    def files(self) -> list[str]:
        """Names in `folder`, the config's first."""
        own = self._own_store
        shards = [shard.name for shard in own.shards] if isinstance(own, ShardedStore) else []
        return list(dict.fromkeys([CONFIG, self.file_name, *shards, *self.beside]))

    def close(self) -> None:
        for store in (self._own_store, *self._bins):
            if isinstance(store, ShardedStore):
                store.close()


def _missing_mlx(folder: Folder) -> str:
    if folder.exists("adapters.npz"):
        return f"the adapter is in adapters.npz, which is not supported; save its arrays as {MLX}."
    return f"{MLX} is not beside it."


class BinStore:
    """A `.bin` adapter that cannot be read by ranges, as a Store: the whole file is loaded. Raises
    AdapterError for what is no dict of plain tensors, or takes more than `max_nbytes`."""

    def __init__(self, folder: Folder, name: str, max_nbytes: int = MAX_BIN_NBYTES) -> None:
        path, file = folder / name, folder.open(name)
        with stream(file) as f:
            _refuse_bad_archive(f, file.facts.nbytes, path, max_nbytes)
            f.seek(0)
            loaded = _loaded(f, path)
        if not isinstance(loaded, dict) or not all(isinstance(t, torch.Tensor) for t in loaded.values()):
            raise AdapterError(f"{path}: does not hold a dict of tensors.")
        _refuse_unusual(loaded, file.facts.nbytes, path)
        self._data: dict[str, torch.Tensor] = {}
        self.tensors: dict[str, TensorInfo] = {}
        for name, tensor in loaded.items():
            dtype = SAFETENSORS_NAMES.get(str(tensor.dtype).removeprefix("torch."))
            if dtype is None:
                raise AdapterError(
                    f"{path}: {shown(name)} has the dtype {tensor.dtype}, which is not supported."
                )
            self._data[name] = tensor.detach().contiguous().reshape(-1).view(torch.uint8)
            self.tensors[name] = TensorInfo(TensorSpec(dtype, tuple(tensor.shape)), 0, 0)

    def read_into(self, name: str, start: int, buffer: Buffer) -> None:
        data: Any = self._data[name].numpy()
        memoryview(buffer)[:] = memoryview(data)[start : start + len(buffer)]

    def will_need(self, name: str, start: int, nbytes: int) -> None:
        """Everything is in memory."""


def _loaded(f: BinaryIO, path: str) -> Any:
    """What torch.load reads. Raises AdapterError, OSError."""
    try:
        return torch.load(f, map_location="cpu", weights_only=True)
    except Exception as e:
        # A damaged pickle is another program, which may end in any way; EINVAL is a seek to before the file.
        if isinstance(e, OSError) and e.errno != errno.EINVAL:
            raise
        text = str(e)
        if "weights_only" in text:
            found = _REASON.search(text)
            text = found[1] if found else ""
        reason = shown(text.partition("\n")[0] or type(e).__name__, 300)
        raise AdapterError(f"{path}: cannot be loaded safely (weights_only): {reason}") from None


def _refuse_unusual(loaded: dict[Any, torch.Tensor], nbytes: int, path: str) -> None:
    """Raises AdapterError for what is no name, and for tensors that are not values in the file, side by side:
    a few bytes can stand for gigabytes of them."""
    copied_nbytes = 0
    for name, tensor in loaded.items():
        if not isinstance(name, str):
            raise AdapterError(f"{path}: has the key {shown(repr(name))}, which is no name of a tensor.")
        form = _unusual_form(tensor)
        if form:
            raise AdapterError(f"{path}: {shown(name)} is a {form} tensor, which is not supported.")
        held = tensor.untyped_storage().nbytes()
        if tensor.nbytes > held:
            raise AdapterError(
                f"{path}: {shown(name)} has {tensor.nbytes} bytes by its shape, and {held} in the file."
            )
        copied_nbytes += 0 if tensor.is_contiguous() else tensor.nbytes
    if copied_nbytes > nbytes:
        raise AdapterError(f"{path}: unpacks to {copied_nbytes} bytes from {nbytes}; its tensors overlap.")


def _unusual_form(tensor: torch.Tensor) -> str | None:
    """What a tensor is but its values, row after row."""
    if tensor.is_nested:
        return "nested"
    if tensor.layout != torch.strided:
        return "sparse"
    if tensor.is_meta:
        return "meta"
    if tensor.is_conj():
        return "conjugate"
    return "negated" if tensor.is_neg() else None


def _refuse_bad_archive(f: BinaryIO, nbytes: int, path: str, max_nbytes: int) -> None:
    """torch.load unpacks whatever size the archive declares, so sizes are compared with the file's before."""
    if f.read(len(LFS_MAGIC)) == LFS_MAGIC:
        raise AdapterError(f"{path}: {LFS_HINT}")
    if nbytes > max_nbytes:
        raise AdapterError(
            f"{path}: has {nbytes} bytes, which are loaded at once; at most {max_nbytes} are. Save it as "
            f"{SAFETENSORS}."
        )
    try:
        if not zipfile.is_zipfile(f):
            return
        with zipfile.ZipFile(f) as archive:
            unpacked = sum(entry.file_size for entry in archive.infolist())
    except (zipfile.BadZipFile, NotImplementedError, ValueError) as e:
        raise AdapterError(f"{path}: is no valid archive of torch.save: {shown(e)}.") from None
    if unpacked > nbytes:
        raise AdapterError(
            f"{path}: unpacks to {unpacked} bytes from {nbytes}; torch.save does not compress."
        )
