"""The dtype that a model had before it was quantized."""

from collections.abc import Mapping
from typing import Any

from lorafuse.files.checkpoint import Checkpoint
from lorafuse.files.tensors import FLOATS, SAFETENSORS_NAMES


def model_dtype(config: Mapping[str, Any]) -> str | None:
    """Returns what config.json says, at its top or in text_config; None where it says nothing."""
    text = config.get("text_config")
    for part in (config, text if isinstance(text, dict) else {}):
        name = SAFETENSORS_NAMES.get(str(part.get("dtype") or part.get("torch_dtype")))
        if name in FLOATS:
            return name
    return None


def out_dtype(ckpt: Checkpoint, default: str = "BF16") -> str:
    """Returns what config.json says, else the dtype of most dense weights, else `default`."""
    return model_dtype(ckpt.config) or ckpt.dtype_of_most or default
