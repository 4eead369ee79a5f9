"""Small checkpoints of weights that bitsandbytes quantized."""

import json
from pathlib import Path

import bitsandbytes.functional as bnb
import torch
from safetensors.torch import save_file


def write(path, tensors, **config):
    path = Path(path)
    path.mkdir(exist_ok=True)
    save_file({name: t.contiguous() for name, t in tensors.items()}, path / "model.safetensors")
    (path / "config.json").write_text(json.dumps({"model_type": "llama", "dtype": "bfloat16"} | config))
    return path


def four_bit(weight, **settings):
    """(stored tensors of `w.weight`, what bitsandbytes decodes them to)."""
    packed, state = bnb.quantize_4bit(weight, **settings)
    stored = {f"w.weight.{name}": t for name, t in state.as_dict(packed=True).items()}
    # As bytes in a column: bitsandbytes takes one row, of however few elements, for a transposed weight.
    decoded = bnb.dequantize_4bit(packed.view(torch.uint8).reshape(-1, 1), state).reshape(weight.shape)
    return {"w.weight": packed, **stored}, decoded
