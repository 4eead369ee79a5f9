"""Small inputs written by hand: a dense checkpoint with Llama's names, and a LoRA adapter for it.

Nothing here uses lorafuse, so that a test of lorafuse has something independent to compare with.
"""

import json
import re
import struct
from pathlib import Path

import torch
from safetensors.torch import save_file

CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_attention_heads": 2,
    "num_hidden_layers": 2,
    "num_key_value_heads": 2,
    "vocab_size": 32,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
}
ADAPTER_CONFIG = {
    "peft_type": "LORA",
    "base_model_name_or_path": "somebody/something",
    "r": 4,
    "lora_alpha": 8,
    "target_modules": ["q_proj", "down_proj"],
    "bias": "none",
    "task_type": "CAUSAL_LM",
}
RANK = 4


def checkpoint_tensors(
    dtype: torch.dtype = torch.bfloat16, n_layers: int = 2, hidden: int = 16
) -> dict[str, torch.Tensor]:
    """A Llama's tensors with random values."""
    generator = torch.Generator().manual_seed(1)
    vocab, wide = 2 * hidden, hidden + hidden // 2
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (vocab, hidden)}
    for i in range(n_layers):
        layer = f"model.layers.{i}"
        shapes |= {f"{layer}.self_attn.{p}_proj.weight": (hidden, hidden) for p in "qkvo"}
        shapes |= {f"{layer}.mlp.{p}_proj.weight": (wide, hidden) for p in ("gate", "up")}
        shapes[f"{layer}.mlp.down_proj.weight"] = (hidden, wide)
        shapes |= {f"{layer}.{n}.weight": (hidden,) for n in ("input_layernorm", "post_attention_layernorm")}
    shapes |= {"model.norm.weight": (hidden,), "lm_head.weight": (vocab, hidden)}
    return {name: torch.randn(shape, generator=generator).to(dtype) for name, shape in shapes.items()}


def adapter_tensors(checkpoint: dict[str, torch.Tensor], scale: float = 0.1) -> dict[str, torch.Tensor]:
    """lora_A and lora_B for every q_proj and down_proj of the checkpoint, with PEFT's names."""
    generator = torch.Generator().manual_seed(2)
    tensors = {}
    for name, weight in checkpoint.items():
        if "q_proj" in name or "down_proj" in name:
            module = f"base_model.model.{name.removesuffix('.weight')}"
            tensors[f"{module}.lora_A.weight"] = (
                torch.randn(RANK, weight.shape[1], generator=generator) * scale
            )
            tensors[f"{module}.lora_B.weight"] = (
                torch.randn(weight.shape[0], RANK, generator=generator) * scale
            )
    return tensors


def write_json(path: Path, value: object) -> None:
    path.write_text(json.dumps(value), encoding="utf-8")


def write_checkpoint(
    path: Path,
    tensors: dict[str, torch.Tensor] | None = None,
    *,
    n_shards: int = 1,
    config: object = CONFIG,
    metadata: dict[str, str] | None = None,
) -> Path:
    """A checkpoint directory: one file, with `metadata` in its header, or `n_shards` files and their
    index."""
    tensors = checkpoint_tensors() if tensors is None else tensors
    path.mkdir(parents=True)
    write_json(path / "config.json", config)
    if n_shards == 1:
        save_file(tensors, path / "model.safetensors", metadata or {"format": "pt"})
        return path
    weight_map = {name: shard_name(i % n_shards + 1, n_shards) for i, name in enumerate(tensors)}
    for file in sorted(set(weight_map.values())):
        save_file(
            {name: t for name, t in tensors.items() if weight_map[name] == file},
            path / file,
            {"format": "pt"},
        )
    total = sum(tensor.nbytes for tensor in tensors.values())
    write_json(
        path / "model.safetensors.index.json", {"metadata": {"total_size": total}, "weight_map": weight_map}
    )
    return path


def shard_name(number: int, of: int) -> str:
    return f"model-{number:05d}-of-{of:05d}.safetensors"


CARD_WITHOUT_QUANTIZATION = """
The following `bitsandbytes` quantization config was used during training:
- load_in_8bit: False
- load_in_4bit: False
"""


def write_told_adapter(path: Path, tensors: dict[str, torch.Tensor] | None = None) -> Path:
    """An adapter beside which stands that training did not quantize the base."""
    write_adapter(path, tensors)
    (path / "README.md").write_text(CARD_WITHOUT_QUANTIZATION)
    return path


def write_adapter(path: Path, tensors: dict[str, torch.Tensor] | None = None, **config: object) -> Path:
    """An adapter directory; keyword arguments change its config."""
    path.mkdir(parents=True)
    write_json(path / "adapter_config.json", ADAPTER_CONFIG | config)
    save_file(
        adapter_tensors(checkpoint_tensors()) if tensors is None else tensors,
        path / "adapter_model.safetensors",
    )
    return path


def raw_file(header: object, data: bytes = b"", *, length: int | None = None) -> bytes:
    """A safetensors file from a header (bytes as they are, anything else as JSON), whatever it says; `length`
    lies about it."""
    text = header if isinstance(header, bytes) else json.dumps(header, separators=(",", ":")).encode("utf-8")
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def files_of(path: Path) -> dict[str, bytes]:
    """Every file below a directory with its bytes."""
    return {str(p.relative_to(path)): p.read_bytes() for p in sorted(path.rglob("*")) if p.is_file()}


def refusal(caught: object) -> str:
    """What a refusal says, up to the base that the adapter's config names; test_right_base.py looks at
    that."""
    return re.sub(r" The adapter's config names .* as its base\.$", "", str(getattr(caught, "value", caught)))


def rewrite(path: Path, **fields: object) -> None:
    """Changes fields of an adapter's config."""
    settings = json.loads((path / "adapter_config.json").read_text()) | fields
    (path / "adapter_config.json").write_text(json.dumps(settings))


def write_by_layers(path: Path, n_shards: int = 6, n_layers: int = 8, hidden: int = 16) -> Path:
    """A checkpoint whose files hold runs of its weights in the order of the model, the head in the last."""
    tensors = checkpoint_tensors(n_layers=n_layers, hidden=hidden)
    names, per_file = list(tensors), -(-len(tensors) // n_shards)
    files = {name: shard_name(n // per_file + 1, n_shards) for n, name in enumerate(names)}
    path.mkdir()
    write_json(path / "config.json", CONFIG)
    for file in sorted(set(files.values())):
        save_file({n: t for n, t in tensors.items() if files[n] == file}, path / file, {"format": "pt"})
    write_json(path / "model.safetensors.index.json", {"metadata": {}, "weight_map": files})
    return path
