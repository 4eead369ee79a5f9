"""A directory of files of weights as {name: TensorInfo} with ranged reads, and the checkpoint's config.

Only files that the index names are read: a stale `model.safetensors` beside an index is refused. `.bin` files
are read where there are no safetensors files.
"""

from collections import Counter
from functools import cached_property
from typing import Any

from lorafuse.errors import CheckpointError, StorageError, shown
from lorafuse.files.folder import Folder
from lorafuse.files.instead import instead_of_checkpoint, instead_of_safetensors
from lorafuse.files.json_yaml import read_json_dict
from lorafuse.files.names import INDEX, SINGLE, TORCH_SINGLE
from lorafuse.files.safetensors_file import FormatError
from lorafuse.files.said_beside import with_said_beside
from lorafuse.files.stores import ShardedStore
from lorafuse.files.tensors import FLOATS

# Of the fields that are read somewhere.
CONFIG_TYPES = {"model_type": str, "architectures": list, "text_config": dict, "quantization_config": dict}


class Checkpoint(ShardedStore):
    """The checkpoint in a folder: its stored tensors and `config` (config.json as a dict, with the section of
    a file beside it that says how weights are stored where config.json does not). `config_files`: those that
    were read for it."""

    def __init__(self, folder: Folder) -> None:
        self.folder = folder
        try:
            self.config = read_json_dict(folder, "config.json")
            _check_types(self.config, folder)
            super().__init__(folder, weights_of(folder))
            self._read_beside(folder)
        except (FileNotFoundError, NotADirectoryError) as e:
            raise CheckpointError(
                f"{e.filename}: not found; {shown(folder)} is no complete checkpoint."
                f"{instead_of_checkpoint(folder)}"
            ) from None
        except (FormatError, ValueError) as e:
            raise CheckpointError(str(e)) from None
        except OSError as e:
            raise StorageError(f"{e.filename}: cannot be read: {e.strerror}.") from None

    def _read_beside(self, folder: Folder) -> None:
        try:
            self.config, self.config_files = with_said_beside(folder, self.config, self.tensors)
        except BaseException:
            self.close()
            raise

    @cached_property
    def dtype_of_most(self) -> str | None:
        """The dtype with the most elements among the matrices of floating-point numbers that are no scales,
        by their names; None where there are none."""
        totals: Counter[str] = Counter()
        for name, info in self.tensors.items():
            if info.spec.dtype in FLOATS and len(info.spec.shape) > 1 and "scale" not in name:
                totals[info.spec.dtype] += info.spec.numel
        return totals.most_common(1)[0][0] if totals else None


def _check_types(config: dict[str, Any], folder: Folder) -> None:
    for name, kind in CONFIG_TYPES.items():
        value = config.get(name)
        if value is not None and not isinstance(value, kind):
            raise ValueError(f"{folder / 'config.json'}: {name} is {shown(value)}; expected {kind.__name__}.")


def weights_of(folder: Folder) -> str:
    """The file of all weights, or of which there is an index: of safetensors, else of torch.save. Raises
    CheckpointError."""
    for single in (SINGLE, TORCH_SINGLE):
        if folder.exists(single) or folder.exists(f"{single}.index.json"):
            return single
    hint = instead_of_safetensors(folder)
    raise CheckpointError(f"{shown(folder)}: holds neither {SINGLE} nor {INDEX}.{hint}")
