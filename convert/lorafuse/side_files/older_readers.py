"""Fields of config.json that older programs read, beside what transformers 5 writes in their place.

transformers 5 keeps everything about rotary embeddings in `rope_parameters`, and the dtype in `dtype`.
transformers 4 and mlx-lm know neither: without `rope_theta` they silently take 10000, and compute another
model."""

from collections.abc import Iterator
from typing import Any

DTYPES = ("float32", "float16", "bfloat16", "float64")
OWN_FIELDS = ("rope_theta", "partial_rotary_factor")
"""What transformers 4 has as fields of the config; the rest of `rope_parameters` is `rope_scaling` there."""
DEFAULT_SCALING = {"rope_type": "default"}
NEOX_FIELDS = {"rotary_emb_base": "rope_theta", "rotary_pct": "partial_rotary_factor"}
NEOX = ("gpt_neox", "gpt_neox_japanese")
PHI_SCALING = ("short_factor", "long_factor", "short_mscale", "long_mscale")
LOCAL_THETA = "rope_local_base_freq"
LAYER_TYPES = {"full_attention", "sliding_attention"}


def with_older_fields(config: dict[str, Any]) -> dict[str, Any]:
    """`config` and its sections, each with the older fields beside those that say the same. A section whose
    older fields say something else is left as it is."""
    result = {
        name: with_older_fields(value) if isinstance(value, dict) and name != "rope_parameters" else value
        for name, value in config.items()
    }
    rotary = dict(_rotary_fields(config.get("model_type"), config.get("rope_parameters")))
    dtype = {"torch_dtype": config["dtype"]} if config.get("dtype") in DTYPES else {}
    for older in (rotary, dtype):
        if all(config.get(name) in (None, value) for name, value in older.items()):
            result |= older
    return result


def _rotary_fields(model_type: Any, rope: Any) -> Iterator[tuple[str, Any]]:
    """What transformers 4's config of this `model_type` reads: nothing where it knows no such layers."""
    if not isinstance(rope, dict):
        return
    if rope.get("rope_type") == "axial" and "rope_theta" in rope:
        yield (
            "rope_theta",
            rope["rope_theta"],
        )  # images: transformers 4 has the two axes in the code of the model
    elif rope.get("rope_type") == "longrope" and str(model_type).startswith("phi"):
        yield from _of_phi(rope)
    elif "rope_theta" in rope:
        yield from _of_all_layers(rope)
        if model_type in NEOX:
            yield from ((name, rope[now]) for name, now in NEOX_FIELDS.items() if now in rope)
    elif set(rope) == LAYER_TYPES and all(
        isinstance(part, dict) and "rope_theta" in part for part in rope.values()
    ):
        yield from _of_two_layer_types(str(model_type), rope["full_attention"], rope["sliding_attention"])


def _of_phi(rope: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    """Phi-3 and its kin refuse a `rope_scaling` that holds anything else."""
    yield from (
        (name, rope[name]) for name in (*OWN_FIELDS, "original_max_position_embeddings") if name in rope
    )
    yield "rope_scaling", {"type": "longrope"} | {name: rope[name] for name in PHI_SCALING if name in rope}


def _of_all_layers(rope: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    yield from ((name, rope[name]) for name in OWN_FIELDS if name in rope)
    scaling = {name: value for name, value in rope.items() if name not in OWN_FIELDS}
    if scaling not in ({}, DEFAULT_SCALING):
        yield "rope_scaling", scaling


def _of_two_layer_types(
    model_type: str, full: dict[str, Any], sliding: dict[str, Any]
) -> Iterator[tuple[str, Any]]:
    """Only Gemma 3, ModernBERT and OLMo 3 have such layers in transformers 4, each in fields of its own."""
    if sliding.get("rope_type", "default") != "default":
        return
    if model_type.startswith("gemma3"):
        yield from _of_all_layers(full)
        yield LOCAL_THETA, sliding["rope_theta"]
    elif model_type.startswith("modernbert"):
        yield "global_rope_theta", full["rope_theta"]
        yield "local_rope_theta", sliding["rope_theta"]
    elif model_type == "olmo3" and full["rope_theta"] == sliding["rope_theta"]:
        yield from _of_all_layers(full)
