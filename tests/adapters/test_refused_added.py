"""What does not fit, of the types that add to W: refused by file, tensor or field, and nothing is written."""

import pytest
import torch
from refusals import ANOTHER_BASE, MODULE, Q, only, put, refusal_of

B, W = f"{MODULE}.bias", f"{MODULE}.weight"
WEIGHT = f"{W} [64, 64]; {ANOTHER_BASE}"
Q_A, Q_B, Q_E = (f"{Q}.lora_{x}" for x in "ABE")
INDICES, VALUES = (f"{Q}.supertuning_{x}" for x in ("indices", "values"))
SUPER_A, SUPER_B = (f"{Q}.supertuning_lora_{x}.weight" for x in "AB")


def zeros(*shape):
    return torch.zeros(shape)


# name → (case of peft_cases.py, fields of the config, what is done to the tensors, the message)
REFUSED = {
    "shira without indices": (
        "shira",
        {},
        only({"shira_weight": zeros(5)}),
        "{file}: model.layers.0.self_attn.q_proj has shira_weight but no shira_indices.",
    ),
    "shira of two lengths": (
        "shira",
        {},
        only({"shira_weight": zeros(5), "shira_indices": zeros(2, 6).int()}),
        f"{{file}}: {Q}.shira_weight is F32 [5] and {Q}.shira_indices is I32 [2, 6]; they do not make one "
        "update.",
    ),
    "miss of another size": (
        "miss",
        {},
        only({"miss_block": zeros(8, 72)}),
        f"{{file}}: {Q}.miss_block [8, 72] does not fit {W} [64, 64]; is the adapter for another base?",
    ),
    "miss of another variant": (
        "miss_bat",
        {"init_weights": True},
        None,
        "{file}: base_model.model.model.layers.0.mlp.down_proj.miss_block is F32 [4, 16, 16], expected [r, "
        "out], since init_weights is True.",
    ),
    "miss of a new variant": (
        "miss",
        {"init_weights": "bit"},
        None,
        "{config}: init_weights is bit, expected true, false, 'bat' or 'mini', which say how miss_block is "
        "applied.",
    ),
    "c3a of another size": (
        "c3a",
        {},
        only({"c3a_kernel": zeros(8, 9, 8)}),
        f"{{file}}: {Q}.c3a_kernel [8, 9, 8] does not fit {W} [64, 64]; is the adapter for another base?",
    ),
    "c3a of integers": (
        "c3a",
        {},
        only({"c3a_kernel": zeros(8, 8, 8).int()}),
        f"{{file}}: {Q}.c3a_kernel has the dtype I32; expected one of F32, F16, BF16.",
    ),
    "loha without a partner": (
        "loha",
        {},
        only({"hada_w1_a": zeros(64, 4), "hada_w1_b": zeros(4, 64), "hada_w2_a": zeros(64, 4)}),
        "{file}: model.layers.0.self_attn.q_proj has hada_w1_a but no hada_w2_b.",
    ),
    "loha of another size": (
        "loha",
        {},
        only(
            {
                "hada_w1_a": zeros(64, 4),
                "hada_w1_b": zeros(4, 72),
                "hada_w2_a": zeros(64, 4),
                "hada_w2_b": zeros(4, 72),
            }
        ),
        f"{{file}}: {Q}.hada_w1_a [64, 4] and {Q}.hada_w1_b [4, 72] do not fit {W} [64, 64]; is the adapter "
        "for another base?",
    ),
    "loha of two ranks": (
        "loha",
        {},
        only(
            {
                "hada_w1_a": zeros(64, 4),
                "hada_w1_b": zeros(3, 64),
                "hada_w2_a": zeros(64, 4),
                "hada_w2_b": zeros(4, 64),
            }
        ),
        f"{{file}}: {Q}.hada_w1_a is F32 [64, 4] and {Q}.hada_w1_b is F32 [3, 64]; they do not make one "
        "update.",
    ),
    "loha of a new kind": (
        "loha",
        {},
        only({f"hada_w{i}_{x}": zeros(64, 64) for i in (1, 2) for x in "ab"} | {"hada_w3_a": zeros(1)}),
        f"{{file}}: {Q}.hada_w3_a is of a kind that is not supported.",
    ),
    "loha alpha": (
        "loha",
        {"alpha": "8"},
        None,
        '{config}: the alpha of model.layers.0.mlp.down_proj is the text "8", expected a number.',
    ),
    "loha pattern": (
        "loha",
        {"rank_pattern": [1]},
        None,
        "{config}: rank_pattern is [1], expected an object.",
    ),
    "lokr without rank": (
        "lokr_whole",
        {"r": 0},
        None,
        "{config}: the rank of model.layers.0.mlp.down_proj is 0, expected an integer of at least 1.",
    ),
    "lokr without w2": (
        "lokr",
        {},
        only({"lokr_w1": zeros(8, 8)}),
        "{file}: model.layers.0.self_attn.q_proj has no lokr_w2 and no lokr_w2_a.",
    ),
    "lokr of another size": (
        "lokr",
        {},
        only({"lokr_w1": zeros(8, 8), "lokr_w2": zeros(8, 9)}),
        f"{{file}}: {Q}.lokr_w1 [8, 8] and {Q}.lokr_w2 [8, 9] do not fit {W} [64, 64]; is the adapter for "
        "another base?",
    ),
    "adalora, no E": ("adalora", {}, put({"lora_E": None}), f"{{file}}: {MODULE} has lora_A but no lora_E."),
    "adalora, two ranks": (
        "adalora",
        {},
        put({"lora_A": torch.zeros(5, 64)}),
        f"{{file}}: {Q_A} is F32 [5, 64] and {Q_B} is F32 [64, 6]; they are not the two factors of one "
        "update.",
    ),
    "adalora, another E": (
        "adalora",
        {},
        put({"lora_E": torch.zeros(6)}),
        f"{{file}}: {Q_E} is F32 [6], expected [6, 1] from {Q_A}.",
    ),
    "adalora, another base": (
        "adalora",
        {},
        put({"lora_A": torch.zeros(6, 72)}),
        f"{{file}}: {Q_A} [6, 72] and {Q_B} [64, 6] do not fit {WEIGHT}",
    ),
    "adalora, integers": (
        "adalora",
        {},
        put({"lora_B": torch.zeros(64, 6, dtype=torch.int8)}),
        f"{{file}}: {Q_B} has the dtype I8; expected one of F32, F16, BF16.",
    ),
    "adalora, a stranger": (
        "adalora",
        {},
        put({"lora_embedding_A": torch.zeros(6, 96)}),
        f"{{file}}: {Q}.lora_embedding_A is of a kind that is not supported.",
    ),
    "supertuning, no indices": (
        "supertuning",
        {},
        put({"supertuning_indices": None}),
        f"{{file}}: {MODULE} has supertuning_values but no supertuning_indices (save_precomputed_indices "
        "was off), so it is not known which elements they belong to.",
    ),
    "supertuning, no values": (
        "supertuning",
        {},
        put({"supertuning_values": None}),
        f"{{file}}: {MODULE} has supertuning_indices but no supertuning_values.",
    ),
    "supertuning, another count": (
        "supertuning",
        {},
        put({"supertuning_values": torch.zeros(3)}),
        f"{{file}}: {VALUES} is F32 [3], expected [40] from {INDICES}.",
    ),
    "supertuning, floats": (
        "supertuning",
        {},
        put({"supertuning_indices": torch.zeros(40)}),
        f"{{file}}: {INDICES} has the dtype F32; expected one of U8, I8, I16, I32, I64.",
    ),
    "supertuning, outside": (
        "supertuning",
        {},
        put({"supertuning_indices": torch.arange(40) + 4060}),
        f"{{file}}: {INDICES} has the position 4099, outside of the 4096 elements of {MODULE}.weight; "
        f"{ANOTHER_BASE}",
    ),
    "supertuning, another base": (
        "supertuning, smallest, low rank",
        {},
        put({"supertuning_lora_A.weight": torch.zeros(3, 72)}),
        f"{{file}}: {SUPER_A} [3, 72] and {SUPER_B} [64, 3] do not fit {WEIGHT}",
    ),
    "adalora, init_r": ("adalora", {"init_r": -2}, None, "{config}: init_r is -2, expected a rank."),
    "adalora, lora_alpha": (
        "adalora",
        {"lora_alpha": "9"},
        None,
        '{config}: lora_alpha is the text "9", expected a number.',
    ),
    "adalora, target_parameters": (
        "adalora",
        {"target_parameters": ["experts"]},
        None,
        "{config}: target_parameters is set, which is not supported: AdaLoRA has no form for parameters "
        "that are not a layer's.",
    ),
}
# The same, of adapters of q_proj alone.
REFUSED_ON_Q_PROJ = {
    "beft shape": (
        "beft",
        {},
        put({"beft_bias": torch.zeros(64)}),
        f"{{file}}: {Q}.beft_bias is F32 [64], expected [1, out].",
    ),
    "beft size": (
        "beft",
        {},
        put({"beft_bias": torch.zeros(1, 63)}),
        f"{{file}}: {Q}.beft_bias [1, 63] does not fit {B} [64]; is the adapter for another base?",
    ),
    "delora missing": (
        "delora",
        {},
        put({f"{Q}.delora_w_norm": None}),
        "{file}: model.layers.0.self_attn.q_proj has delora_A but no delora_w_norm.",
    ),
    "delora shape": (
        "delora",
        {},
        put({"delora_A": torch.zeros(2, 64)}),
        f"{{file}}: {Q}.delora_B is F32 [64, 3], expected [out, 2] from {Q}.delora_A.",
    ),
    "delora size": (
        "delora",
        {},
        put({"delora_B": torch.zeros(63, 3)}),
        f"{{file}}: {Q}.delora_B [63, 3] does not fit {W} [64, 64]; is the adapter for another base?",
    ),
    "fourierft scaling": (
        "fourierft",
        {"scaling": "much"},
        None,
        '{config}: scaling is the text "much", expected a number.',
    ),
    "fourierft seed": (
        "fourierft",
        {"random_loc_seed": None},
        None,
        "{config}: random_loc_seed is None, expected an integer of at least 0.",
    ),
    "fourierft size": (
        "fourierft",
        {},
        put({"fourierft_spectrum": torch.zeros(5000)}),
        f"{{file}}: {Q}.fourierft_spectrum [5000] does not fit {W} [64, 64]; is the adapter for another "
        "base?",
    ),
    "gralora ranks": (
        "gralora",
        {},
        put({"gralora_B": torch.zeros(2, 3, 32)}),
        f"{{file}}: {Q}.gralora_B is F32 [2, 3, 32], expected [2, 4, out / k] from {Q}.gralora_A.",
    ),
    "gralora size": (
        "gralora",
        {},
        put({"gralora_B": torch.zeros(2, 4, 31)}),
        f"{{file}}: {Q}.gralora_B [2, 4, 31] does not fit {W} [64, 64]; is the adapter for another base?",
    ),
    "gralora alpha": ("gralora", {"alpha": True}, None, "{config}: alpha is True, expected a number."),
    "waveft family": (
        "waveft",
        {"wavelet_family": "coif1"},
        None,
        "{config}: wavelet_family is coif1, which is not supported; known are db1, db2, db3, db4, db5 and "
        "14 more.",
    ),
    "waveft shape": (
        "waveft",
        {},
        put({"waveft_spectrum": torch.zeros(5, 5)}),
        f"{{file}}: {Q}.waveft_spectrum is F32 [5, 5], expected [n_frequency].",
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
