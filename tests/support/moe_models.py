"""Tiny models whose experts transformers stacks in memory, and LoRA on them."""

import json

import torch
import transformers as t
import unmerged

COMMON = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}
COMMON |= {"num_key_value_heads": 2, "max_position_embeddings": 64}
FOUR = {"num_experts": 4, "num_experts_per_tok": 2}
LATENT = {
    "q_lora_rank": 8,
    "kv_lora_rank": 8,
    "qk_rope_head_dim": 4,
    "qk_nope_head_dim": 4,
    "v_head_dim": 8,
    "n_group": 1,
    "topk_group": 1,
}
MODELS = {
    "mixtral": lambda: t.MixtralForCausalLM(t.MixtralConfig(**COMMON, num_local_experts=4)),
    "phimoe": lambda: t.PhimoeForCausalLM(t.PhimoeConfig(**COMMON, num_local_experts=4)),
    "olmoe": lambda: t.OlmoeForCausalLM(t.OlmoeConfig(**COMMON, **FOUR)),
    "qwen2_moe": lambda: t.Qwen2MoeForCausalLM(
        t.Qwen2MoeConfig(**COMMON, **FOUR, moe_intermediate_size=24, shared_expert_intermediate_size=40)
    ),
    "qwen3_moe": lambda: t.Qwen3MoeForCausalLM(
        t.Qwen3MoeConfig(**COMMON, **FOUR, head_dim=8, moe_intermediate_size=24, mlp_only_layers=[1])
    ),
    "deepseek_v3": lambda: t.DeepseekV3ForCausalLM(
        t.DeepseekV3Config(
            **COMMON, **LATENT, moe_intermediate_size=24, n_routed_experts=4, num_experts_per_tok=2,
            n_shared_experts=1, first_k_dense_replace=1,
        )
    ),
    "gpt_oss": lambda: t.GptOssForCausalLM(
        t.GptOssConfig(
            **COMMON, head_dim=8, num_local_experts=4, num_experts_per_tok=2,
            layer_types=["sliding_attention", "full_attention"],
        )
    ),
}  # fmt: skip
VISION = {
    "depth": 1, "hidden_size": 32, "out_hidden_size": 32, "intermediate_size": 48,
    "num_heads": 4, "patch_size": 8,
    "deepstack_visual_indexes": [0], "num_position_embeddings": 16,
}  # fmt: skip


def vision_language(n_inner):
    rope = {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 1e4}
    own = {"head_dim": 8, "moe_intermediate_size": n_inner, "rope_parameters": rope, "pad_token_id": 0}
    config = t.Qwen3VLMoeConfig(text_config=COMMON | FOUR | own, vision_config=VISION)
    return t.Qwen3VLMoeForConditionalGeneration(config)


MODELS |= {"qwen3_vl_moe": lambda: vision_language(24), "qwen3_vl_moe square": lambda: vision_language(16)}
BOTH = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]


def load(path):
    vision = json.loads((path / "config.json").read_text())["model_type"] == "qwen3_vl_moe"
    cls = t.Qwen3VLMoeForConditionalGeneration if vision else t.AutoModelForCausalLM
    model, info = cls.from_pretrained(path, dtype=torch.float32, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    return model.eval()


def train(path, out, **settings):
    return unmerged.train(load(path), out, **{"r": 2, "lora_alpha": 6, "task_type": "CAUSAL_LM"} | settings)


def logits(model):
    with torch.no_grad():
        return model(torch.arange(1, 20)[None]).logits
