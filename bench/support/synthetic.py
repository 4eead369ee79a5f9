"""Writes checkpoints and adapters of real shapes with random values, so that the benchmarks need no download.

A Llama of 1.2 B parameters in double-quantized NF4:
    python -m bench.support.synthetic llama DIR [--layers 16] [--shards 1]
One NF4 matrix of 16384 x 53248 beside an embedding:
    python -m bench.support.synthetic wide DIR

DIR/base is the checkpoint, DIR/adapter a rank-16 LoRA over every linear layer, DIR/adapter-qv one on q_proj
and v_proj (llama alone). Every tensor is written in pieces of a few MB: nothing here ever holds one. The
storage scheme, and the two tables in it, are those of bitsandbytes; transformers loads the result. The codes
are drawn uniformly (a trained weight has more of the middle ones, which costs the same to decode), scaled so
that a weight's standard deviation is 0.02 and the update is 3 % of it.
"""

import argparse
import json
import math
import os
import shutil
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")
import bitsandbytes.functional as bnb
import numpy as np

PIECE = 1 << 20  # elements a piece
ITEM_NBYTES = {
    "I64": 8, "F32": 4, "I32": 4, "U32": 4, "BF16": 2, "F16": 2, "I16": 2, "U8": 1, "I8": 1, "F8_E4M3": 1,
}  # fmt: skip
BLOCK, NESTED_BLOCK = 64, 256
RANK, ALPHA = 16, 32
W_STD, DELTA_REL = 0.02, 0.03

Draw = Callable[
    [np.random.Generator, int], np.ndarray
]  # (generator, how many) -> that many values, as stored


@dataclass(frozen=True)
class Entry:
    """One stored tensor, and how to draw its values."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    draw: Draw

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * ITEM_NBYTES[self.dtype]

    def pieces(self) -> Iterator[bytes]:
        """The values follow from the name alone: neither the sharding nor the other tensors change them."""
        generator = np.random.default_rng(zlib.crc32(self.name.encode()))
        total = math.prod(self.shape)
        for start in range(0, total, PIECE):
            yield self.draw(generator, min(PIECE, total - start)).tobytes()


def exactly(values: np.ndarray) -> Draw:
    """A tensor that is not random; it fits in one piece."""
    return lambda _, n: values


def codes(generator: np.random.Generator, n: int) -> np.ndarray:
    return generator.integers(0, 256, n, dtype=np.uint8)


def normal(std: float) -> Draw:
    return lambda generator, n: generator.standard_normal(n, dtype=np.float32) * np.float32(std)


def uniform(low: float, high: float) -> Draw:
    return lambda generator, n: generator.uniform(low, high, n).astype(np.float32)


def bfloat16(draw: Draw) -> Draw:
    """The upper halves of the float32 values: truncated, which is good enough for random ones."""
    return lambda generator, n: (draw(generator, n).view(np.uint32) >> 16).astype(np.uint16)


def nf4_entries(name: str, rows: int, cols: int) -> list[Entry]:
    """The six stored tensors of one double-quantized NF4 weight."""
    quant_map = bnb.get_4bit_type("nf4", device="cpu").numpy()
    nested_map = bnb.create_dynamic_map().numpy()
    n_blocks = -(-rows * cols // BLOCK)
    n_nested = -(-n_blocks // NESTED_BLOCK)
    offset = W_STD / float(np.sqrt(np.mean(quant_map**2)))
    state = {
        "quant_type": "nf4",
        "blocksize": BLOCK,
        "dtype": "bfloat16",
        "shape": [rows, cols],
        "nested_blocksize": NESTED_BLOCK,
        "nested_dtype": "float32",
        "nested_offset": offset,
    }
    packed_state = np.frombuffer(json.dumps(state).encode(), dtype=np.uint8)
    return [
        Entry(name, "U8", (-(-rows * cols // 2), 1), codes),
        Entry(f"{name}.absmax", "U8", (n_blocks,), codes),
        Entry(f"{name}.nested_absmax", "F32", (n_nested,), uniform(0.2 * offset, 0.4 * offset)),
        Entry(f"{name}.nested_quant_map", "F32", (256,), exactly(nested_map)),
        Entry(f"{name}.quant_map", "F32", (16,), exactly(quant_map)),
        Entry(f"{name}.quant_state.bitsandbytes__nf4", "U8", packed_state.shape, exactly(packed_state)),
    ]


def lora_entries(module: str, rows: int, cols: int) -> list[Entry]:
    """A is drawn as PEFT initializes it, B so that the update has the size asked for."""
    bound = 1 / math.sqrt(cols)
    std_A = bound / math.sqrt(3)
    std_B = DELTA_REL * W_STD / (ALPHA / RANK * math.sqrt(RANK) * std_A)
    prefix = f"base_model.model.{module}"
    return [
        Entry(f"{prefix}.lora_A.weight", "F32", (RANK, cols), uniform(-bound, bound)),
        Entry(f"{prefix}.lora_B.weight", "F32", (rows, RANK), normal(std_B)),
    ]


def write_shard(path: Path, entries: list[Entry], metadata: dict[str, str] | None = None) -> None:
    """A safetensors file, streamed: the header needs sizes only."""
    header: dict[str, object] = {"__metadata__": metadata or {"format": "pt"}}
    end = 0
    for entry in entries:
        begin, end = end, end + entry.nbytes
        header[entry.name] = {"dtype": entry.dtype, "shape": entry.shape, "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for entry in entries:
            file.writelines(entry.pieces())


def write_checkpoint(
    directory: Path,
    entries: list[Entry],
    config: dict[str, object],
    n_shards: int,
    metadata: dict[str, str] | None = None,
) -> None:
    """One file, or at most n_shards files of about the same size and their index. `metadata`: of the one
    file's header."""
    directory.mkdir(parents=True)
    total = sum(entry.nbytes for entry in entries)
    shards: list[list[Entry]] = [[] for _ in range(n_shards)]
    seen = 0
    for entry in entries:
        shards[seen * n_shards // total].append(entry)
        seen += entry.nbytes
    shards = [shard for shard in shards if shard]
    if len(shards) == 1:
        write_shard(directory / "model.safetensors", entries, metadata)
    else:
        weight_map = {}
        for number, shard in enumerate(shards, 1):
            file = f"model-{number:05}-of-{len(shards):05}.safetensors"
            write_shard(directory / file, shard)
            weight_map |= {entry.name: file for entry in shard}
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (directory / "model.safetensors.index.json").write_text(json.dumps(index, indent=2))
    (directory / "config.json").write_text(json.dumps(config, indent=2))


def write_adapter(directory: Path, linears: dict[str, tuple[int, int]]) -> None:
    directory.mkdir(parents=True)
    entries = [
        entry for module, (rows, cols) in linears.items() for entry in lora_entries(module, rows, cols)
    ]
    write_shard(directory / "adapter_model.safetensors", entries)
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "r": RANK,
        "lora_alpha": ALPHA,
        "lora_dropout": 0.0,
        "bias": "none",
        "target_modules": sorted({module.rpartition(".")[2] for module in linears}),
        "inference_mode": True,
    }
    (directory / "adapter_config.json").write_text(json.dumps(config, indent=2, sort_keys=True))


