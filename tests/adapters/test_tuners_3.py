"""PEFT types that replace, add or project, each against PEFT's unmerged model and a float64 formula of its
own.

The formulas are written from the papers and PEFT's documentation, on the tensors of the adapter file; they
share no code with the package.
"""

import json

import pytest
import torch
from build import refusal
from models import LINEARS
from oracle import CONV1D as CONV1D_NAME
from oracle import config, decode, read_adapter, read_tensors
from safetensors.torch import save_file
from test_lora import Convolutions, assert_same_answers, rewrite

import lorafuse
from lorafuse.adapters.types import frod
from lorafuse.errors import AdapterError, UsageError

LAYERS = {"target_modules": ["q_proj", "down_proj"]}
CONV1D = {"target_modules": ["c_attn", "c_proj"], "fan_in_fan_out": True}
ADALORA = {"init_r": 6, "target_r": 3, "total_step": 10, "lora_alpha": 9}
# AdaLoRA's own form of a rank: which of the init_r are left, by the name of lora_E. One module has none left.
KEPT = {"model.layers.0.self_attn.q_proj": [0, 1, 4], "model.layers.1.mlp.down_proj": []}
REDUCED = {f"{module}.lora_E.default": [i in kept for i in range(6)] for module, kept in KEPT.items()}
SUPRA = {"sparsity": 0.5, "select_top": False, "r": 3, "lora_alpha": 5}
FROD = {"progressbar": False}

# name → (peft_type, settings, kind of base)
CASES = {
    "ln_tuning": ("LN_TUNING", {"target_modules": ["input_layernorm", "norm"]}, "fp32"),
    "ln_tuning, a module with children": ("LN_TUNING", {"target_modules": ["mlp"]}, "fp32"),
    "ln_tuning, norms with a bias": ("LN_TUNING", {"target_modules": ["ln_1", "ln_f"]}, "gpt2"),
    "adalora": ("ADALORA", LAYERS | ADALORA, "fp32"),
    "adalora, conv1d, biases": ("ADALORA", CONV1D | ADALORA | {"bias": "lora_only"}, "gpt2"),
    "adalora, no alpha": ("ADALORA", LAYERS | ADALORA | {"lora_alpha": 0}, "fp32"),
    "adalora, ranks reduced": ("ADALORA", LAYERS | ADALORA | {"rank_pattern": REDUCED}, "fp32"),
    "deft": ("DEFT", LAYERS | {"r": 3}, "fp32"),
    "deft, qr, alpha": (
        "DEFT",
        LAYERS | {"r": 3, "decomposition_method": "qr", "alpha": 7, "bias": "deft_only"},
        "fp32",
    ),
    "deft, para": ("DEFT", LAYERS | {"r": 3, "para": True}, "fp32"),
    "deft, qr, para, conv1d": ("DEFT", CONV1D | {"r": 3, "decomposition_method": "qr", "para": True}, "gpt2"),
    "deft, conv1d": ("DEFT", CONV1D | {"r": 3, "alpha": 2}, "gpt2"),
    "deft, more rank than outputs": ("DEFT", {"target_modules": ["k_proj"], "r": 40, "alpha": 7}, "fp32"),
    "frod": ("FROD", LAYERS | FROD, "fp32"),
    "frod, no sparse part": ("FROD", {"target_modules": LINEARS, "sparse_rate": 0} | FROD, "fp32"),
    "frod, conv1d": ("FROD", CONV1D | FROD | {"sparse_rate": 0.1}, "gpt2"),
    "osf": ("OSF", LAYERS, "fp32"),
    "osf, ranks": (
        "OSF",
        LAYERS | {"effective_rank": 0.25, "rank_pattern": {"down_proj": 40, "0.*q_proj": 64}},
        "fp32",
    ),
    "supertuning": ("SUPERTUNING", LAYERS, "fp32"),
    "supertuning, smallest, low rank": ("SUPERTUNING", LAYERS | SUPRA, "fp32"),
    "tinylora": ("TINYLORA", {"target_modules": LINEARS, "u": 3}, "fp32"),
    "tinylora, some share a vector": (
        "TINYLORA",
        {"target_modules": LINEARS, "r": 3, "weight_tying": 0.75},
        "fp32",
    ),
    "tinylora, all share one": ("TINYLORA", LAYERS | {"weight_tying": 1.0, "u": 1, "r": 1}, "fp32"),
    "tinylora, an embedding": ("TINYLORA", {"target_modules": ["embed_tokens", "k_proj"]}, "fp32"),
    "tinylora, conv1d": ("TINYLORA", CONV1D | {"r": 5}, "gpt2"),
    "trainable_tokens": ("TRAINABLE_TOKENS", {"token_indices": [90, 1, 2, 5]}, "fp32"),
    "trainable_tokens, two layers": (
        "TRAINABLE_TOKENS",
        {"token_indices": [1, 5], "target_modules": ["embed_tokens", "lm_head"]},
        "fp32",
    ),
    "trainable_tokens, tied": ("TRAINABLE_TOKENS", {"token_indices": [1, 5]}, "fp32_tied"),
    "unilora": ("UNILORA", {"target_modules": LINEARS, "save_indices": True}, "fp32"),
    "unilora, conv1d": ("UNILORA", CONV1D | {"save_indices": True, "r": 3, "bias": "unilora_only"}, "gpt2"),
}


