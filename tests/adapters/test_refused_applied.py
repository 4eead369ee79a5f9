"""What does not fit, of the types that multiply, project or replace W: refused by file, tensor or field, and
nothing is written."""

import pytest
import torch
from refusals import ANOTHER_BASE, MODULE, Q, only, put, refusal_of

B, W = f"{MODULE}.bias", f"{MODULE}.weight"
WEIGHT = f"{W} [64, 64]; {ANOTHER_BASE}"
Q_P, Q_R = (f"{Q}.deft_{x}" for x in "PR")
Q_U, Q_S, Q_V = (f"{Q}.osf_svd_params.{x}_low" for x in "USV")
FROD_SHARED, FROD_L = "base_model.frod_", f"{Q}.frod_lambda_l"
EMBED = "base_model.model.model.embed_tokens.trainable_tokens_delta"
NORM = "base_model.model.model.norm.ln_tuning_layers.weight"


def zeros(*shape):
    return torch.zeros(shape)


# name → (case of peft_cases.py, fields of the config, what is done to the tensors, the message)
REFUSED = {
    "oft of another size": (
        "oft",
        {},
        only({"oft_R.weight": zeros(9, 28)}),
        f"{{file}}: {Q}.oft_R.weight [9, 28] does not fit {W} [64, 64]; is the adapter for another base?",
    ),
    "oft of no triangle": (
        "oft",
        {},
        only({"oft_R.weight": zeros(8, 27)}),
        f"{{file}}: {Q}.oft_R.weight is F32 [8, 27]; OFT has no such shape.",
    ),
    "oft not shared": (
        "oft_shared",
        {"block_share": False},
        only({"oft_R.weight": zeros(1, 496)}),
        f"{{file}}: {Q}.oft_R.weight [1, 496] does not fit {W} [64, 64]; is the adapter for another base?",
    ),
    "oft of 0.15": (
        "oft",
        {},
        only({"oft_r": zeros(8, 8, 8)}),
        f"{{file}}: {Q}.oft_r is of peft before 0.16, whose OFT is not supported.",
    ),
    "oft terms": (
        "oft",
        {"num_cayley_neumann_terms": 0},
        None,
        "{config}: num_cayley_neumann_terms is 0, expected an integer of at least 1.",
    ),
    "oft eps": (
        "oft_constrained",
        {"eps": "1"},
        None,
        '{config}: eps is the text "1", expected a number of at least 0.',
    ),
    "boft of another size": (
        "boft",
        {},
        only({"boft_R": zeros(1, 8, 8, 8), "boft_s": zeros(72, 1)}),
        f"{{file}}: {Q}.boft_R [1, 8, 8, 8] and {Q}.boft_s [72, 1] do not fit {W} [64, 64]; is the adapter "
        "for another base?",
    ),
    "boft of odd blocks": (
        "boft",
        {},
        only({"boft_R": zeros(2, 4, 3, 3), "boft_s": zeros(64, 1)}),
        f"{{file}}: {Q}.boft_R is F32 [2, 4, 3, 3] and {Q}.boft_s is F32 [64, 1]; they do not make one "
        "update.",
    ),
    "hra of another size": (
        "hra",
        {},
        only({"hra_u": zeros(72, 4)}),
        f"{{file}}: {Q}.hra_u [72, 4] does not fit {W} [64, 64]; is the adapter for another base?",
    ),
    "hra of no rank": (
        "hra",
        {},
        only({"hra_u": zeros(64)}),
        f"{{file}}: {Q}.hra_u is F32 [64], expected [in, r].",
    ),
    "ia3 of another size": (
        "ia3",
        {},
        only({"ia3_l": zeros(72, 1)}),
        f"{{file}}: {Q}.ia3_l [72, 1] does not fit {W} [64, 64]; is the adapter for another base?",
    ),
    "ia3 of several vectors": (
        "ia3",
        {},
        only({"ia3_l": zeros(64, 2)}),
        f"{{file}}: {Q}.ia3_l is F32 [64, 2], expected a vector as PEFT stores it.",
    ),
    "ia3 without feedforward_modules": (
        "ia3",
        {"feedforward_modules": None},
        only({"ia3_l": zeros(1, 64, 1, 1)}),
        "{config}: feedforward_modules is None, expected a list or a regular expression.",
    ),
    "ia3 with a bad regular expression": (
        "ia3",
        {"feedforward_modules": "("},
        only({"ia3_l": zeros(1, 1)}),
        "{config}: feedforward_modules is not a regular expression: missing ), unterminated subpattern at "
        "position 0.",
    ),
    "deft, no R": ("deft", {}, put({"deft_R": None}), f"{{file}}: {MODULE} has deft_P but no deft_R."),
    "deft, another R": (
        "deft",
        {},
        put({"deft_R": torch.zeros(4, 64)}),
        f"{{file}}: {Q_R} is F32 [4, 64], expected [3, in] from {Q_P}.",
    ),
    "deft, no matrix": (
        "deft",
        {},
        put({"deft_P": torch.zeros(64)}),
        f"{{file}}: {Q_P} is F32 [64], expected [out, r].",
    ),
    "deft, another base": (
        "deft",
        {},
        put({"deft_P": torch.zeros(72, 3)}),
        f"{{file}}: {Q_P} [72, 3] and {Q_R} [3, 64] do not fit {WEIGHT}",
    ),
    "deft, para, another base": (
        "deft, para",
        {},
        put({"deft_P": torch.zeros(72, 3)}),
        f"{{file}}: {Q_P} [72, 3] does not fit {WEIGHT}",
    ),
    "frod, no values": (
        "frod",
        {},
        put({"frod_lambda_s_values": None}),
        f"{{file}}: {MODULE} has frod_lambda_l but no frod_lambda_s_values.",
    ),
    "frod, no projection": (
        "frod",
        {},
        put({f"{FROD_SHARED}V.self_attn_q_proj": None}),
        f"{{file}}: has no frod_V.self_attn_q_proj for {MODULE} (save_projection was off); PEFT would make "
        "it from all layers of that kind together.",
    ),
    "frod, another projection": (
        "frod",
        {},
        put({f"{FROD_SHARED}V.self_attn_q_proj": torch.eye(63)}),
        f"{{file}}: {FROD_SHARED}V.self_attn_q_proj is F32 [63, 63], expected [64, 64] from {FROD_L}.",
    ),
    "frod, outside": (
        "frod",
        {},
        put({f"{FROD_SHARED}s_indices.self_attn_q_proj": torch.full((2, 40), 64)}),
        f"{{file}}: {FROD_SHARED}s_indices.self_attn_q_proj has the position 64, outside of the 64 inputs "
        f"of {FROD_L}.",
    ),
    "frod, another size": (
        "frod",
        {},
        put({f"{FROD_SHARED}s_size.self_attn_q_proj": torch.tensor([64, 96])}),
        f"{{file}}: {FROD_SHARED}s_size.self_attn_q_proj is not 64 × 64, which follows from {FROD_L}.",
    ),
    "osf, no S": (
        "osf",
        {},
        put({"osf_svd_params.S_low": None}),
        f"{{file}}: {MODULE} has osf_svd_params.U_low but no osf_svd_params.S_low.",
    ),
    "osf, no vector": (
        "osf",
        {},
        put({"osf_svd_params.S_low": torch.zeros(32, 1)}),
        f"{{file}}: {Q_S} is F32 [32, 1], expected [r].",
    ),
    "osf, two ranks": (
        "osf",
        {},
        put({"osf_svd_params.V_low": torch.zeros(31, 64)}),
        f"{{file}}: {Q_V} is F32 [31, 64], expected [32, in] from {Q_S}.",
    ),
    "osf, another base": (
        "osf",
        {},
        put({"osf_svd_params.V_low": torch.zeros(32, 72)}),
        f"{{file}}: {Q_U} [64, 32] and {Q_S} [32] and {Q_V} [32, 72] do not fit {WEIGHT}",
    ),
    "deft, decomposition_method": (
        "deft",
        {"decomposition_method": "svd"},
        None,
        "{config}: decomposition_method is svd, which is not supported; known are relu, qr.",
    ),
    "deft, alpha": ("deft", {"alpha": "nan"}, None, '{config}: alpha is the text "nan", expected a number.'),
    "trainable_tokens, another width": (
        "trainable_tokens, two",
        {"token_indices": [1, 5]},
        put({EMBED: torch.zeros(2, 72)}),
        f"{{file}}: {EMBED} [2, 72] does not fit model.embed_tokens.weight [96, 64]; {ANOTHER_BASE}",
    ),
    "trainable_tokens, another count": (
        "trainable_tokens, two",
        {"token_indices": [1, 5]},
        put({EMBED: torch.zeros(3, 64)}),
        f"{{file}}: {EMBED} is F32 [3, 64], expected one row for each of the 2 in token_indices.",
    ),
    "trainable_tokens, integers": (
        "trainable_tokens, two",
        {"token_indices": [1, 5]},
        put({EMBED: torch.zeros(2, 64, dtype=torch.int32)}),
        f"{{file}}: {EMBED} has the dtype I32; expected one of F32, F16, BF16.",
    ),
    "trainable_tokens, no list": (
        "trainable_tokens, two",
        {"token_indices": "1, 5"},
        None,
        "{config}: token_indices is 1, 5, expected a list of integers.",
    ),
    "trainable_tokens, twice": (
        "trainable_tokens, two",
        {"token_indices": [5, 5]},
        None,
        "{config}: token_indices has 5 twice; which row is meant?",
    ),
    "trainable_tokens, outside": (
        "trainable_tokens, two",
        {"token_indices": [1, 96]},
        None,
        "{config}: token_indices has 96, but model.embed_tokens.weight has 96 rows; is the adapter for "
        "another base, or was the vocabulary resized without saving the embedding?",
    ),
    "ln_tuning, another shape": (
        "ln_tuning",
        {},
        put({NORM: torch.zeros(65)}),
        f"{{file}}: {NORM} is [65], but model.norm.weight is [64]; {ANOTHER_BASE}",
    ),
}
# The same, of adapters of q_proj alone.
REFUSED_ON_Q_PROJ = {
    "glora half": (
        "glora",
        {},
        put({f"{Q}.glora_A.Xu": None}),
        "{file}: model.layers.0.self_attn.q_proj has glora_A.Xd but no glora_A.Xu.",
    ),
    "glora size": (
        "glora",
        {},
        put({"glora_C.Xd": torch.zeros(63, 3)}),
        f"{{file}}: {Q}.glora_C.Xd [63, 3] does not fit {B} [64]; is the adapter for another base?",
    ),
    "hira kind": (
        "hira",
        {},
        put({"hira_C": torch.zeros(1)}),
        f"{{file}}: {Q}.hira_C is of a kind that is not supported.",
    ),
    "hira size": (
        "hira",
        {},
        put({"hira_B": torch.zeros(63, 4)}),
        f"{{file}}: {Q}.hira_B [63, 4] does not fit {W} [64, 64]; is the adapter for another base?",
    ),
    "road variant": (
        "road",
        {"variant": "road_3"},
        None,
        "{config}: variant is road_3, which is not supported; known are road_1, road_2, road_4.",
    ),
    "road group": ("road", {"group_size": 7}, None, "{config}: group_size is 7, expected an even number."),
    "road size": (
        "road",
        {"group_size": 6},
        None,
        f"{{file}}: {Q}.road_theta [32] does not fit {W} [64, 64]; is the adapter for another base?",
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
