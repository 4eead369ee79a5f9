"""`--format mixed` of gpt-oss whose adapter touches one of the two stacks of experts of one layer:
transformers loads the result as the dense one."""

import json

import pytest
import torch
import transformers
from build import write_adapter
from quantized_base import write
from safetensors.torch import load_file

import lorafuse

SIZES = {"hidden_size": 64, "intermediate_size": 32, "num_attention_heads": 4, "num_key_value_heads": 2}
SIZES |= {"head_dim": 16, "num_local_experts": 2, "num_experts_per_tok": 1, "num_hidden_layers": 2}
SECTION = {"quant_method": "mxfp4", "modules_to_not_convert": ["model.layers.*.self_attn", "lm_head"]}
SECTION["modules_to_not_convert"] += ["model.layers.*.mlp.router", "model.embed_tokens"]


def packed(name, tensor):
    """A stack (experts, in, out) as random MXFP4."""
    if not name.endswith(("experts.gate_up_proj", "experts.down_proj")):
        return {name: tensor}
    n_experts, n_in, n_out = tensor.shape
    shape = (n_experts, n_out, n_in // 32)
    blocks = torch.randint(0, 256, (*shape, 16), dtype=torch.uint8)
    return {f"{name}_blocks": blocks, f"{name}_scales": torch.randint(116, 122, shape, dtype=torch.uint8)}


@pytest.fixture
def gpt_oss(tmp_path):
    torch.manual_seed(0)
    config = transformers.GptOssConfig(
        vocab_size=64, pad_token_id=0, bos_token_id=0, eos_token_id=1, dtype="bfloat16", **SIZES
    )
    model = transformers.GptOssForCausalLM(config).bfloat16()
    stored = {}
    for name, tensor in model.state_dict().items():
        stored |= packed(name, tensor.contiguous())
    return write(tmp_path / "ckpt", stored, SECTION, **config.to_dict())


def loaded(path):
    model, info = transformers.AutoModelForCausalLM.from_pretrained(
        path, dtype=torch.bfloat16, output_loading_info=True
    )
    assert not any(info.values()), info
    return model


def test_transformers_loads_it(gpt_oss, tmp_path):
    key = "base_model.model.model.layers.0.mlp.experts"
    tensors = {f"{key}.lora_A.weight": torch.randn(4, 32), f"{key}.lora_B.weight": torch.randn(64, 4) * 0.1}
    said = {"target_modules": [], "target_parameters": ["experts.down_proj"]}
    lora = write_adapter(tmp_path / "lora", tensors, r=2, lora_alpha=2, **said)
    for form in ("dense", "mixed"):
        lorafuse.convert(gpt_oss, lora, tmp_path / form, format=form)
    found = load_file(tmp_path / "mixed/model.safetensors")
    assert "model.layers.1.mlp.experts.down_proj_blocks" in found
    assert "model.layers.0.mlp.experts.gate_up_proj" in found
    section = json.loads((tmp_path / "mixed/config.json").read_text())["quantization_config"]
    assert section["modules_to_not_convert"][-1] == "model.layers.0.mlp.experts"
    dense, mixed = (dict(loaded(tmp_path / form).named_parameters()) for form in ("dense", "mixed"))
    assert dense.keys() == mixed.keys() and all(torch.equal(dense[name], mixed[name]) for name in dense)
