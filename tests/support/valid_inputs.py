"""Inputs that merge, small enough to be written thousands of times, as path → bytes below `ckpt` and
`adapter`."""

import shutil
from pathlib import Path

import torch
from build import CONFIG, adapter_tensors, checkpoint_tensors, files_of, write_adapter, write_checkpoint
from models import by_hand
from one_linear import ON_ONE_LINEAR, save_one_linear
from safetensors.torch import load_file, save_file

from bench.support.base_kinds import KINDS
from bench.support.synthetic import Entry, bfloat16, normal
from bench.support.synthetic import write_checkpoint as write_stored

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


def valid_bases(root: Path) -> Files:
    """A checkpoint whose first layer has a weight of each quantized format, and an adapter for some."""
    tensors = checkpoint_tensors()
    layer = "model.layers.0"
    for part in ("self_attn.q", "self_attn.k", "self_attn.v", "self_attn.o", "mlp.down", "mlp.gate"):
        del tensors[f"{layer}.{part}_proj.weight"]
    generator = torch.Generator().manual_seed(3)

    def codes(*shape: int) -> torch.Tensor:
        return torch.randint(0, 120, shape, dtype=torch.uint8, generator=generator)

    f8 = torch.float8_e4m3fn
    tensors |= {
        f"{layer}.self_attn.q_proj.weight": codes(16, 16).view(f8),
        f"{layer}.self_attn.q_proj.weight_scale_inv": torch.rand(2, 2),
        f"{layer}.self_attn.k_proj.weight_packed": codes(16, 8).view(torch.int32),
        f"{layer}.self_attn.k_proj.weight_scale": torch.rand(16, 2).bfloat16(),
        f"{layer}.self_attn.k_proj.weight_shape": torch.tensor([16, 16]),
        f"{layer}.self_attn.k_proj.weight_zero_point": codes(2, 8).view(torch.int32),
        f"{layer}.self_attn.k_proj.weight_g_idx": (torch.arange(16) % 2).int(),
        f"{layer}.self_attn.v_proj.weight_packed": codes(16, 8),
        f"{layer}.self_attn.v_proj.weight_scale": codes(16, 1).view(f8),
        f"{layer}.self_attn.v_proj.weight_global_scale": torch.ones(1),
        f"{layer}.self_attn.o_proj.weight": codes(16, 8),
        f"{layer}.self_attn.o_proj.weight_scale": codes(16, 1).view(f8),
        f"{layer}.self_attn.o_proj.weight_scale_2": torch.ones(()),
        f"{layer}.mlp.down_proj.weight": codes(16, 24).view(torch.int8),
        f"{layer}.mlp.down_proj.weight_scale": torch.rand(16, 1),
        f"{layer}.mlp.down_proj.weight_zero_point": codes(16, 1).view(torch.int8),
        f"{layer}.mlp.down_proj.input_scale": torch.ones(1),
        f"{layer}.mlp.gate_proj.weight": codes(24, 16).view(f8),
        f"{layer}.mlp.gate_proj.weight_scale": torch.rand(24, 1),
        f"{layer}.mlp.experts.gate_proj_blocks": codes(2, 4, 1, 16),
        f"{layer}.mlp.experts.gate_proj_scales": codes(2, 4, 1),
        f"{layer}.mlp.experts.up_proj": codes(2, 4, 6).view(f8),
        f"{layer}.mlp.experts.up_proj_scale": torch.rand(2, 1, 6),
    }
    groups = {"group_0": {"targets": ["Linear"], "weights": {"num_bits": 4, "group_size": 8}}}
    said = {"quant_method": "compressed-tensors", "weight_block_size": [8, 8], "config_groups": groups}
    write_checkpoint(root / "ckpt", tensors, config=CONFIG | {"quantization_config": said})
    write_adapter(root / "adapter")
    return files_of(root)


# Of each codec that reads but one format of a checkpoint, and of each layout that it knows.
KINDS_DAMAGED = (
    "FP8, blocks", "compressed-tensors W4A16, asymmetric", "compressed-tensors W3A16",
    "compressed-tensors NVFP4", "compressed-tensors MXFP8", "ModelOpt NVFP4", "FBGEMM FP8", "MLX, 3 bit",
    "MLX, 4 bit", "MLX, mxfp4", "MLX, mxfp8", "MLX, nvfp4", "torchao int8", "torchao NVFP4", "HQQ, 3 bit",
    "HQQ, 4 bit", "HQQ, 4 bit, axis 0", "AQLM, 2 × 8 bit", "GPTQ, 3 bit", "GPTQ, 4 bit",
    "GPTQ, 4 bit, act-order", "AWQ",
)  # fmt: skip


QUANTIZED = tuple(f"model.layers.0.{part}_proj" for part in ("self_attn.q", "mlp.down"))


def ckpt_of(name: str, path: Path) -> Files:
    """A checkpoint of a kind of bench/support/base_kinds.py: two quantized weights of 128 × 128, and an
    embedding."""
    kind = KINDS[name]
    embedding = Entry("model.embed_tokens.weight", "BF16", (8, 128), bfloat16(normal(0.02)))
    entries = [embedding, *(entry for module in QUANTIZED for entry in kind.stored(module, 128, 128))]
    said = {kind.key: kind.section, "vocab_size": 8, "num_hidden_layers": 1}
    write_stored(path, entries, CONFIG | said, 1, kind.metadata([entry.name for entry in entries]))
    return files_of(path)


def valid_kinds(root: Path) -> dict[str, Files]:
    """Each kind, with an adapter for its quantized weights."""
    dense = {f"{module}.weight": torch.zeros(128, 128) for module in QUANTIZED}
    for name in KINDS_DAMAGED:
        ckpt_of(name, root / name / "ckpt")
        write_adapter(root / name / "adapter", adapter_tensors(dense))
    return {name: files_of(root / name) for name in KINDS_DAMAGED}


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
