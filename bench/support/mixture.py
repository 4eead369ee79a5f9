"""Writes a mixture of experts of many small NF4 weights, and adapters for it: for what a plan costs for each
stored tensor.

    python -m bench.support.mixture TENSORS DIR

DIR/base has about so many stored tensors, six for each weight, in the names of Qwen3-MoE; DIR/attention is a
rank-2 LoRA over the attention, DIR/experts one over every expert. What a plan costs does not depend on the
shapes, so they are as small as double quantization allows, and all weights of a shape hold the same bytes.
"""

import argparse
import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from bench.support.synthetic import ALPHA, W_STD, Entry, bfloat16, llama_config, nf4_entries, normal

HIDDEN, INNER, VOCAB, RANK = 64, 16, 256, 2
EXPERTS, STORED = 128, 6  # of a layer; of a weight
SHARD_TENSORS = 4000
ATTENTION = {f"self_attn.{x}_proj": (HIDDEN, HIDDEN) for x in "qkvo"}
EXPERT = {"gate_proj": (INNER, HIDDEN), "up_proj": (INNER, HIDDEN), "down_proj": (HIDDEN, INNER)}
Stored = tuple[str, str, tuple[int, ...], bytes]  # name, dtype, shape, data


def linears(n_weights: int) -> Iterator[tuple[str, tuple[int, int]]]:
    """So many quantized modules, layer after layer."""
    per_layer = len(ATTENTION) + EXPERTS * len(EXPERT)
    for number in range(n_weights):
        layer, i = divmod(number, per_layer)
        if i < len(ATTENTION):
            name, shape = list(ATTENTION.items())[i]
        else:
            expert, part = divmod(i - len(ATTENTION), len(EXPERT))
            projection, shape = list(EXPERT.items())[part]
            name = f"mlp.experts.{expert}.{projection}"
        yield f"model.layers.{layer}.{name}", shape


def drawn(entry: Entry) -> Stored:
    return entry.name, entry.dtype, entry.shape, b"".join(entry.pieces())


def stored(modules: dict[str, tuple[int, int]]) -> Iterator[Stored]:
    """The base's tensors in the order of the files."""
    embedding = Entry("model.embed_tokens.weight", "BF16", (VOCAB, HIDDEN), bfloat16(normal(W_STD)))
    yield drawn(embedding)
    templates = {
        shape: [drawn(e) for e in nf4_entries("", *shape)] for shape in dict.fromkeys(modules.values())
    }
    for module, shape in modules.items():
        for suffix, *rest in templates[shape]:
            yield f"{module}.weight{suffix}", *rest


def factors(modules: dict[str, tuple[int, int]]) -> Iterator[Stored]:
    """A LoRA over the modules."""
    rng = np.random.default_rng(0)
    for module, (rows, cols) in modules.items():
        for letter, shape in (("A", (RANK, cols)), ("B", (rows, RANK))):
            values = rng.normal(0, 0.01, shape).astype(np.float32)
            yield f"base_model.model.{module}.lora_{letter}.weight", "F32", shape, values.tobytes()


def write_file(path: Path, tensors: list[Stored]) -> None:
    header, at = {}, 0
    for name, dtype, shape, data in tensors:
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [at, at + len(data)]}
        at += len(data)
    text = json.dumps(header).encode()
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.writelines(data for *_, data in tensors)


def write_base(directory: Path, modules: dict[str, tuple[int, int]]) -> None:
    directory.mkdir(parents=True)
    tensors, weight_map = list(stored(modules)), {}
    for number, start in enumerate(range(0, len(tensors), SHARD_TENSORS), 1):
        file, own = f"model-{number:05}.safetensors", tensors[start : start + SHARD_TENSORS]
        write_file(directory / file, own)
        weight_map |= {name: file for name, *_ in own}
    (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    n_layers = 1 + max(int(module.split(".")[2]) for module in modules)
    config = llama_config(HIDDEN, INNER, n_layers, VOCAB)
    names = {"architectures": ["Qwen3MoeForCausalLM"], "model_type": "qwen3_moe", "num_experts": EXPERTS}
    (directory / "config.json").write_text(json.dumps(config | names))


def write_adapter(directory: Path, modules: dict[str, tuple[int, int]]) -> None:
    directory.mkdir(parents=True)
    write_file(directory / "adapter_model.safetensors", list(factors(modules)))
    targets = sorted({module.rpartition(".")[2] for module in modules})
    config = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": RANK, "lora_alpha": ALPHA, "bias": "none"}
    (directory / "adapter_config.json").write_text(json.dumps(config | {"target_modules": targets}))


def write(directory: Path, n_tensors: int) -> None:
    """A base of about so many stored tensors, and its adapters."""
    modules = dict(linears(n_tensors // STORED))
    write_base(directory / "base", modules)
    for kind, part in {"attention": ".self_attn.", "experts": ".experts."}.items():
        write_adapter(directory / kind, {m: shape for m, shape in modules.items() if part in m})


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("tensors", type=int)
    parser.add_argument("directory", type=Path)
    args = parser.parse_args()
    unfinished = args.directory.with_name(args.directory.name + ".unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    write(unfinished, args.tensors)
    unfinished.rename(args.directory)


if __name__ == "__main__":
    main()
