"""Tiny models of kinds whose names in memory and on disk differ."""

import torch
import transformers


def tiny(kind):
    common = {
        "vocab_size": 96,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
    }
    text = common | {"num_key_value_heads": 2, "max_position_embeddings": 64}
    moe = text | {"moe_intermediate_size": 24, "num_experts": 4, "num_experts_per_tok": 2}
    vision = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "image_size": 16,
    }
    vision |= {"patch_size": 8}
    qwen_vision = {
        "depth": 2,
        "hidden_size": 32,
        "out_hidden_size": 32,
        "intermediate_size": 48,
        "num_heads": 4,
        "patch_size": 8,
    }
    rope = {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 10000.0}
    gemma = text | {"head_dim": 8, "layer_types": ["sliding_attention", "full_attention"]}
    t = transformers
    torch.manual_seed(0)
    return {
        "mixtral": lambda: t.MixtralForCausalLM(t.MixtralConfig(**text, num_local_experts=4)),
        "qwen3_moe": lambda: t.Qwen3MoeForCausalLM(t.Qwen3MoeConfig(**moe, head_dim=8)),
        "gpt_neox": lambda: t.GPTNeoXForCausalLM(t.GPTNeoXConfig(**common)),
        "nomic_bert": lambda: t.AutoModelForMaskedLM.from_config(
            t.AutoConfig.for_model("nomic_bert", **common)
        ),
        "vit": lambda: t.ViTForImageClassification(t.ViTConfig(**vision, num_labels=5)),
        "gemma3": lambda: t.Gemma3ForConditionalGeneration(
            t.Gemma3Config(
                text_config=gemma, vision_config=vision, mm_tokens_per_image=1, image_token_index=95
            )
        ),
        "llava": lambda: t.LlavaForConditionalGeneration(
            t.LlavaConfig(
                text_config=t.LlamaConfig(**text),
                vision_config=t.CLIPVisionConfig(**vision),
                image_token_index=95,
            )
        ),
        "qwen2_5_vl": lambda: t.Qwen2_5_VLForConditionalGeneration(
            t.Qwen2_5_VLConfig(text_config=text | {"rope_parameters": rope}, vision_config=qwen_vision)
        ),
    }[kind]()


def answers(model):
    ids = torch.arange(1, 11)[None]
    kind = model.config.model_type
    inputs = (
        {"pixel_values": torch.linspace(-1, 1, 768).reshape(1, 3, 16, 16)}
        if kind == "vit"
        else {"input_ids": ids}
    )
    if kind in ("gemma3", "llava"):
        ids[0, 3 : 3 + (1 if kind == "gemma3" else 4)] = 95
        inputs["pixel_values"] = torch.linspace(-1, 1, 768).reshape(1, 3, 16, 16)
    with torch.no_grad():
        return model.eval()(**inputs).logits
