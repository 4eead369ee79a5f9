"""Which weights hold the values of attention, against gradients: over a single token softmax is constant, so
that queries and keys have none."""

import pytest
import torch
import transformers
from transformers.pytorch_utils import Conv1D

from lorafuse.naming.value_projections import ValueProjections

SMALL = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "pad_token_id": 0,
}
LATENT = {
    "num_key_value_heads": 4,
    "q_lora_rank": 8,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "n_group": 1,
    "topk_group": 1,
    "moe_intermediate_size": 16,
    "first_k_dense_replace": 1,
}
GROUPED = {"num_key_value_heads": 2}
# Class of the config → what it says beside SMALL, and what stands around attention's name.
MODELS = {
    "LlamaConfig": (GROUPED, "self_attn."),
    "Qwen3Config": (GROUPED | {"head_dim": 8}, "self_attn."),
    "Phi3Config": (GROUPED, "self_attn."),
    "DeepseekV3Config": (LATENT, "self_attn."),
    "GPT2Config": ({"n_embd": 32, "n_layer": 1, "n_head": 4}, "attn."),
    "GPTNeoXConfig": ({}, "attention."),
    "BloomConfig": ({"n_layer": 1, "n_head": 4}, "self_attention."),
    "FalconConfig": ({}, "self_attention."),
    "MptConfig": ({"d_model": 32, "n_heads": 4, "n_layers": 1}, "attn."),
    "OPTConfig": ({"ffn_dim": 48, "word_embed_proj_dim": 32}, "self_attn."),
    "BertConfig": ({}, "attention."),
    "DistilBertConfig": ({"dim": 32, "n_layers": 1, "n_heads": 4, "hidden_dim": 48}, "attention."),
    "ModernBertConfig": ({"global_attn_every_n_layers": 1}, "attn."),
}
OUTPUTS = {"o_proj", "c_proj", "dense", "out_proj", "out_lin", "Wo"}  # what comes after the values


@pytest.mark.parametrize("name", MODELS)
def test_what_has_a_gradient_over_one_token(name):
    more, attention = MODELS[name]
    torch.manual_seed(0)
    config = getattr(transformers, name)(**{**SMALL, **more})
    model = transformers.AutoModel.from_config(config, attn_implementation="eager").eval()
    hidden = model(torch.tensor([[5]])).last_hidden_state
    (hidden * torch.randn_like(hidden)).sum().backward()  # of a norm, no sum of squares has a gradient
    values = ValueProjections(config.to_dict())
    found = {}
    for module_name, module in model.named_modules():
        inside, last = attention in module_name, module_name.rpartition(".")[2]
        if isinstance(module, torch.nn.Linear | Conv1D) and inside and last not in OUTPUTS:
            found[module_name] = bool(module.weight.grad.abs().max() > 1e-7)
    assert any(found.values())
    assert {module: values.has(f"{module}.weight") for module in found} == found
    others = {module for module, _ in model.named_modules() if module} - found.keys()
    assert not [module for module in others if values.has(f"{module}.weight")]


@pytest.mark.parametrize(
    ("model_class", "weight", "has"),
    [
        ("Molmo2ForConditionalGeneration", "model.transformer.blocks.0.self_attn.att_proj.weight", True),
        ("RwkvForCausalLM", "rwkv.blocks.0.attention.value.weight", True),
        ("RwkvForCausalLM", "rwkv.blocks.0.feed_forward.value.weight", False),
        ("LlamaForCausalLM", "model.layers.0.self_attn.v_proj.bias", False),
        ("LlamaForCausalLM", "model.layers.0.self_attn.my_v_proj.weight", False),
    ],
)
def test_by_name(model_class, weight, has):
    values = ValueProjections({"architectures": [model_class]})
    assert values.has(weight) == has
