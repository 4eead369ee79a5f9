"""Tiny but real checkpoints, made by transformers and bitsandbytes: what the fixture `base` knows."""

import json

import bitsandbytes.functional as bnb
import torch
from safetensors.torch import load_file, save_file

LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def tiny_llama(*, tied=False, dtype=torch.float32, hidden=64, inter=96, bias=True):
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=96, hidden_size=hidden, intermediate_size=inter, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, tie_word_embeddings=tied, attention_bias=bias,
        mlp_bias=bias, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    return spread(LlamaForCausalLM(config)).to(dtype)


def tiny_gpt2(dtype=torch.float32):
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=96, n_positions=32, n_embd=64, n_layer=2, n_head=4, bos_token_id=1, eos_token_id=2
    )
    return spread(GPT2LMHeadModel(config)).to(dtype)


def spread(model):
    """The model with other random values than its library's own, none of them a constant."""
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn_like(p) * 0.05 + (1.0 if p.dim() == 1 else 0.0))
    return model


def by_transformers(source, target, shard="40KB", **settings):
    """Quantize as users do."""
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    model = AutoModelForCausalLM.from_pretrained(source, quantization_config=BitsAndBytesConfig(**settings))
    model.save_pretrained(target, max_shard_size=shard)


def by_hand(source, target, *, storage=torch.uint8, **settings):
    """Quantize with bitsandbytes alone, for settings that transformers does not offer."""
    tensors = {}
    for name, tensor in load_file(source / "model.safetensors").items():
        if tensor.dim() == 2 and not name.startswith(("model.embed_tokens", "lm_head")):
            packed, state = bnb.quantize_4bit(tensor, quant_storage=storage, **settings)
            tensors[name] = packed
            tensors |= {f"{name}.{k}": v.contiguous() for k, v in state.as_dict(packed=True).items()}
        else:
            tensors[name] = tensor
    target.mkdir()
    save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((source / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    (target / "config.json").write_text(json.dumps(config))


DENSE = {
    "fp32": tiny_llama,
    "fp16": lambda: tiny_llama(dtype=torch.float16),
    "bf16": lambda: tiny_llama(dtype=torch.bfloat16),
    "fp32_tied": lambda: tiny_llama(tied=True),
    "bf16_tied": lambda: tiny_llama(tied=True, dtype=torch.bfloat16),
    "bf16_odd": lambda: tiny_llama(dtype=torch.bfloat16, hidden=40, inter=50, bias=False),
    "gpt2": tiny_gpt2,
    "gpt2_bf16": lambda: tiny_gpt2(torch.bfloat16),
}
NF4 = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": torch.bfloat16}
QUANTIZED = {
    "nf4": ("bf16", by_transformers, NF4),
    "nf4_dq": ("bf16", by_transformers, NF4 | {"bnb_4bit_use_double_quant": True}),
    "nf4_fp16": ("fp16", by_transformers, NF4 | {"bnb_4bit_use_double_quant": True}),
    "nf4_tied": ("bf16_tied", by_transformers, NF4),
    "fp4_dq": (
        "bf16",
        by_transformers,
        NF4 | {"bnb_4bit_quant_type": "fp4", "bnb_4bit_use_double_quant": True},
    ),
    "nf4_bs256": ("bf16", by_hand, {"quant_type": "nf4", "blocksize": 256, "compress_statistics": True}),
    "nf4_bf16storage": ("bf16", by_hand, {"quant_type": "nf4", "storage": torch.bfloat16}),
    "fp4_fp32storage": (
        "fp32",
        by_hand,
        {"quant_type": "fp4", "storage": torch.float32, "compress_statistics": True},
    ),
    "nf4_odd": ("bf16_odd", by_hand, {"quant_type": "nf4", "compress_statistics": True}),
    "int8": ("bf16", by_transformers, {"load_in_8bit": True}),
    "gpt2_nf4": ("gpt2_bf16", by_transformers, NF4),
    "gpt2_int8": ("gpt2_bf16", by_transformers, {"load_in_8bit": True}),
}
