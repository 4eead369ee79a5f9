"""A directory of safetensors files as {name: TensorInfo} with ranged reads, and the checkpoint's config.

Only files that the index names are read: a stale `model.safetensors` beside an index is refused, `.bin` files
are ignored.
"""

from pathlib import Path
from typing import Any

from lorafuse.errors import CheckpointError, StorageError, listed, shown
from lorafuse.files.json_yaml import read_json_dict
from lorafuse.files.names import INDEX, SINGLE
from lorafuse.files.safetensors_file import FormatError
from lorafuse.files.stores import ShardedStore

# Of the fields that are read somewhere.
CONFIG_TYPES = {"model_type": str, "architectures": list, "text_config": dict, "quantization_config": dict}


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
            raise CheckpointError(
                f"{e.filename}: not found; {shown(path)} is no complete checkpoint."
            ) from None
        except (FormatError, ValueError) as e:
            raise CheckpointError(str(e)) from None
        except OSError as e:
            raise StorageError(f"{e.filename}: cannot be read: {e.strerror}.") from None


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
