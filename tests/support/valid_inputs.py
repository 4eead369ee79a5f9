"""Inputs that merge, small enough to be written thousands of times, as path → bytes below `ckpt` and
`adapter`."""

import shutil
from pathlib import Path

import torch
from build import adapter_tensors, checkpoint_tensors, files_of, write_adapter, write_checkpoint
from models import by_hand
from one_linear import ON_ONE_LINEAR, save_one_linear
from safetensors.torch import load_file, save_file

Files = dict[str, bytes]


def valid_inputs(root: Path) -> dict[str, Files]:
    """By kind: a dense checkpoint whole and in two shards, NF4, int8, and an adapter that torch.save
    wrote."""
    for kind in ("whole", "shards", "nf4", "int8", "bin"):
        write_adapter(root / kind / "adapter")
    whole = write_checkpoint(root / "whole/ckpt")
    write_checkpoint(root / "shards/ckpt", n_shards=2)
    by_hand(whole, root / "nf4/ckpt", quant_type="nf4", compress_statistics=True)
    _int8(whole, root / "int8/ckpt")
    shutil.copytree(whole, root / "bin/ckpt")
    (root / "bin/adapter/adapter_model.safetensors").unlink()
    torch.save(adapter_tensors(checkpoint_tensors()), root / "bin/adapter/adapter_model.bin")
    return {path.name: files_of(path) for path in sorted(root.iterdir())}


def _int8(source: Path, target: Path) -> None:
    """As bitsandbytes stores it, by its formula."""
    tensors = load_file(source / "model.safetensors")
    for name in [name for name in tensors if name.endswith("_proj.weight")]:
        weight = tensors[name].float()
        scale = weight.abs().amax(1)
        tensors[name] = (weight * 127 / scale[:, None]).round().to(torch.int8)
        tensors |= {
            name.replace("weight", "SCB"): scale,
            name.replace("weight", "weight_format"): torch.tensor(0, dtype=torch.uint8),
        }
    shutil.copytree(source, target)
    save_file(tensors, target / "model.safetensors", {"format": "pt"})


def write_files(root: Path, files: Files) -> None:
    for path, data in files.items():
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_bytes(data)


def valid_types(root: Path) -> dict[str, Files]:
    """An adapter of each PEFT type and variant of one_linear.py, and its checkpoint."""
    for case in ON_ONE_LINEAR:
        (root / case).mkdir()
        save_one_linear(case, 128, 128, root / case)
    return {
        case: {p: data for p, data in files_of(root / case).items() if not p.endswith(".md")}
        for case in ON_ONE_LINEAR
    }
