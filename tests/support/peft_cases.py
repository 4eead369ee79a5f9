"""The table of PEFT's types: of each variant its config, the bases that it is tried on, and a formula of W'.

A case is named after its type. `trained(case, base)` (conftest.py) gives the adapter that PEFT writes.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

from formulas_added import (
    adalora,
    beft,
    c3a,
    delora,
    fourierft,
    gralora,
    loha,
    lokr,
    lora,
    miss,
    pvera,
    randlora,
    shira,
    supertuning,
    unilora,
    vblora,
    vera,
    waveft,
)
from formulas_applied import (
    bat,
    boft,
    deft,
    frod,
    glora,
    hira,
    hra,
    ia3,
    ln_tuning,
    oft,
    osf,
    road,
    trainable_tokens,
)
from models import LINEARS


class Case(NamedTuple):
    """One variant of a type. `formula(W, b, t, c, g)` gives W' and b' in float64: t has the tensors of one
    module by leaf and the module's name, c is adapter_config.json, g has the tensors that modules share.
    None: what a formula needs is not in the file, and the answers alone are compared."""

    peft_type: str
    settings: dict[str, Any]
    formula: Callable[..., Any] | None
    bases: tuple[str, ...] = ("fp32",)


Q_DOWN = {"target_modules": ["q_proj", "down_proj"]}
Q_K_DOWN = {"target_modules": ["q_proj", "k_proj", "down_proj"]}  # square, wide and tall
GPT2 = ["c_attn", "c_proj", "c_fc"]
CONV1D = {"target_modules": ["c_attn", "c_proj"], "fan_in_fan_out": True}
DENSE_AND_NF4 = ("fp32", "nf4_dq")
ADALORA = {"init_r": 6, "target_r": 3, "total_step": 10, "lora_alpha": 9}
# AdaLoRA's own form of a rank: which of the init_r are left, by the name of lora_E. One module has none left.
KEPT = {"model.layers.0.self_attn.q_proj": [0, 1, 4], "model.layers.1.mlp.down_proj": []}
REDUCED = {f"{module}.lora_E.default": [i in kept for i in range(6)] for module, kept in KEPT.items()}
SUPRA = {"sparsity": 0.5, "select_top": False, "r": 3, "lora_alpha": 5}
FROD = {"progressbar": False}

CASES = {
    "adalora": Case("ADALORA", Q_DOWN | ADALORA, adalora, DENSE_AND_NF4),
    "adalora, conv1d, biases": Case("ADALORA", CONV1D | ADALORA | {"bias": "lora_only"}, adalora, ("gpt2",)),
    "adalora, no alpha": Case("ADALORA", Q_DOWN | ADALORA | {"lora_alpha": 0}, adalora, ("fp32",)),
    "adalora, ranks reduced": Case(
        "ADALORA", Q_DOWN | ADALORA | {"rank_pattern": REDUCED}, adalora, ("fp32",)
    ),
    "beft": Case("BEFT", Q_DOWN, beft, ("fp32",)),
    "beft_nf4": Case("BEFT", Q_DOWN, beft, ("nf4_dq",)),
    "boft": Case("BOFT", Q_K_DOWN | {"boft_block_size": 8}, boft, DENSE_AND_NF4),
    "boft_butterfly": Case(
        "BOFT",
        Q_K_DOWN | {"boft_block_size": 4, "boft_n_butterfly_factor": 3, "boft_dropout": 0.2},
        boft,
        DENSE_AND_NF4,
    ),
    "boft_number": Case(
        "BOFT",
        Q_K_DOWN | {"boft_block_size": 0, "boft_block_num": 4, "boft_n_butterfly_factor": 2},
        boft,
        DENSE_AND_NF4,
    ),
    "c3a": Case("C3A", Q_K_DOWN | {"block_size": 8}, c3a, DENSE_AND_NF4),
    "c3a_pattern": Case(
        "C3A", Q_K_DOWN | {"block_size": 16, "block_size_pattern": {"q_proj": 64}}, c3a, DENSE_AND_NF4
    ),
    "deft": Case("DEFT", Q_DOWN | {"r": 3}, deft, DENSE_AND_NF4),
    "deft, qr, alpha": Case(
        "DEFT",
        Q_DOWN | {"r": 3, "decomposition_method": "qr", "alpha": 7, "bias": "deft_only"},
        deft,
        DENSE_AND_NF4,
    ),
    "deft, para": Case("DEFT", Q_DOWN | {"r": 3, "para": True}, deft, ("fp32",)),
    "deft, qr, para, conv1d": Case(
        "DEFT", CONV1D | {"r": 3, "decomposition_method": "qr", "para": True}, deft, ("gpt2",)
    ),
    "deft, conv1d": Case("DEFT", CONV1D | {"r": 3, "alpha": 2}, deft, ("gpt2",)),
    "deft, more rank than outputs": Case(
        "DEFT", {"target_modules": ["k_proj"], "r": 40, "alpha": 7}, deft, ("fp32",)
    ),
    "delora": Case("DELORA", Q_DOWN | {"r": 4, "rank_pattern": {"q_proj": 3}}, delora, ("fp32",)),
    "delora_nf4": Case("DELORA", Q_DOWN | {"r": 4}, delora, ("nf4_dq",)),
    "fourierft": Case(
        "FOURIERFT",
        Q_DOWN | {"n_frequency": 50, "scaling": 100.0, "n_frequency_pattern": {"q_proj": 70}},
        fourierft,
        ("fp32",),
    ),
    "fourierft_dense": Case(
        "FOURIERFT", Q_DOWN | {"n_frequency": 4000, "random_loc_seed": 5}, fourierft, ("fp32",)
    ),
    "fourierft_gpt2": Case(
        "FOURIERFT", {"n_frequency": 60, "scaling": 100.0, "target_modules": GPT2}, fourierft, ("gpt2",)
    ),
    "fourierft_nf4": Case("FOURIERFT", Q_DOWN | {"n_frequency": 50}, fourierft, ("nf4_dq",)),
    "frod": Case("FROD", Q_DOWN | FROD, frod, ("fp32",)),
    "frod, no sparse part": Case(
        "FROD", {"target_modules": LINEARS, "sparse_rate": 0} | FROD, frod, ("fp32",)
    ),
    "frod, conv1d": Case("FROD", CONV1D | FROD | {"sparse_rate": 0.1}, frod, ("gpt2",)),
    "glora": Case("GLORA", Q_DOWN | {"r": 3}, glora, ("fp32",)),
    "glora_vectors": Case(
        "GLORA",
        Q_DOWN | {"config_A_B": "vector", "config_C": "vector", "config_D_E": "vector"},
        glora,
        ("fp32",),
    ),
    "glora_constants": Case(
        "GLORA",
        Q_DOWN | {"config_A_B": "constant", "config_C": "none", "config_D_E": "constant"},
        glora,
        ("fp32",),
    ),
    "glora_off": Case(
        "GLORA", Q_DOWN | {"config_A_B": "none", "config_C": "vector", "config_D_E": "none"}, glora, ("fp32",)
    ),
    "glora_no_bias": Case("GLORA", Q_DOWN | {"r": 3}, glora, ("bf16_odd",)),
    "glora_nf4": Case("GLORA", Q_DOWN | {"r": 3}, glora, ("nf4_dq",)),
    "gralora": Case("GRALORA", Q_DOWN | {"r": 4, "gralora_k": 2, "alpha": 6}, gralora, ("fp32",)),
    "gralora_hybrid": Case("GRALORA", Q_DOWN | {"r": 8, "gralora_k": 4, "hybrid_r": 3}, gralora, ("fp32",)),
    "gralora_gpt2": Case(
        "GRALORA", {"r": 4, "gralora_k": 2, "hybrid_r": 2, "target_modules": GPT2}, gralora, ("gpt2",)
    ),
    "gralora_nf4": Case("GRALORA", Q_DOWN | {"r": 4, "gralora_k": 2}, gralora, ("nf4_dq",)),
    "hira": Case("HIRA", Q_DOWN | {"r": 4, "rank_pattern": {"q_proj": 3}}, hira, ("fp32",)),
    "hira_embedding": Case("HIRA", {"r": 4, "target_modules": ["embed_tokens", "q_proj"]}, hira, ("fp32",)),
    "hira_gpt2": Case("HIRA", {"r": 4, "target_modules": GPT2}, hira, ("gpt2",)),
    "hira_nf4": Case("HIRA", Q_DOWN | {"r": 4}, hira, ("nf4_dq",)),
    "hra": Case("HRA", Q_K_DOWN | {"r": 4}, hra, DENSE_AND_NF4),
    "hra_odd": Case("HRA", Q_K_DOWN | {"r": 5, "init_weights": False}, hra, DENSE_AND_NF4),
    "hra_orthonormal": Case("HRA", Q_K_DOWN | {"r": 6, "apply_GS": True}, hra, DENSE_AND_NF4),
    "ia3": Case("IA3", Q_K_DOWN | {"feedforward_modules": ["down_proj"]}, ia3, DENSE_AND_NF4),
    "ia3_regex": Case("IA3", Q_K_DOWN | {"feedforward_modules": r".*(q|down)_proj"}, ia3, DENSE_AND_NF4),
    "ia3_gpt2": Case("IA3", {"target_modules": GPT2, "feedforward_modules": []}, None, ("gpt2",)),
    "ia3_gpt2_mlp": Case(
        "IA3",
        {"target_modules": [*GPT2, "mlp.c_proj"], "feedforward_modules": ["mlp.c_proj", "c_fc"]},
        None,
        ("gpt2",),
    ),
    "ia3_gpt2_attention": Case(
        "IA3",
        {"target_modules": [*GPT2, "attn.c_proj"], "feedforward_modules": ["c_attn", "attn.c_proj"]},
        None,
        ("gpt2",),
    ),
    "ia3_no_bias": Case("IA3", Q_K_DOWN | {"feedforward_modules": []}, ia3, ("bf16_odd",)),
    "ln_tuning": Case("LN_TUNING", {"target_modules": ["input_layernorm", "norm"]}, ln_tuning, ("fp32",)),
    "ln_tuning, a module with children": Case("LN_TUNING", {"target_modules": ["mlp"]}, None, ("fp32",)),
    "ln_tuning, norms with a bias": Case(
        "LN_TUNING", {"target_modules": ["ln_1", "ln_f"]}, ln_tuning, ("gpt2",)
    ),
    "loha": Case("LOHA", Q_K_DOWN | {"r": 4, "alpha": 8}, loha, DENSE_AND_NF4),
    "loha_patterns": Case(
        "LOHA",
        Q_K_DOWN
        | {
            "r": 4,
            "alpha": 8,
            "rank_pattern": {"0.self_attn.q_proj": 3},
            "alpha_pattern": {"q_proj": 5.5},
            "module_dropout": 0.5,
        },
        loha,
        DENSE_AND_NF4,
    ),
    "lokr": Case("LOKR", Q_K_DOWN | {"r": 4, "alpha": 8}, lokr, DENSE_AND_NF4),
    "lokr_both": Case("LOKR", Q_K_DOWN | {"r": 2, "alpha": 3, "decompose_both": True}, lokr, DENSE_AND_NF4),
    "lokr_whole": Case(
        "LOKR", Q_K_DOWN | {"r": 64, "alpha": 100, "alpha_pattern": {"down_proj": 7}}, lokr, DENSE_AND_NF4
    ),
    "lokr_factor": Case(
        "LOKR",
        Q_K_DOWN | {"r": 3, "alpha": 8, "decompose_factor": 4, "rank_dropout": 0.5},
        lokr,
        DENSE_AND_NF4,
    ),
    "lora": Case("LORA", Q_K_DOWN | {"r": 4, "lora_alpha": 9}, lora, DENSE_AND_NF4),
    "miss": Case("MISS", Q_K_DOWN | {"r": 8, "miss_dropout": 0.5}, miss, DENSE_AND_NF4),
    "miss_cut": Case("MISS", Q_K_DOWN | {"r": 7}, miss, DENSE_AND_NF4),
    "miss_mini": Case("MISS", Q_K_DOWN | {"r": 10, "mini_r": 8, "init_weights": "mini"}, miss, DENSE_AND_NF4),
    "miss_bat": Case("MISS", Q_K_DOWN | {"r": 16, "init_weights": "bat"}, bat, DENSE_AND_NF4),
    "oft": Case("OFT", Q_K_DOWN | {"oft_block_size": 8}, oft, DENSE_AND_NF4),
    "oft_terms": Case(
        "OFT",
        Q_K_DOWN | {"oft_block_size": 16, "num_cayley_neumann_terms": 7, "module_dropout": 0.5},
        oft,
        DENSE_AND_NF4,
    ),
    "oft_exact": Case(
        "OFT", Q_K_DOWN | {"oft_block_size": 0, "r": 2, "use_cayley_neumann": False}, oft, DENSE_AND_NF4
    ),
    "oft_shared": Case("OFT", Q_K_DOWN | {"oft_block_size": 32, "block_share": True}, oft, DENSE_AND_NF4),
    "oft_constrained": Case(
        "OFT", Q_K_DOWN | {"oft_block_size": 8, "coft": True, "eps": 0.7}, oft, DENSE_AND_NF4
    ),
    "osf": Case("OSF", Q_DOWN, osf, ("fp32",)),
    "osf, ranks": Case(
        "OSF",
        Q_DOWN | {"effective_rank": 0.25, "rank_pattern": {"down_proj": 40, "0.*q_proj": 64}},
        osf,
        ("fp32",),
    ),
    "pvera": Case("PVERA", Q_DOWN | {"r": 5}, pvera, ("fp32",)),
    "pvera_unsaved": Case("PVERA", Q_DOWN | {"r": 5, "save_projection": False}, None, ("fp32",)),
    "pvera_gpt2": Case("PVERA", {"r": 5, "target_modules": GPT2}, pvera, ("gpt2",)),
    "pvera_nf4": Case("PVERA", Q_DOWN | {"r": 5}, pvera, ("nf4_dq",)),
    "randlora": Case("RANDLORA", Q_DOWN | {"r": 5, "randlora_alpha": 10}, randlora, ("fp32",)),
    "randlora_wide": Case(
        "RANDLORA",
        {"r": 8, "randlora_alpha": 8, "target_modules": ["k_proj", "up_proj"]},
        randlora,
        ("fp32",),
    ),
    "randlora_sparse": Case(
        "RANDLORA", Q_DOWN | {"r": 8, "randlora_alpha": 8, "very_sparse": True}, randlora, ("fp32",)
    ),
    "randlora_gpt2": Case(
        "RANDLORA", {"r": 5, "randlora_alpha": 10, "target_modules": GPT2}, randlora, ("gpt2",)
    ),
    "randlora_nf4": Case("RANDLORA", Q_DOWN | {"r": 5, "randlora_alpha": 10}, randlora, ("nf4_dq",)),
    "road": Case("ROAD", Q_DOWN | {"group_size": 8}, road, ("fp32",)),
    "road_2": Case("ROAD", Q_DOWN | {"variant": "road_2", "group_size": 16}, road, ("fp32",)),
    "road_4": Case("ROAD", Q_DOWN | {"variant": "road_4", "group_size": 32}, road, ("fp32",)),
    "road_no_bias": Case("ROAD", Q_DOWN | {"group_size": 10}, road, ("bf16_odd",)),
    "road_nf4": Case("ROAD", Q_DOWN | {"group_size": 64}, road, ("nf4_dq",)),
    "shira": Case("SHIRA", Q_K_DOWN | {"r": 4, "random_seed": 3}, shira, DENSE_AND_NF4),
    "supertuning": Case("SUPERTUNING", Q_DOWN, supertuning, ("fp32",)),
    "supertuning, smallest, low rank": Case("SUPERTUNING", Q_DOWN | SUPRA, supertuning, DENSE_AND_NF4),
    "tinylora": Case("TINYLORA", {"target_modules": LINEARS, "u": 3}, None, DENSE_AND_NF4),
    "tinylora, some share a vector": Case(
        "TINYLORA", {"target_modules": LINEARS, "r": 3, "weight_tying": 0.75}, None, ("fp32",)
    ),
    "tinylora, all share one": Case(
        "TINYLORA", Q_DOWN | {"weight_tying": 1.0, "u": 1, "r": 1}, None, ("fp32",)
    ),
    "tinylora, an embedding": Case(
        "TINYLORA", {"target_modules": ["embed_tokens", "k_proj"]}, None, ("fp32",)
    ),
    "tinylora, conv1d": Case("TINYLORA", CONV1D | {"r": 5}, None, ("gpt2",)),
    "trainable_tokens": Case(
        "TRAINABLE_TOKENS", {"token_indices": [90, 1, 2, 5]}, trainable_tokens, ("fp32",)
    ),
    "trainable_tokens, tied": Case(
        "TRAINABLE_TOKENS", {"token_indices": [1, 5]}, trainable_tokens, ("fp32_tied",)
    ),
    "trainable_tokens, two": Case("TRAINABLE_TOKENS", {"token_indices": [1, 5]}, trainable_tokens, ("fp32",)),
    "trainable_tokens, two layers": Case(
        "TRAINABLE_TOKENS",
        {"token_indices": [1, 5], "target_modules": ["embed_tokens", "lm_head"]},
        trainable_tokens,
        ("fp32",),
    ),
    "unilora": Case("UNILORA", {"target_modules": LINEARS, "save_indices": True}, unilora, DENSE_AND_NF4),
    "unilora, conv1d": Case(
        "UNILORA", CONV1D | {"save_indices": True, "r": 3, "bias": "unilora_only"}, unilora, ("gpt2",)
    ),
    "vblora": Case(
        "VBLORA", Q_DOWN | {"r": 4, "num_vectors": 20, "vector_length": 16, "topk": 3}, vblora, ("fp32",)
    ),
    "vblora_topk": Case(
        "VBLORA",
        Q_DOWN | {"r": 4, "num_vectors": 300, "vector_length": 16, "save_only_topk_weights": True},
        vblora,
        ("fp32",),
    ),
    "vblora_gpt2": Case(
        "VBLORA", {"r": 3, "num_vectors": 9, "vector_length": 32, "target_modules": GPT2}, vblora, ("gpt2",)
    ),
    "vblora_nf4": Case(
        "VBLORA", Q_DOWN | {"r": 4, "num_vectors": 20, "vector_length": 16}, vblora, ("nf4_dq",)
    ),
    "vera": Case("VERA", Q_DOWN | {"r": 5}, vera, ("fp32",)),
    "vera_unsaved": Case(
        "VERA",
        {"r": 5, "save_projection": False, "projection_prng_key": 3, "target_modules": GPT2},
        None,
        ("gpt2",),
    ),
    "vera_gpt2": Case("VERA", {"r": 5, "target_modules": GPT2}, vera, ("gpt2",)),
    "vera_nf4": Case("VERA", Q_DOWN | {"r": 5}, vera, ("nf4_dq",)),
    "waveft": Case(
        "WAVEFT", Q_DOWN | {"n_frequency": 300, "n_frequency_pattern": {"q_proj": 90}}, waveft, ("fp32",)
    ),
    "waveft_db4": Case(
        "WAVEFT",
        Q_DOWN | {"n_frequency": 300, "wavelet_family": "db4", "proportional_parameters": True},
        waveft,
        ("fp32",),
    ),
    "waveft_sym7": Case(
        "WAVEFT",
        Q_DOWN | {"n_frequency": 300, "wavelet_family": "sym7", "random_loc_seed": 5},
        waveft,
        ("bf16_odd",),
    ),
    "waveft_sparse": Case("WAVEFT", Q_DOWN | {"n_frequency": 300, "use_idwt": False}, waveft, ("fp32",)),
    "waveft_gpt2": Case(
        "WAVEFT", {"n_frequency": 300, "wavelet_family": "db3", "target_modules": GPT2}, waveft, ("gpt2",)
    ),
    "waveft_nf4": Case("WAVEFT", Q_DOWN | {"n_frequency": 300}, waveft, ("nf4_dq",)),
}

# How far from their start the trained tensors are moved, where 0.05 would change too little or too much.
SPREAD = {
    **dict.fromkeys(["BOFT", "C3A", "HRA", "IA3", "LOHA", "LOKR", "MISS", "OFT", "SHIRA"], 0.1),
    **dict.fromkeys(["ADALORA", "TINYLORA", "UNILORA"], 0.1),
    "DELORA": 0.2,
    "FOURIERFT": 1.0,
    "HIRA": 0.3,
    "PVERA": 0.5,
    "RANDLORA": 0.02,
    "VBLORA": 0.5,
    "VERA": 0.5,
    "WAVEFT": 0.02,
}

# Each case on each of its bases.
TRIED = [(name, base) for name, case in CASES.items() for base in case.bases]