def llama_config(hidden: int, inter: int, layers: int, vocab: int) -> dict[str, object]:
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": hidden,
        "intermediate_size": inter,
        "num_hidden_layers": layers,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": hidden // 32,
        "vocab_size": vocab,
        "rope_theta": 500000.0,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": True,
        "torch_dtype": "bfloat16",
        "quantization_config": {
            "quant_method": "bitsandbytes",
            "load_in_4bit": True,
            "load_in_8bit": False,
            "bnb_4bit_quant_type": "nf4",
            "bnb_4bit_use_double_quant": True,
            "bnb_4bit_compute_dtype": "bfloat16",
            "bnb_4bit_quant_storage": "uint8",
        },
    }


def llama(directory: Path, layers: int, shards: int) -> None:
    """The shapes of Llama-3.2-1B; the embedding and the norms are bfloat16, the head is tied."""
    hidden, inter, kv, vocab = 2048, 8192, 512, 128256
    embedding = bfloat16(normal(W_STD))
    norm = bfloat16(uniform(0.5, 1.5))
    entries = [Entry("model.embed_tokens.weight", "BF16", (vocab, hidden), embedding)]
    linears: dict[str, tuple[int, int]] = {}
    for layer in range(layers):
        prefix = f"model.layers.{layer}"
        of_layer = {
            **{f"{prefix}.self_attn.{x}_proj": (kv if x in "kv" else hidden, hidden) for x in "qkvo"},
            f"{prefix}.mlp.gate_proj": (inter, hidden),
            f"{prefix}.mlp.up_proj": (inter, hidden),
            f"{prefix}.mlp.down_proj": (hidden, inter),
        }
        for module, (rows, cols) in of_layer.items():
            entries += nf4_entries(f"{module}.weight", rows, cols)
        for part in ("input_layernorm", "post_attention_layernorm"):
            entries.append(Entry(f"{prefix}.{part}.weight", "BF16", (hidden,), norm))
        linears |= of_layer
    entries.append(Entry("model.norm.weight", "BF16", (hidden,), norm))
    write_checkpoint(directory / "base", entries, llama_config(hidden, inter, layers, vocab), shards)
    write_adapter(directory / "adapter", linears)
    write_adapter(
        directory / "adapter-qv",
        {name: shape for name, shape in linears.items() if name.endswith(("q_proj", "v_proj"))},
    )


def wide(directory: Path, shards: int) -> None:
    """A feed-forward matrix of Llama-3.1-405B and the embedding of an 8B: made for their sizes, not to be
    loaded."""
    rows, cols, vocab, dim = 16384, 53248, 128256, 4096
    module = "model.layers.0.mlp.down_proj"
    entries = [
        Entry("model.embed_tokens.weight", "BF16", (vocab, dim), bfloat16(normal(W_STD))),
        *nf4_entries(f"{module}.weight", rows, cols),
    ]
    write_checkpoint(directory / "base", entries, llama_config(rows, cols, 1, vocab), shards)
    write_adapter(directory / "adapter", {module: (rows, cols)})


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("shape", choices=("llama", "wide"))
    parser.add_argument("directory", type=Path)
    parser.add_argument("--layers", type=int, default=16)
    parser.add_argument("--shards", type=int, default=1)
    args = parser.parse_args()
    unfinished = args.directory.with_name(args.directory.name + ".unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    if args.shape == "llama":
        llama(unfinished, args.layers, args.shards)
    else:
        wide(unfinished, args.shards)
    unfinished.rename(args.directory)


if __name__ == "__main__":
    main()
