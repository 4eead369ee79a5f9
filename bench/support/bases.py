"""Writes a checkpoint of each quantized format, and an adapter, with the shapes of two layers of Llama-3.2-1B
and random values: 121.6 M elements. Of gpt-oss, four experts of its 20B model: 99.5 M.

    python -m bench.support.bases FORMAT DIR
    python -m bench.support.bases --list

The second command prints the formats, those that are stored transposed after an empty line. DIR/base is the
checkpoint, DIR/adapter a rank-16 LoRA over every linear layer, or over the experts. Codes are uniform, which
costs the same to decode as those of trained weights.
"""

import argparse
import json
import shutil
from pathlib import Path

from bench.support.base_kinds import (
    FORMATS,
    GPT_OSS,
    HIDDEN,
    INTER,
    KINDS,
    KV,
    LAYERS,
    TRANSPOSED,
    VOCAB,
    Kind,
    below,
)
from bench.support.synthetic import (
    ALPHA,
    RANK,
    Entry,
    bfloat16,
    codes,
    llama_config,
    lora_entries,
    normal,
    write_checkpoint,
    write_shard,
)

EXPERTS, EXPERT_HIDDEN, EXPERT_INTER = 4, 2880, 2880


def linears() -> dict[str, tuple[int, int]]:
    """Modules of the layers → (rows, columns)."""
    shapes = {f"self_attn.{x}_proj": (KV if x in "kv" else HIDDEN, HIDDEN) for x in "qkvo"}
    shapes |= {
        "mlp.gate_proj": (INTER, HIDDEN),
        "mlp.up_proj": (INTER, HIDDEN),
        "mlp.down_proj": (HIDDEN, INTER),
    }
    return {f"model.layers.{i}.{name}": shape for i in range(LAYERS) for name, shape in shapes.items()}


def adapter(directory: Path, entries: list[Entry], **targets: object) -> None:
    directory.mkdir(parents=True)
    write_shard(directory / "adapter_model.safetensors", entries)
    config = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": RANK, "lora_alpha": ALPHA, "bias": "none"}
    (directory / "adapter_config.json").write_text(json.dumps(config | targets))


def of_llama(directory: Path, kind: Kind) -> None:
    embedding = Entry("model.embed_tokens.weight", "BF16", (VOCAB, HIDDEN), bfloat16(normal(0.02)))
    shapes = linears()
    entries = [embedding, *(e for module, shape in shapes.items() for e in kind.stored(module, *shape))]
    config = llama_config(HIDDEN, INTER, LAYERS, VOCAB)
    del config["quantization_config"]
    config[kind.key] = kind.section
    metadata = kind.metadata([entry.name for entry in entries])
    write_checkpoint(directory / "base", entries, config, 1, metadata)
    lora = [entry for module, shape in shapes.items() for entry in lora_entries(module, *shape)]
    adapter(directory / "adapter", lora, target_modules=sorted({name.rpartition(".")[2] for name in shapes}))


def of_gpt_oss(directory: Path) -> None:
    experts = "model.layers.0.mlp.experts"
    shapes = {"gate_up_proj": (EXPERT_HIDDEN, 2 * EXPERT_INTER), "down_proj": (EXPERT_INTER, EXPERT_HIDDEN)}
    entries, lora = [], []
    for (name, (n_inputs, n_outputs)), layer in zip(
        shapes.items(), ("experts.base_layer", "experts"), strict=True
    ):
        groups = (EXPERTS, n_outputs, n_inputs // 32)
        entries.append(Entry(f"{experts}.{name}_blocks", "U8", (*groups, 16), codes))
        entries.append(Entry(f"{experts}.{name}_scales", "U8", groups, below(122, 116)))
        key, small = f"base_model.model.model.layers.0.mlp.{layer}", normal(0.01)
        lora.append(Entry(f"{key}.lora_A.weight", "F32", (EXPERTS * RANK, n_inputs), small))
        lora.append(Entry(f"{key}.lora_B.weight", "F32", (n_outputs, EXPERTS * RANK), small))
    config = {"model_type": "gpt_oss", "architectures": ["GptOssForCausalLM"], "num_local_experts": EXPERTS}
    write_checkpoint(
        directory / "base",
        entries,
        config | {"dtype": "bfloat16", "quantization_config": {"quant_method": "mxfp4"}},
        1,
    )
    adapter(
        directory / "adapter",
        lora,
        target_modules=[],
        target_parameters=[f"mlp.experts.{name}" for name in ("gate_up_proj", "down_proj")],
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--list", action="store_true")
    parser.add_argument("format", choices=FORMATS, nargs="?")
    parser.add_argument("directory", type=Path, nargs="?")
    args = parser.parse_args()
    if args.list:
        print("\n".join([*(name for name in FORMATS if name not in TRANSPOSED), "", *TRANSPOSED]))
        return
    unfinished = args.directory.with_name(args.directory.name + ".unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    if args.format == GPT_OSS:
        of_gpt_oss(unfinished)
    else:
        of_llama(unfinished, KINDS[args.format])
    unfinished.rename(args.directory)


if __name__ == "__main__":
    main()
