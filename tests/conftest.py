"""Tiny but real checkpoints (transformers, bitsandbytes) and adapters (PEFT), made once a session."""

import json
import os

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import bitsandbytes.functional as bnb
import fix_bnb_avx512
import pytest
import torch
from safetensors.torch import load_file, save_file

fix_bnb_avx512.mend()
LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
MARKED_GPU = "needs a CUDA device, and torch sees none here"


def pytest_collection_modifyitems(items):
    if not torch.cuda.is_available():
        for item in items:
            if "gpu" in item.keywords:
                item.add_marker(pytest.mark.skip(reason=MARKED_GPU))


@pytest.fixture(scope="session")
def share_s(request):
    """Seconds that a test marked `soak` goes on for: its share of LORAFUSE_SOAK hours."""
    n_tests = sum("soak" in item.keywords for item in request.session.items)
    return float(os.environ.get("LORAFUSE_SOAK", "0")) * 3600 / n_tests


def tiny_llama(*, tied=False, dtype=torch.float32, hidden=64, inter=96, bias=True):
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=96, hidden_size=hidden, intermediate_size=inter, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, tie_word_embeddings=tied, attention_bias=bias, mlp_bias=bias, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    return _spread(LlamaForCausalLM(config)).to(dtype)


def tiny_gpt2(dtype=torch.float32):
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=96, n_positions=32, n_embd=64, n_layer=2, n_head=4, bos_token_id=1, eos_token_id=2
    )
    return _spread(GPT2LMHeadModel(config)).to(dtype)


def _spread(model):
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


@pytest.fixture(scope="session")
def base(tmp_path_factory):
    """base(kind) → a checkpoint directory, not to be changed."""
    root = tmp_path_factory.mktemp("bases")

    def get(kind):
        path = root / kind
        if not path.exists():
            if kind in DENSE:
                DENSE[kind]().save_pretrained(path)
            else:
                source, quantize, settings = QUANTIZED[kind]
                quantize(get(source), path, **settings)
        return path

    return get


@pytest.fixture
def adapter(base, tmp_path):
    """adapter(kind, …LoraConfig) → an adapter that PEFT wrote for the dense twin of that checkpoint, no
    factor zero."""

    def make(kind, *, name="adapter", model=None, save=None, **settings):
        from peft import LoraConfig, get_peft_model
        from transformers import AutoModelForCausalLM

        dense = QUANTIZED[kind][0] if kind in QUANTIZED else kind
        model = model or AutoModelForCausalLM.from_pretrained(base(dense), dtype=torch.float32)
        torch.manual_seed(1)
        peft = get_peft_model(
            model, LoraConfig(**{"r": 4, "lora_alpha": 8, "task_type": "CAUSAL_LM"} | settings)
        )
        with torch.no_grad():
            for p in peft.parameters():
                if p.requires_grad:
                    p.add_(torch.randn_like(p) * 0.05)
        path = tmp_path / name
        peft.save_pretrained(path, **(save or {}))
        make.model = peft.eval()
        return path

    return make


@pytest.fixture
def in_memory(monkeypatch):
    """in_memory(path) → the URL of a copy of that directory in memory: a second kind of folder."""
    from memory_folder import Memory

    from lorafuse.files.folders import FOLDERS

    memory = Memory()
    monkeypatch.setitem(FOLDERS, "memory", memory.at)
    return memory
