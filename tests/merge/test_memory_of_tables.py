"""Mixtures of experts have tens of thousands of tensors: their names and entries count too."""

import json
import re
import struct
import subprocess
import sys

import pytest
from processes import beyond_torch

HIDDEN, INNER = 7168, 2048
ATTENTION = {
    "q_a_proj": (1536, HIDDEN),
    "q_b_proj": (24576, 1536),
    "kv_a_proj_with_mqa": (576, HIDDEN),
    "kv_b_proj": (32768, 512),
    "o_proj": (HIDDEN, 16384),
}
EXPERT = {"gate_proj": (INNER, HIDDEN), "up_proj": (INNER, HIDDEN), "down_proj": (HIDDEN, INNER)}


def shapes_of(n_layers, n_experts, shrink=1):
    """{module: shape} of a mixture of DeepSeek-V3's kind, each side divided by `shrink`."""
    modules = {"model.embed_tokens": (129280, HIDDEN), "lm_head": (129280, HIDDEN)}
    for layer in range(n_layers):
        of_layer = f"model.layers.{layer}"
        modules |= {f"{of_layer}.self_attn.{name}": shape for name, shape in ATTENTION.items()}
        for expert in range(n_experts):
            modules |= {f"{of_layer}.mlp.experts.{expert}.{name}": shape for name, shape in EXPERT.items()}
    return {name: tuple(max(n // shrink, 1) for n in shape) for name, shape in modules.items()}


def write_sparse(path, shapes, dtype="BF16"):
    """A safetensors file of zeros that takes no space on disk."""
    header, at, itemsize = {}, 0, {"BF16": 2, "F32": 4}[dtype]
    for name, shape in shapes.items():
        nbytes = shape[0] * shape[1] * itemsize
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [at, at + nbytes]}
        at += nbytes
    text = json.dumps(header).encode()
    with open(path, "wb") as f:
        f.write(struct.pack("<Q", len(text)) + text)
        f.truncate(8 + len(text) + at)


def write_mixture(folder, modules, n_shards):
    folder.mkdir()
    names, weight_map = [f"{name}.weight" for name in modules], {}
    for number in range(n_shards):
        file = f"model-{number + 1:05d}-of-{n_shards:05d}.safetensors"
        own = names[number::n_shards]
        write_sparse(folder / file, {name: modules[name.removesuffix(".weight")] for name in own})
        weight_map |= dict.fromkeys(own, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    config = {"model_type": "deepseek_v3", "architectures": ["DeepseekV3ForCausalLM"], "dtype": "bfloat16"}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def write_lora(folder, modules, pattern, rank=2):
    folder.mkdir()
    factors = {}
    for name, (n_out, n_in) in modules.items():
        if re.search(pattern, name):
            factors[f"base_model.model.{name}.lora_A.weight"] = (rank, n_in)
            factors[f"base_model.model.{name}.lora_B.weight"] = (n_out, rank)
    write_sparse(folder / "adapter_model.safetensors", factors, "F32")
    config = {"peft_type": "LORA", "r": rank, "lora_alpha": rank, "target_modules": ["proj"]}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize("pattern", ["self_attn", "experts"])
def test_what_the_refusal_says_is_enough(pattern, tmp_path):
    """The limit that a refusal names is kept by the run that gets it."""
    modules = shapes_of(n_layers=5, n_experts=256, shrink=512)
    ckpt = write_mixture(tmp_path / "ckpt", modules, n_shards=5)
    lora = write_lora(tmp_path / "lora", modules, pattern)
    command = ["convert", "-q", ckpt, lora, tmp_path / "out", "--max-shard-size", "100KB"]
    refusal = subprocess.run(
        [sys.executable, "-m", "lorafuse.cli", *map(str, command), "--memory-limit", "1MB"],
        capture_output=True,
        text=True,
        check=False,
    )
    found = re.search(
        r": (\d+) MB are needed beyond `import torch`, most of it for the tables of so many tensors\.",
        refusal.stderr,
    )
    assert refusal.returncode == 2 and found, refusal.stderr
    limit = int(found[1]) + 1
    beyond = beyond_torch(*command, "--memory-limit", f"{limit}MB")
    assert 0.6 * limit < beyond / 1e6 < limit


def test_the_largest_mixture_fits_the_default_limit(tmp_path):
    """Kimi-K2, with half as many tensors again as DeepSeek-V3, at its real shapes, on sparse files: to plan
    it takes less than 100 MB, and the plan finds room for a worker."""
    modules = shapes_of(n_layers=60, n_experts=384)
    ckpt = write_mixture(tmp_path / "ckpt", modules, n_shards=60)
    lora = write_lora(tmp_path / "lora", modules, "self_attn")
    no_room = 5  # here, for terabytes: a dry run says so when all is planned
    command = ["convert", "--dry-run", "-q", ckpt, lora, tmp_path / "out"]
    beyond = beyond_torch(*command, exit_codes=(0, no_room))
    assert beyond < 100e6, f"{beyond / 1e6:.0f} MB beyond import torch"