@pytest.fixture
def tuned(base, tmp_path):
    """tuned(peft_type, settings, kind) → an adapter that PEFT wrote for that base (dequantized, where it is
    quantized), every trained value moved at random; `.model` is PEFT's model, not merged."""

    def make(kind, settings, base_kind="fp32"):
        from transformers import AutoConfig, AutoModelForCausalLM

        conf = AutoConfig.from_pretrained(base(base_kind))
        conf.__dict__.pop("quantization_config", None)
        model = AutoModelForCausalLM.from_config(conf, dtype=torch.float32)
        values = {name: value.float() for name, (value, _) in decode(base(base_kind)).items()}
        assert not model.load_state_dict(values, strict=False).unexpected_keys
        model.tie_weights()
        peft = tune(model, kind, {"task_type": "CAUSAL_LM"} | settings)
        for name, mask in (settings.get("rank_pattern") or {}).items() if kind == "ADALORA" else ():
            peft.get_parameter(f"base_model.model.{name}").data[~torch.tensor(mask)] = 0
        path = tmp_path / "adapter"
        peft.save_pretrained(path)
        make.model = peft.eval()
        return path

    return make


def tune(model, kind, settings):
    """PEFT's model of that type, every trained value moved at random."""
    from peft import get_peft_model
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

    torch.manual_seed(1)
    peft = get_peft_model(model, PEFT_TYPE_TO_CONFIG_MAPPING[kind](**settings))
    with torch.no_grad():
        for p in peft.parameters():
            if p.requires_grad:
                p.add_(torch.randn_like(p) * 0.05)
    return peft


def save_plain(model, path):
    """A checkpoint of a module that is no transformers model."""
    path.mkdir()
    save_file(dict(model.state_dict()), path / "model.safetensors")
    (path / "config.json").write_text('{"model_type": "none", "architectures": ["None"], "dtype": "float32"}')


@pytest.mark.parametrize("case", CASES)
def test_merged_answers_as_the_unmerged_model(case, base, tuned, tmp_path):
    kind, settings, base_kind = CASES[case]
    adapter = tuned(kind, settings, base_kind)
    events = []
    receipt = lorafuse.convert(base(base_kind), adapter, tmp_path / "out", on_event=events.append)
    assert not [e for e in events if "would not load keys" in e.get("message", "")], "PEFT wrote them"
    used, ignored = receipt["adapter_tensors"]["used"], receipt["adapter_tensors"]["ignored"]
    assert sorted([*used, *ignored]) == sorted(read_adapter(adapter))
    assert_same_answers(tmp_path / "out", tuned.model)


# One case of each type that has one on linear layers; PEFT's model stands on the dequantized base.
NF4 = ["adalora", "deft", "deft, qr, alpha", "supertuning, smallest, low rank", "tinylora", "unilora"]


@pytest.mark.parametrize("case", NF4)
def test_merged_answers_as_the_unmerged_model_on_nf4(case, base, tuned, tmp_path):
    kind, settings, _ = CASES[case]
    adapter = tuned(kind, settings, "nf4_dq")
    lorafuse.convert(base("nf4_dq"), adapter, tmp_path / "out", dtype="float32")
    assert_same_answers(tmp_path / "out", tuned.model)


def expected_ln_tuning(w, name, tensors, conf):
    return tensors.get(name.rpartition(".")[0] + ".ln_tuning_layers." + name.rpartition(".")[2], w)


def expected_adalora(w, name, tensors, conf):
    a, b, e = (tensors.get(name.removesuffix("weight") + f"lora_{x}") for x in "ABE")
    if a is None:
        return w
    delta = b @ (a * e) * (conf["lora_alpha"] or conf["init_r"]) / (conf["init_r"] + 1e-5)
    return w + (delta.T if is_conv1d(name) else delta)


