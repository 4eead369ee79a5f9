"""Fields of config.json for programs that do not know transformers 5's names."""

import copy
from typing import Any

import pytest
import transformers

from lorafuse.side_files.older_readers import with_older_fields

PLAIN = {"rope_theta": 500000.0, "rope_type": "default"}
LLAMA3 = {
    "rope_theta": 500000.0,
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
HALF = {"rope_theta": 300.0, "rope_type": "default", "partial_rotary_factor": 0.5}
LOCAL = {"rope_theta": 300.0, "rope_type": "default"}
FULL = {"rope_theta": 3e5, "rope_type": "linear", "factor": 8.0}
LONG = {
    "rope_theta": 1e4,
    "rope_type": "longrope",
    "short_factor": [1.0] * 48,
    "long_factor": [2.0] * 48,
    "original_max_position_embeddings": 2048,
    "partial_rotary_factor": 1.0,
}

CASES: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "plain": ("llama", PLAIN, {"rope_theta": 500000.0}),
    "scaled": (
        "llama",
        LLAMA3,
        {"rope_theta": 500000.0, "rope_scaling": {k: v for k, v in LLAMA3.items() if k != "rope_theta"}},
    ),
    "partial": ("phi", HALF, {"rope_theta": 300.0, "partial_rotary_factor": 0.5}),
    "neox": (
        "gpt_neox",
        HALF,
        {"rope_theta": 300.0, "partial_rotary_factor": 0.5, "rotary_emb_base": 300.0, "rotary_pct": 0.5},
    ),
    "gemma3": (
        "gemma3_text",
        {"full_attention": FULL, "sliding_attention": LOCAL},
        {
            "rope_theta": 3e5,
            "rope_scaling": {"rope_type": "linear", "factor": 8.0},
            "rope_local_base_freq": 300.0,
        },
    ),
    "modernbert": (
        "modernbert",
        {"full_attention": PLAIN, "sliding_attention": LOCAL},
        {"global_rope_theta": 500000.0, "local_rope_theta": 300.0},
    ),
    "olmo3": ("olmo3", {"full_attention": PLAIN, "sliding_attention": PLAIN}, {"rope_theta": 500000.0}),
    "sections of an image": (
        "qwen2_vl_text",
        PLAIN | {"mrope_section": [16, 24, 24]},
        {"rope_theta": 500000.0, "rope_scaling": {"rope_type": "default", "mrope_section": [16, 24, 24]}},
    ),
    "phi3": (
        "phi3",
        LONG,
        {
            "rope_theta": 1e4,
            "partial_rotary_factor": 1.0,
            "original_max_position_embeddings": 2048,
            "rope_scaling": {"type": "longrope", "short_factor": [1.0] * 48, "long_factor": [2.0] * 48},
        },
    ),
    "pixtral": ("pixtral", {"rope_theta": 12000.0, "rope_type": "axial"}, {"rope_theta": 12000.0}),
}


@pytest.mark.parametrize("case", CASES)
def test_rotary_fields_of_transformers_4_stand_beside_rope_parameters(case: str) -> None:
    model_type, rope, older = CASES[case]
    config = {"model_type": model_type, "rope_parameters": rope}
    assert with_older_fields(config) == config | older


@pytest.mark.parametrize("case", CASES)
def test_transformers_5_reads_the_same_from_both(case: str) -> None:
    model_type, rope, _ = CASES[case]
    kind = transformers.CONFIG_MAPPING[model_type]
    config = kind(rope_parameters=copy.deepcopy(rope)).to_dict()
    again = kind.from_dict(copy.deepcopy(with_older_fields(copy.deepcopy(config)))).to_dict()
    again["rope_parameters"].pop("type", None)  # Phi-3's other word for rope_type, which transformers 5 keeps
    assert {name: again.get(name) for name in config} == config


def test_sections_get_their_own_fields() -> None:
    section = {"model_type": "qwen3", "rope_parameters": PLAIN, "dtype": "float16"}
    made = with_older_fields({"dtype": "bfloat16", "text_config": section})
    older = {"rope_theta": 500000.0, "torch_dtype": "float16"}
    assert made == {"dtype": "bfloat16", "torch_dtype": "bfloat16", "text_config": section | older}


@pytest.mark.parametrize(
    "config",
    [
        {"model_type": "llama", "rope_parameters": LLAMA3, "rope_theta": 10000.0},
        {
            "model_type": "gemma4_text",
            "rope_parameters": {"full_attention": FULL, "sliding_attention": LOCAL},
        },
        {
            "model_type": "modernbert",
            "rope_parameters": {
                "full_attention": PLAIN,
                "sliding_attention": PLAIN | {"rope_type": "linear"},
            },
        },
        {"model_type": "olmo3", "rope_parameters": {"full_attention": PLAIN, "sliding_attention": LOCAL}},
        {"model_type": "llama", "rope_theta": 10000.0, "rope_scaling": None, "torch_dtype": "float16"},
        {"dtype": "float16", "torch_dtype": "float32"},
        {"dtype": "auto"},
        {"rope_parameters": "default"},
    ],
)
def test_what_the_older_fields_cannot_say_or_say_otherwise_stays(config: dict[str, Any]) -> None:
    assert with_older_fields(config) == config


def test_a_field_without_a_value_says_nothing() -> None:
    config = {"model_type": "llama", "rope_parameters": LLAMA3, "rope_scaling": None}
    assert with_older_fields(config)["rope_scaling"]["factor"] == 8.0
