"""What does not fit, of types whose modules share tensors: refused by file, tensor or field; nothing is
written."""

import pytest
import torch
from refusals import ANOTHER_BASE, MODULE, Q, put, refusal_of

B, W = f"{MODULE}.bias", f"{MODULE}.weight"
WEIGHT = f"{W} [64, 64]; {ANOTHER_BASE}"
TINY_A, TINY_B, TINY_P = (f"{Q}.tinylora_{x}" for x in "ABP")
THETA, UNI = "base_model.unilora_theta_d", f"{Q}.unilora_"


def zeros(*shape):
    return torch.zeros(shape)


# name → (case of peft_cases.py, fields of the config, what is done to the tensors, the message)
REFUSED = {
    "tinylora, no P": (
        "tinylora",
        {},
        put({"tinylora_P": None}),
        f"{{file}}: {MODULE} has tinylora_A but no tinylora_P (save_projection was off), so it is not known "
        "which vector belongs to it.",
    ),
    "tinylora, another P": (
        "tinylora",
        {},
        put({"tinylora_P": torch.ones(3, 2, 2)}),
        f"{{file}}: {TINY_P} is not what projection_seed gives, so it is not known which vector belongs to "
        f"{MODULE}.",
    ),
    "tinylora, no square": (
        "tinylora",
        {},
        put({"tinylora_P": torch.ones(3, 2)}),
        f"{{file}}: {TINY_P} is F32 [3, 2], expected [u, rank, rank].",
    ),
    "tinylora, no vectors": (
        "tinylora, all share one",
        {},
        put({"base_model.tinylora_v.0": None}),
        "{file}: has no tinylora_v.",
    ),
    "tinylora, a vector less": (
        "tinylora",
        {},
        put({"base_model.tinylora_v.0": None}),
        "{file}: has no tinylora_v.0, the vector of model.layers.0.self_attn.q_proj.",
    ),
    "tinylora, another vector": (
        "tinylora, all share one",
        {},
        put({"base_model.tinylora_v.0": torch.ones(2)}),
        "{file}: base_model.tinylora_v.0 is F32 [2], expected [1] from "
        "base_model.model.model.layers.0.mlp.down_proj.tinylora_P.",
    ),
    "tinylora, another rank": (
        "tinylora",
        {},
        put({"tinylora_A": torch.ones(3, 64)}),
        f"{{file}}: {TINY_A} is F32 [3, 64], expected [2, in] from {TINY_P}.",
    ),
    "tinylora, another base": (
        "tinylora",
        {},
        put({"tinylora_A": torch.ones(2, 72)}),
        f"{{file}}: {TINY_A} [2, 72] and {TINY_B} [64, 2] do not fit {WEIGHT}",
    ),
    "unilora, no vector": ("unilora", {}, put({THETA: None}), "{file}: has no unilora_theta_d."),
    "unilora, a matrix": (
        "unilora",
        {},
        put({THETA: torch.ones(16, 16)}),
        f"{{file}}: {THETA} is F32 [16, 16], expected [theta_d].",
    ),
    "unilora, a short vector": (
        "unilora",
        {},
        put(
            {
                THETA: torch.ones(9),
            }
        ),
        "{file}: base_model.model.model.layers.0.mlp.down_proj.unilora_indices_A has the position 255, "
        f"outside of the 9 elements of {THETA}.",
    ),
    "unilora, no scales": (
        "unilora",
        {},
        put({"unilora_scales_B": None}),
        f"{{file}}: {MODULE} has unilora_indices_A but no unilora_scales_B.",
    ),
    "unilora, other scales": (
        "unilora",
        {},
        put({"unilora_scales_B": torch.ones(64, 5)}),
        f"{{file}}: {UNI}scales_B is F32 [64, 5], expected [64, 4] from {UNI}indices_B and {UNI}indices_A.",
    ),
    "unilora, two ranks": (
        "unilora",
        {},
        put({"unilora_indices_B": torch.ones(64, 5, dtype=torch.int64)}),
        f"{{file}}: {UNI}indices_B is I64 [64, 5], expected [out, 4] from {UNI}indices_A.",
    ),
    "unilora, another base": (
        "unilora",
        {},
        put(
            {"unilora_indices_A": torch.ones(4, 72, dtype=torch.int64), "unilora_scales_A": torch.ones(4, 72)}
        ),
        f"{{file}}: {UNI}indices_A [4, 72] and {UNI}indices_B [64, 4] do not fit {WEIGHT}",
    ),
}
# The same, of adapters of q_proj alone.
REFUSED_ON_Q_PROJ = {
    "pvera sampling": (
        "pvera",
        {"sample_at_inference": True},
        None,
        "{config}: sample_at_inference is set, which is not supported: each forward pass samples anew, so "
        "no merged weight equals it. Set it to false to merge the mean.",
    ),
    "pvera rank": (
        "pvera",
        {},
        put({"pvera_lambda_d": torch.zeros(9)}),
        f"{{file}}: {Q}.pvera_lambda_d is F32 [9], expected [10].",
    ),
    "randlora unsaved": (
        "randlora",
        {},
        put({"base_model.randlora_A": None}),
        "{file}: base_model has randlora_B but no randlora_A.",
    ),
    "randlora unsaved both": (
        "randlora",
        {"save_projection": False},
        lambda found: [found.pop(key) for key in list(found) if key.endswith(("randlora_A", "randlora_B"))],
        "{file}: holds no base_model.randlora_A, and what PEFT would draw in its place depends on the "
        "machine; save the adapter with save_projection=True.",
    ),
    "randlora size": (
        "randlora",
        {},
        put({"randlora_gamma": torch.zeros(13, 63)}),
        f"{{file}}: {Q}.randlora_gamma [13, 63] does not fit {W} [64, 64]; is the adapter for another base?",
    ),
    "vblora bank": (
        "vblora",
        {},
        put({"base_model.vblora_vector_bank": None}),
        "{file}: holds no base_model.vblora_vector_bank.",
    ),
    "vblora vectors": (
        "vblora",
        {},
        put({"vblora_logits_A": torch.zeros(4, 4, 19)}),
        f"{{file}}: {Q}.vblora_logits_A is F32 [4, 4, 19], expected [r, in / v, 20] from "
        "base_model.vblora_vector_bank.",
    ),
    "vblora topk": (
        "vblora",
        {"topk": 21},
        None,
        "{file}: base_model.vblora_vector_bank has 20 vectors, fewer than topk, 21.",
    ),
    "vera unsaved": (
        "vera",
        {},
        lambda found: (found.pop("base_model.vera_A"), found.pop("base_model.vera_B")),
        "{file}: holds no base_model.vera_A, though {config} says save_projection.",
    ),
    "vera rank": (
        "vera",
        {},
        put({"vera_lambda_d": torch.zeros(4)}),
        f"{{file}}: {Q}.vera_lambda_d is F32 [4], expected [5].",
    ),
    "vera projection": (
        "vera",
        {},
        lambda found: found.update({"base_model.vera_A": torch.zeros(5, 63)}),
        f"{{file}}: base_model.vera_A [5, 63] does not fit {W} [64, 64]; is the adapter for another base?",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_does_not_fit_is_refused_before_anything_is_written(name, trained, tmp_path):
    case, fields, change, message = REFUSED[name]
    assert refusal_of(trained(case), tmp_path, fields, change) == message


@pytest.mark.parametrize("name", REFUSED_ON_Q_PROJ)
def test_what_does_not_fit_on_one_module_is_refused(name, trained, tmp_path):
    case, fields, change, message = REFUSED_ON_Q_PROJ[name]
    made = trained(case, target_modules=["q_proj"])
    assert refusal_of(made, tmp_path, fields, change) == message