def expected_deft(w, name, tensors, conf):
    p, r = (tensors.get(name.removesuffix("weight") + f"deft_{x}") for x in "PR")
    if p is None:
        return w
    w = w.T if is_conv1d(name) else w
    q, right = (p, p.clamp(min=0)) if conf["decomposition_method"] == "relu" else [torch.linalg.qr(p)[0]] * 2
    new = w - q @ right.T @ w
    if not conf["para"]:
        new = new + q @ r * (conf["alpha"] / p.shape[1] if conf["alpha"] else 1)
    return new.T if is_conv1d(name) else new


def expected_supertuning(w, name, tensors, conf):
    part = {leaf: tensors.get(name.removesuffix("weight") + f"supertuning_{leaf}") for leaf in SUPER_LEAVES}
    if part["indices"] is None:
        return w
    new = w.clone()
    for i, value in zip(part["indices"].tolist(), part["values"].tolist(), strict=True):
        new[i // w.shape[1], i % w.shape[1]] += value
    return (
        new + part["lora_B.weight"] @ part["lora_A.weight"] * conf["lora_alpha"] / conf["r"]
        if conf["r"]
        else new
    )


def expected_osf(w, name, tensors, conf):
    u, s, v = (tensors.get(name.removesuffix("weight") + f"osf_svd_params.{x}_low") for x in "USV")
    if s is None:
        return w
    high_u, high_s, high_v = (part[..., : min(w.shape) - len(s)] for part in torch.svd(w))
    return (high_u * high_s) @ high_v.T + (u * s) @ v


def expected_frod(w, name, tensors, conf):
    module = name.removesuffix(".weight")
    values = tensors.get(f"{module}.frod_lambda_s_values")
    if values is None:
        return w
    kind = "_".join(module.split(".")[-2:])
    v, places = (tensors[f"base_model.frod_{x}.{kind}"] for x in ("V", "s_indices"))
    s = torch.diag(tensors[f"{module}.frod_lambda_l"])
    for i, j, value in zip(*places.tolist(), values.tolist(), strict=True):
        s[i, j] += value
    u = torch.nn.functional.normalize((w.T if is_conv1d(name) else w) @ torch.linalg.inv(v).T, dim=0)
    new = u.float().double() @ s @ v.T
    return new.T if is_conv1d(name) else new


def expected_unilora(w, name, tensors, conf):
    index = {x: tensors.get(name.removesuffix("weight") + f"unilora_indices_{x}") for x in "AB"}
    if index["A"] is None:
        return w
    theta = tensors["base_model.unilora_theta_d"]
    a, b = (theta[index[x]] * tensors[name.removesuffix("weight") + f"unilora_scales_{x}"] for x in "AB")
    return w + ((b @ a).T if is_conv1d(name) else b @ a)


SUPER_LEAVES = ("indices", "values", "lora_A.weight", "lora_B.weight")


def is_conv1d(name):
    return bool(CONV1D_NAME.search(name))


def expected_trainable_tokens(w, name, tensors, conf):
    rows = tensors.get(name.removesuffix("weight") + "trainable_tokens_delta")
    return w if rows is None else w.index_copy(0, torch.tensor(conf["token_indices"]), rows)


# peft_type → (W in float64, weight name, adapter tensors in float64 by name without the prefix, config) → W'
FORMULAS = {
    "ADALORA": expected_adalora,
    "DEFT": expected_deft,
    "FROD": expected_frod,
    "LN_TUNING": expected_ln_tuning,
    "OSF": expected_osf,
    "SUPERTUNING": expected_supertuning,
    "TRAINABLE_TOKENS": expected_trainable_tokens,
    "UNILORA": expected_unilora,
}
WEIGHED = [case for case in CASES if CASES[case][0] in FORMULAS and "children" not in case]


def wanted(base_dir, adapter, scale):
    """{weight: W + scale · (W' − W) in float64}."""
    conf = config(adapter, "adapter_config.json")
    tensors = {key.removeprefix("base_model.model."): t for key, t in read_adapter(adapter).items()}
    tensors = {key: t.double() if t.is_floating_point() else t for key, t in tensors.items()}
    values = {name: value for name, (value, _) in decode(base_dir).items()}
    formula = FORMULAS[conf["peft_type"]]
    values |= {
        name.replace("base_layer.", ""): t for name, t in tensors.items() if name.endswith("base_layer.bias")
    }
    return {name: w + scale * (formula(w, name, tensors, conf) - w) for name, w in values.items()}


@pytest.mark.parametrize("scale", [1.0, -0.5])
@pytest.mark.parametrize("case", WEIGHED)
def test_weights_are_those_of_the_formula(case, scale, base, tuned, tmp_path):
    """W + scale · (W' − W), within the error of fp32."""
    kind, settings, base_kind = CASES[case]
    adapter = tuned(kind, settings, base_kind)
    lorafuse.convert(base(base_kind), adapter, tmp_path / "out", adapter_scale=scale)
    found, expected = read_tensors(tmp_path / "out"), wanted(base(base_kind), adapter, scale)
    assert found.keys() == expected.keys()
    before = {name: value for name, (value, _) in decode(base(base_kind)).items()}
    changed = 0
    for name, value in expected.items():
        # Each of the few operations behind an element rounds by at most 2⁻²⁴ of the largest term in its sum.
        slack = SLACK.get(kind, 2e-7) * (1 + value.abs().max())
        assert (found[name].double() - value).abs().max() <= slack, name
        changed += not torch.equal(before[name], value)
    assert changed


SLACK = {"OSF": 2e-6}  # an SVD in fp32


def refused(ckpt, adapter, out, where="adapter_model.safetensors"):
    """The text of the refusal after the file's name; nothing is written."""
    with pytest.raises(AdapterError) as caught:
        lorafuse.convert(ckpt, adapter, out / "work" / "out")
    assert not (out / "work").exists()
    start = f"{adapter}/{where}: "
    assert refusal(caught).startswith(start)
    return refusal(caught).removeprefix(start)


def change(adapter, **tensors):
    """Rewrite an adapter file: a new tensor, or None to drop one, by the leaf in q_proj of the first layer or
    the whole key."""
    stored = read_adapter(adapter)
    for leaf, tensor in tensors.items():
        key = leaf if leaf.startswith("base_model.") else f"base_model.model.{Q}.{leaf}"
        stored.pop(key, None)
        if tensor is not None:
            stored[key] = tensor
    save_file(stored, adapter / "adapter_model.safetensors")


Q = "model.layers.0.self_attn.q_proj"
EMBED = "base_model.model.model.embed_tokens.trainable_tokens_delta"
ANOTHER_BASE = "is the adapter for another base?"


def test_ln_tuning_refuses_another_shape(base, tuned, tmp_path):
    adapter = tuned("LN_TUNING", {"target_modules": ["norm"]})
    key = "base_model.model.model.norm.ln_tuning_layers.weight"
    change(adapter, **{key: torch.zeros(65)})
    assert (
        refused(base("fp32"), adapter, tmp_path)
        == f"{key} is [65], but model.norm.weight is [64]; {ANOTHER_BASE}"
    )


TOKENS = {
    "another width": (
        {},
        torch.zeros(2, 72),
        f"{EMBED} [2, 72] does not fit model.embed_tokens.weight [96, 64]; {ANOTHER_BASE}",
    ),
    "another count": (
        {},
        torch.zeros(3, 64),
        f"{EMBED} is F32 [3, 64], expected one row for each of the 2 in token_indices.",
    ),
    "integers": (
        {},
        torch.zeros(2, 64, dtype=torch.int32),
        f"{EMBED} has the dtype I32; expected one of F32, F16, BF16.",
    ),
    "no list": ({"token_indices": "1, 5"}, None, "token_indices is 1, 5, expected a list of integers."),
    "twice": ({"token_indices": [5, 5]}, None, "token_indices has 5 twice; which row is meant?"),
    "outside": (
        {"token_indices": [1, 96]},
        None,
        "token_indices has 96, but model.embed_tokens.weight has 96 rows; is the adapter for another base, "
        "or was the vocabulary resized without saving the embedding?",
    ),
}


@pytest.mark.parametrize("case", TOKENS)
def test_trainable_tokens_refuses_what_does_not_fit(case, base, tuned, tmp_path):
    adapter = tuned("TRAINABLE_TOKENS", {"token_indices": [1, 5]})
    fields, tensor, message = TOKENS[case]
    rewrite(adapter, **fields)
    if tensor is not None:
        change(adapter, **{EMBED: tensor})
    where = "adapter_config.json" if tensor is None else "adapter_model.safetensors"
    assert refused(base("fp32"), adapter, tmp_path, where) == message


Q_A, Q_B, Q_E = (f"base_model.model.{Q}.lora_{x}" for x in "ABE")
Q_P, Q_R = (f"base_model.model.{Q}.deft_{x}" for x in "PR")
Q_U, Q_S, Q_V = (f"base_model.model.{Q}.osf_svd_params.{x}_low" for x in "USV")
INDICES, VALUES = (f"base_model.model.{Q}.supertuning_{x}" for x in ("indices", "values"))
SUPER_A, SUPER_B = (f"base_model.model.{Q}.supertuning_lora_{x}.weight" for x in "AB")
TINY_A, TINY_B, TINY_P = (f"base_model.model.{Q}.tinylora_{x}" for x in "ABP")
FROD_SHARED, FROD_L = "base_model.frod_", f"base_model.model.{Q}.frod_lambda_l"
THETA, UNI = "base_model.unilora_theta_d", f"base_model.model.{Q}.unilora_"
WEIGHT = f"{Q}.weight [64, 64]; {ANOTHER_BASE}"
# name of the case → (case above, tensors of q_proj of the first layer, None to drop one, the refusal)
MISFITS = {
    "adalora, no E": ("adalora", {"lora_E": None}, f"{Q} has lora_A but no lora_E."),
    "adalora, two ranks": (
        "adalora",
        {"lora_A": torch.zeros(5, 64)},
        f"{Q_A} is F32 [5, 64] and {Q_B} is F32 [64, 6]; they are not the two factors of one update.",
    ),
    "adalora, another E": (
        "adalora",
        {"lora_E": torch.zeros(6)},
        f"{Q_E} is F32 [6], expected [6, 1] from {Q_A}.",
    ),
    "adalora, another base": (
        "adalora",
        {"lora_A": torch.zeros(6, 72)},
        f"{Q_A} [6, 72] and {Q_B} [64, 6] do not fit {WEIGHT}",
    ),
    "adalora, integers": (
        "adalora",
        {"lora_B": torch.zeros(64, 6, dtype=torch.int8)},
        f"{Q_B} has the dtype I8; expected one of F32, F16, BF16.",
    ),
    "adalora, a stranger": (
        "adalora",
        {"lora_embedding_A": torch.zeros(6, 96)},
        f"base_model.model.{Q}.lora_embedding_A is of a kind that is not supported.",
    ),
    "deft, no R": ("deft", {"deft_R": None}, f"{Q} has deft_P but no deft_R."),
    "deft, another R": (
        "deft",
        {"deft_R": torch.zeros(4, 64)},
        f"{Q_R} is F32 [4, 64], expected [3, in] from {Q_P}.",
    ),
    "deft, no matrix": ("deft", {"deft_P": torch.zeros(64)}, f"{Q_P} is F32 [64], expected [out, r]."),
    "deft, another base": (
        "deft",
        {"deft_P": torch.zeros(72, 3)},
        f"{Q_P} [72, 3] and {Q_R} [3, 64] do not fit {WEIGHT}",
    ),
    "deft, para, another base": (
        "deft, para",
        {"deft_P": torch.zeros(72, 3)},
        f"{Q_P} [72, 3] does not fit {WEIGHT}",
    ),
    "frod, no values": (
        "frod",
        {"frod_lambda_s_values": None},
        f"{Q} has frod_lambda_l but no frod_lambda_s_values.",
    ),
    "frod, no projection": (
        "frod",
        {f"{FROD_SHARED}V.self_attn_q_proj": None},
        f"has no frod_V.self_attn_q_proj for {Q} (save_projection was off); PEFT would make it from all "
        "layers of that kind together.",
    ),
    "frod, another projection": (
        "frod",
        {f"{FROD_SHARED}V.self_attn_q_proj": torch.eye(63)},
        f"{FROD_SHARED}V.self_attn_q_proj is F32 [63, 63], expected [64, 64] from {FROD_L}.",
    ),
    "frod, outside": (
        "frod",
        {f"{FROD_SHARED}s_indices.self_attn_q_proj": torch.full((2, 40), 64)},
        f"{FROD_SHARED}s_indices.self_attn_q_proj has the position 64, outside of the 64 inputs of {FROD_L}.",
    ),
    "frod, another size": (
        "frod",
        {f"{FROD_SHARED}s_size.self_attn_q_proj": torch.tensor([64, 96])},
        f"{FROD_SHARED}s_size.self_attn_q_proj is not 64 × 64, which follows from {FROD_L}.",
    ),
    "osf, no S": (
        "osf",
        {"osf_svd_params.S_low": None},
        f"{Q} has osf_svd_params.U_low but no osf_svd_params.S_low.",
    ),
    "osf, no vector": (
        "osf",
        {"osf_svd_params.S_low": torch.zeros(32, 1)},
        f"{Q_S} is F32 [32, 1], expected [r].",
    ),
    "osf, two ranks": (
        "osf",
        {"osf_svd_params.V_low": torch.zeros(31, 64)},
        f"{Q_V} is F32 [31, 64], expected [32, in] from {Q_S}.",
    ),
    "osf, another base": (
        "osf",
        {"osf_svd_params.V_low": torch.zeros(32, 72)},
        f"{Q_U} [64, 32] and {Q_S} [32] and {Q_V} [32, 72] do not fit {WEIGHT}",
    ),
    "tinylora, no P": (
        "tinylora",
        {"tinylora_P": None},
        f"{Q} has tinylora_A but no tinylora_P (save_projection was off), so it is not known which vector "
        "belongs to it.",
    ),
    "tinylora, another P": (
        "tinylora",
        {"tinylora_P": torch.ones(3, 2, 2)},
        f"{TINY_P} is not what projection_seed gives, so it is not known which vector belongs to {Q}.",
    ),
    "tinylora, no square": (
        "tinylora",
        {"tinylora_P": torch.ones(3, 2)},
        f"{TINY_P} is F32 [3, 2], expected [u, rank, rank].",
    ),
    "tinylora, no vectors": (
        "tinylora, all share one",
        {"base_model.tinylora_v.0": None},
        "has no tinylora_v.",
    ),
    "tinylora, a vector less": (
        "tinylora",
        {"base_model.tinylora_v.0": None},
        "has no tinylora_v.0, the vector of model.layers.0.self_attn.q_proj.",
    ),
    "tinylora, another vector": (
        "tinylora, all share one",
        {"base_model.tinylora_v.0": torch.ones(2)},
        "base_model.tinylora_v.0 is F32 [2], expected [1] from "
        "base_model.model.model.layers.0.mlp.down_proj.tinylora_P.",
    ),
    "tinylora, another rank": (
        "tinylora",
        {"tinylora_A": torch.ones(3, 64)},
        f"{TINY_A} is F32 [3, 64], expected [2, in] from {TINY_P}.",
    ),
    "tinylora, another base": (
        "tinylora",
        {"tinylora_A": torch.ones(2, 72)},
        f"{TINY_A} [2, 72] and {TINY_B} [64, 2] do not fit {WEIGHT}",
    ),
    "unilora, no vector": ("unilora", {THETA: None}, "has no unilora_theta_d."),
    "unilora, a matrix": (
        "unilora",
        {THETA: torch.ones(16, 16)},
        f"{THETA} is F32 [16, 16], expected [theta_d].",
    ),
    "unilora, a short vector": (
        "unilora",
        {
            THETA: torch.ones(9),
        },
        "base_model.model.model.layers.0.mlp.down_proj.unilora_indices_A has the position 255, outside of "
        f"the 9 elements of {THETA}.",
    ),
    "unilora, no scales": (
        "unilora",
        {"unilora_scales_B": None},
        f"{Q} has unilora_indices_A but no unilora_scales_B.",
    ),
    "unilora, other scales": (
        "unilora",
        {"unilora_scales_B": torch.ones(64, 5)},
        f"{UNI}scales_B is F32 [64, 5], expected [64, 4] from {UNI}indices_B and {UNI}indices_A.",
    ),
    "unilora, two ranks": (
        "unilora",
        {"unilora_indices_B": torch.ones(64, 5, dtype=torch.int64)},
        f"{UNI}indices_B is I64 [64, 5], expected [out, 4] from {UNI}indices_A.",
    ),
    "unilora, another base": (
        "unilora",
        {"unilora_indices_A": torch.ones(4, 72, dtype=torch.int64), "unilora_scales_A": torch.ones(4, 72)},
        f"{UNI}indices_A [4, 72] and {UNI}indices_B [64, 4] do not fit {WEIGHT}",
    ),
    "supertuning, no indices": (
        "supertuning",
        {"supertuning_indices": None},
        f"{Q} has supertuning_values but no supertuning_indices (save_precomputed_indices was off), so it is "
        "not known which elements they belong to.",
    ),
    "supertuning, no values": (
        "supertuning",
        {"supertuning_values": None},
        f"{Q} has supertuning_indices but no supertuning_values.",
    ),
    "supertuning, another count": (
        "supertuning",
        {"supertuning_values": torch.zeros(3)},
        f"{VALUES} is F32 [3], expected [40] from {INDICES}.",
    ),
    "supertuning, floats": (
        "supertuning",
        {"supertuning_indices": torch.zeros(40)},
        f"{INDICES} has the dtype F32; expected one of U8, I8, I16, I32, I64.",
    ),
    "supertuning, outside": (
        "supertuning",
        {"supertuning_indices": torch.arange(40) + 4060},
        f"{INDICES} has the position 4099, outside of the 4096 elements of {Q}.weight; {ANOTHER_BASE}",
    ),
    "supertuning, another base": (
        "supertuning, smallest, low rank",
        {"supertuning_lora_A.weight": torch.zeros(3, 72)},
        f"{SUPER_A} [3, 72] and {SUPER_B} [64, 3] do not fit {WEIGHT}",
    ),
}


@pytest.mark.parametrize("case", MISFITS)
def test_tensors_that_do_not_fit_are_refused(case, base, tuned, tmp_path):
    of, tensors, message = MISFITS[case]
    kind, settings, base_kind = CASES[of]
    adapter = tuned(kind, settings, base_kind)
    change(adapter, **tensors)
    assert refused(base(base_kind), adapter, tmp_path) == message


FIELDS = {
    "init_r": ("adalora", -2, "init_r is -2, expected a rank."),
    "lora_alpha": ("adalora", "9", "lora_alpha is 9, expected a number."),
    "target_parameters": (
        "adalora",
        ["experts"],
        "target_parameters is set, which is not supported: AdaLoRA has no form for parameters that are not a "
        "layer's.",
    ),
    "decomposition_method": (
        "deft",
        "svd",
        "decomposition_method is svd, which is not supported; known are relu, qr.",
    ),
    "alpha": ("deft", "nan", "alpha is nan, expected a number."),
}


@pytest.mark.parametrize("field", FIELDS)
def test_config_fields_that_are_not_understood_are_refused(field, base, tuned, tmp_path):
    of, value, message = FIELDS[field]
    kind, settings, base_kind = CASES[of]
    adapter = tuned(kind, settings, base_kind)
    rewrite(adapter, **{field: value})
    assert refused(base(base_kind), adapter, tmp_path, "adapter_config.json") == message


def test_a_module_without_rank_is_ignored_with_the_reason(base, tuned, tmp_path):
    adapter = tuned(*CASES["adalora, ranks reduced"])
    receipt = lorafuse.convert(base("fp32"), adapter, tmp_path / "out")
    name = "model.layers.1.mlp.down_proj"
    assert receipt["tensors"][f"{name}.weight"]["action"] == "copied"
    assert receipt["adapter_tensors"]["ignored"] == {
        f"base_model.model.{name}.lora_{x}": "the rank of the module was reduced to 0" for x in "ABE"
    }
    assert receipt["tensors"][f"{Q}.weight"]["rank"] == 3


def test_unilora_without_indices_is_refused(base, tuned, tmp_path):
    adapter = tuned("UNILORA", LAYERS)
    assert refused(base("fp32"), adapter, tmp_path) == (
        "has no unilora_indices_A (save_indices was off), so it is not known which elements of "
        "unilora_theta_d belong to which module."
    )


def test_frod_on_half_precision_uses_the_u_that_was_trained(base, tmp_path):
    """U was rounded to the dtype of the base before λ was trained on it."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(base("bf16"), dtype=torch.bfloat16)
    peft = tune(model, "FROD", LAYERS | FROD | {"task_type": "CAUSAL_LM"})
    peft.save_pretrained(tmp_path / "adapter")
    lorafuse.convert(base("bf16"), tmp_path / "adapter", tmp_path / "out", dtype="float32")
    layer = peft.get_submodule(f"base_model.model.{Q}")
    u, v, s, lambdas = layer._get_frod_tensors("default", device="cpu", dtype=torch.float64)
    found = read_tensors(tmp_path / "out")[f"{Q}.weight"].double()
    assert (found - u @ (s.to_dense() + lambdas.diag()) @ v.T).abs().max() < 2e-6
    assert layer.frod_U["default"].dtype == torch.bfloat16


@pytest.mark.parametrize(
    "module", ["lm_head", "layer.0.attention.output.dense", "layers.3.fc", "a.b.q_proj", "3.output.dense"]
)
def test_frod_finds_the_kind_of_a_layer_as_peft_does(module):
    from peft.tuners.frod.model import _category_from_key

    assert frod._category(module) == _category_from_key(module)


def test_a_module_that_osf_does_not_train_is_ignored_with_the_reason(base, tuned, tmp_path):
    receipt = lorafuse.convert(base("fp32"), tuned(*CASES["osf, ranks"]), tmp_path / "out")
    assert receipt["adapter_tensors"]["ignored"] == dict.fromkeys(
        (Q_U, Q_S, Q_V), "no singular value of the module is trained"
    )


@pytest.mark.parametrize("kind", ["bf16", "nf4_dq"])
def test_osf_that_changes_nothing_gives_the_base(kind, base, tmp_path):
    """In half precision too, where the parts of the SVD were rounded before they were trained."""
    from peft import OSFConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(base("bf16"), dtype=torch.bfloat16)
    model.load_state_dict({name: value.bfloat16() for name, (value, _) in decode(base(kind)).items()})
    get_peft_model(model, OSFConfig(task_type="CAUSAL_LM", **LAYERS)).save_pretrained(tmp_path / "adapter")
    lorafuse.convert(base(kind), tmp_path / "adapter", tmp_path / "out")
    for name, tensor in read_tensors(tmp_path / "out").items():
        assert torch.equal(
            tensor, model.state_dict().get(name.replace("proj.", "proj.base_layer."), tensor)
        ), name


def test_a_weight_that_does_not_fit_the_limit_with_its_svd_is_named(base, tuned, tmp_path):
    model = Large()
    save_plain(model, tmp_path / "ckpt")
    adapter = tmp_path / "adapter"
    tune(model, "OSF", {"target_modules": ["one"]}).save_pretrained(adapter)
    with pytest.raises(
        UsageError, match=r"^A memory limit of 50 MB is too small: \d+ MB .* most of it for one\.weight\."
    ):
        lorafuse.convert(tmp_path / "ckpt", adapter, tmp_path / "work/out", memory_limit="50MB")
    assert not (tmp_path / "work").exists()


class Large(torch.nn.Module):
    """Weights of several tiles."""

    def __init__(self):
        super().__init__()
        self.one, self.words = torch.nn.Linear(700, 600), torch.nn.Embedding(900, 320)


# name → (PEFT type, settings, model): PEFT's own merge in fp32 is the reference.
WITHOUT_TRANSFORMERS = {
    "adalora, convolutions": ("ADALORA", {"target_modules": ["two", "point"]} | ADALORA, Convolutions),
    "adalora": ("ADALORA", {"target_modules": ["one"]} | ADALORA, Large),
    "deft": ("DEFT", {"target_modules": ["one"]}, Large),
    "deft, qr": ("DEFT", {"target_modules": ["one"], "decomposition_method": "qr"}, Large),
    "frod": ("FROD", {"target_modules": ["one"]} | FROD, Large),
    "osf": ("OSF", {"target_modules": ["one"]}, Large),
    "supertuning": ("SUPERTUNING", {"target_modules": ["one"], "sparsity": 0.9, "r": 2}, Large),
    "tinylora": ("TINYLORA", {"target_modules": ["one", "words"]}, Large),
    "unilora": ("UNILORA", {"target_modules": ["one"], "save_indices": True}, Large),
    "trainable_tokens": (
        "TRAINABLE_TOKENS",
        {"target_modules": ["words"], "token_indices": [899, *range(810, 830), 0]},
        Large,
    ),
    "ln_tuning": ("LN_TUNING", {"target_modules": ["one", "words"]}, Large),
}


@pytest.mark.parametrize("case", WITHOUT_TRANSFORMERS)
def test_merges_as_peft_does_beyond_one_tile(case, tmp_path):
    kind, settings, make = WITHOUT_TRANSFORMERS[case]
    torch.manual_seed(0)
    model = make()
    save_plain(model, tmp_path / "ckpt")
    peft = tune(model, kind, settings)
    peft.save_pretrained(tmp_path / "adapter", save_embedding_layers=False)
    lorafuse.convert(tmp_path / "ckpt", tmp_path / "adapter", tmp_path / "out", memory_limit="300MB")
    expected, found = peft.merge_and_unload().state_dict(), read_tensors(tmp_path / "out")
    assert expected.keys() == found.keys()
    for name, tensor in expected.items():
        assert (found[name] - tensor).abs().max() <= 2e-6 * (1 + tensor.abs().max()), name


def test_replaced_rows_are_bit_exact_and_the_pair_stays_tied(base, tuned, tmp_path):
    """A row is copied, not added to; PEFT saves it for both sides of a tied pair, which stays one tensor."""
    adapter = tuned("TRAINABLE_TOKENS", {"token_indices": [90, 1, 2]}, "bf16_tied")
    receipt = lorafuse.convert(base("bf16_tied"), adapter, tmp_path / "out")
    found, stored = read_tensors(tmp_path / "out"), read_adapter(adapter)
    embed = found["model.embed_tokens.weight"]
    assert torch.equal(embed[torch.tensor([90, 1, 2])], stored[EMBED].bfloat16())
    assert (
        "lm_head.weight" not in found
        and json.loads((tmp_path / "out/config.json").read_text())["tie_word_embeddings"]
    )
    assert receipt["adapter_tensors"]["ignored"] == {
        "base_model.model.lm_head.trainable_tokens_delta": "equal to the update of "
        "model.embed_tokens.weight, to which it is tied"
    }
