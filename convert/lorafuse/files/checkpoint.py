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
        try:
            refuse_unknown_quantization(self.config, path)
        except BaseException:
            self.close()
            raise


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


def refuse_unknown_quantization(config: dict[str, Any], path: Path) -> None:
    """Raises CheckpointError for a config of the directory `path` that names another quantization than
    bitsandbytes."""
    for part in [config, *(value for value in config.values() if isinstance(value, dict))]:
        quantization = part.get("quantization_config")
        method = quantization.get("quant_method") if isinstance(quantization, dict) else None
        # Very old bitsandbytes configs name no method.
        if method not in (None, "bitsandbytes"):
            raise CheckpointError(
                f"{path / 'config.json'}: the checkpoint is quantized with {shown(method)}; bitsandbytes "
                "4-bit and 8-bit and full precision are supported. Dequantize it first, or merge into the "
                "full-precision checkpoint."
            )
