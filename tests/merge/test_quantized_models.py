"""End to end on each quantized format: what an adapter's model answers, the result answers.

FP8 and gpt-oss are dequantized by transformers itself. What it cannot load without a further package, it
loads dense, with the weights that tests/codecs compares with decoders of its own.
"""

import json
from contextlib import closing

import pytest
import torch
from models import LINEARS, spread
from safetensors.torch import load_file, save_file
from trained import in_peft
from transformers import (
    AutoModelForCausalLM,
    FineGrainedFP8Config,
    GptOssConfig,
    GptOssForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    Mxfp4Config,
)

import lorafuse
from bench.support.base_kinds import KINDS
from bench.support.synthetic import write_checkpoint
from lorafuse.codecs import Arena, open_weights
from lorafuse.files.checkpoint import Checkpoint
from lorafuse.files.local_folder import LocalFolder
from lorafuse.files.tensors import Box

BLOCK = 16
# One kind of each codec and layout; the checks of KINDS' values are those of tests/codecs.
ONE_OF_EACH = (
    "compressed-tensors FP8, rows", "compressed-tensors W4A16, asymmetric", "compressed-tensors NVFP4",
    "ModelOpt NVFP4", "FBGEMM FP8", "MLX, 4 bit", "MLX, mxfp8", "torchao int8", "HQQ, 4 bit",
    "HQQ, 4 bit, axis 0", "AQLM, 2 × 8 bit", "GPTQ, 4 bit", "GPTQ, 4 bit, act-order", "AWQ",
)  # fmt: skip
LORA = {"r": 4, "lora_alpha": 8, "task_type": "CAUSAL_LM"}


def tiny_llama():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64, hidden_size=128, intermediate_size=256, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=4, bos_token_id=1, eos_token_id=2, dtype="float32",
    )  # fmt: skip
    return spread(LlamaForCausalLM(config))


def stored_as(folder, tensors, quantization, key="quantization_config"):
    """The folder of a dense model, with other tensors and a section of how they are quantized."""
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "model.safetensors")
    config = json.loads((folder / "config.json").read_text()) | {key: quantization}
    (folder / "config.json").write_text(json.dumps(config))


def answers(model):
    with torch.inference_mode():
        return model.eval()(torch.arange(2, 34).view(2, 16)).logits.double()


def check(base, model, tmp_path, **targets):
    """Of a model with an adapter that is saved unmerged, and of the merged result, which says nothing of
    quantization."""
    before = answers(model)
    adapted = in_peft(model, "LORA", LORA | targets)
    adapted.save_pretrained(tmp_path / "adapter")
    wanted = answers(adapted)
    lorafuse.convert(base, tmp_path / "adapter", tmp_path / "out", dtype="float32")
    assert "quantization" not in (tmp_path / "out" / "config.json").read_text()
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    distance = (answers(merged) - wanted).norm() / wanted.norm()
    moved = (wanted - before).norm() / wanted.norm()
    assert moved > 0.01 and distance < 1e-3 * moved, (moved, distance)


def test_fp8(tmp_path):
    tiny_llama().save_pretrained(tmp_path / "base")
    tensors = load_file(tmp_path / "base" / "model.safetensors")
    for name in [name for name in tensors if name.split(".")[-2] in LINEARS]:
        blocks = tensors[name].unflatten(0, (-1, BLOCK)).unflatten(2, (-1, BLOCK))
        scales = blocks.abs().amax((1, 3)) / 448
        codes = (blocks / scales[:, None, :, None]).to(torch.float8_e4m3fn)
        tensors |= {name: codes.flatten(2).flatten(0, 1), f"{name}_scale_inv": scales}
    said = {"quant_method": "fp8", "weight_block_size": [BLOCK, BLOCK], "activation_scheme": "dynamic"}
    stored_as(tmp_path / "base", tensors, said)
    loaded = FineGrainedFP8Config(weight_block_size=(BLOCK, BLOCK), dequantize=True)
    model = AutoModelForCausalLM.from_pretrained(
        tmp_path / "base", quantization_config=loaded, dtype=torch.float32
    )
    check(tmp_path / "base", model, tmp_path, target_modules=LINEARS)


def test_gpt_oss(tmp_path):
    """Experts and attention."""
    config = GptOssConfig(
        vocab_size=64, hidden_size=64, intermediate_size=32, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=2, head_dim=16, num_local_experts=4, num_experts_per_tok=2, dtype="float32",
    )  # fmt: skip
    torch.manual_seed(0)
    spread(GptOssForCausalLM(config)).save_pretrained(tmp_path / "base")
    tensors = load_file(tmp_path / "base" / "model.safetensors")
    for name in [name for name in tensors if name.endswith(("gate_up_proj", "down_proj"))]:
        n_experts, n_inputs, n_outputs = tensors.pop(name).shape
        groups = (n_experts, n_outputs, n_inputs // 32)
        tensors[f"{name}_blocks"] = torch.randint(0, 256, (*groups, 16), dtype=torch.uint8)
        tensors[f"{name}_scales"] = torch.randint(119, 123, groups, dtype=torch.uint8)
    stored_as(tmp_path / "base", tensors, {"quant_method": "mxfp4"})
    model = AutoModelForCausalLM.from_pretrained(
        tmp_path / "base", quantization_config=Mxfp4Config(dequantize=True), dtype=torch.float32
    )
    experts = [f"mlp.experts.{name}" for name in ("gate_up_proj", "down_proj")]
    check(tmp_path / "base", model, tmp_path, target_modules=["q_proj"], target_parameters=experts)


@pytest.mark.parametrize("name", ONE_OF_EACH)
def test_others(name, tmp_path):
    kind, model = KINDS[name], tiny_llama()
    model.save_pretrained(tmp_path / "dense")
    tensors = load_file(tmp_path / "dense" / "model.safetensors")
    weights = [weight for weight in tensors if weight.split(".")[-2] in LINEARS]
    entries = [e for w in weights for e in kind.stored(w.removesuffix(".weight"), *tensors.pop(w).shape)]
    metadata = kind.metadata([entry.name for entry in entries])
    config = json.loads((tmp_path / "dense" / "config.json").read_text()) | {kind.key: kind.section}
    write_checkpoint(tmp_path / "base", entries, config, 1, metadata)
    save_file(tensors, tmp_path / "base" / "dense.safetensors")
    (tmp_path / "base" / "model.safetensors").rename(tmp_path / "base" / "codes.safetensors")
    files = {entry.name: "codes.safetensors" for entry in entries} | dict.fromkeys(
        tensors, "dense.safetensors"
    )
    (tmp_path / "base" / "model.safetensors.index.json").write_text(json.dumps({"weight_map": files}))
    model.load_state_dict(decoded(tmp_path / "base", weights), strict=False)
    check(tmp_path / "base", model, tmp_path, target_modules=LINEARS)


def decoded(base, weights):
    with closing(Checkpoint(LocalFolder(base))) as ckpt:
        sources, arena, values = open_weights(ckpt), Arena(torch.device("cpu")), {}
        for weight in weights:
            n_rows, n_cols = sources[weight].spec.shape
            box = Box(range(n_rows), range(n_cols), n_rows, n_cols)
            values[weight] = sources[weight].values(box, arena).view(n_rows, n_cols).clone()
        return values
