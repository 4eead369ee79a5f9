"""PEFT types beside LoRA, each against PEFT's unmerged forward pass and against a float64 weight made from
the file's tensors."""

import re

import peft
import pytest
import torch
from build import refusal
from models import QUANTIZED
from oracle import CONV1D, config, decode, read_adapter, read_tensors
from peft.tuners.waveft.constants import WAVELET_REDUCTIONS
from peft.tuners.waveft.wavelet import Wavelet
from peft.tuners.waveft.waverec2d import waverec2d
from safetensors.torch import save_file
from test_lora import Convolutions, assert_same_answers, rewrite

import lorafuse
from lorafuse.arithmetic.seeded import _inside_out, first_of_randperm
from lorafuse.arithmetic.wavelets import FAMILIES, reconstruction_filters
from lorafuse.errors import AdapterError
from lorafuse.patches.lowrank import LowRank

GPT2 = ["c_attn", "c_proj", "c_fc"]
# case → (config class, base, settings beside the target modules, which are q_proj and down_proj unless given); a case is named
# after its type.
CASES = {
    "beft": ("BeftConfig", "fp32", {}),
    "beft_nf4": ("BeftConfig", "nf4_dq", {}),
    "delora": ("DeloraConfig", "fp32", {"r": 4, "rank_pattern": {"q_proj": 3}}),
    "delora_nf4": ("DeloraConfig", "nf4_dq", {"r": 4}),
    "fourierft": (
        "FourierFTConfig",
        "fp32",
        {"n_frequency": 50, "scaling": 100.0, "n_frequency_pattern": {"q_proj": 70}},
    ),
    "fourierft_dense": ("FourierFTConfig", "fp32", {"n_frequency": 4000, "random_loc_seed": 5}),
    "fourierft_gpt2": (
        "FourierFTConfig",
        "gpt2",
        {"n_frequency": 60, "scaling": 100.0, "target_modules": GPT2},
    ),
    "fourierft_nf4": ("FourierFTConfig", "nf4_dq", {"n_frequency": 50}),
    "glora": ("GloraConfig", "fp32", {"r": 3}),
    "glora_vectors": (
        "GloraConfig",
        "fp32",
        {"config_A_B": "vector", "config_C": "vector", "config_D_E": "vector"},
    ),
    "glora_constants": (
        "GloraConfig",
        "fp32",
        {"config_A_B": "constant", "config_C": "none", "config_D_E": "constant"},
    ),
    "glora_off": ("GloraConfig", "fp32", {"config_A_B": "none", "config_C": "vector", "config_D_E": "none"}),
    "glora_no_bias": ("GloraConfig", "bf16_odd", {"r": 3}),
    "glora_nf4": ("GloraConfig", "nf4_dq", {"r": 3}),
    "gralora": ("GraloraConfig", "fp32", {"r": 4, "gralora_k": 2, "alpha": 6}),
    "gralora_hybrid": ("GraloraConfig", "fp32", {"r": 8, "gralora_k": 4, "hybrid_r": 3}),
    "gralora_gpt2": (
        "GraloraConfig",
        "gpt2",
        {"r": 4, "gralora_k": 2, "hybrid_r": 2, "target_modules": GPT2},
    ),
    "gralora_nf4": ("GraloraConfig", "nf4_dq", {"r": 4, "gralora_k": 2}),
    "hira": ("HiraConfig", "fp32", {"r": 4, "rank_pattern": {"q_proj": 3}}),
    "hira_embedding": ("HiraConfig", "fp32", {"r": 4, "target_modules": ["embed_tokens", "q_proj"]}),
    "hira_gpt2": ("HiraConfig", "gpt2", {"r": 4, "target_modules": GPT2}),
    "hira_nf4": ("HiraConfig", "nf4_dq", {"r": 4}),
    "pvera": ("PveraConfig", "fp32", {"r": 5}),
    "pvera_unsaved": ("PveraConfig", "fp32", {"r": 5, "save_projection": False}),
    "pvera_gpt2": ("PveraConfig", "gpt2", {"r": 5, "target_modules": GPT2}),
    "pvera_nf4": ("PveraConfig", "nf4_dq", {"r": 5}),
    "randlora": ("RandLoraConfig", "fp32", {"r": 5, "randlora_alpha": 10}),
    "randlora_wide": (
        "RandLoraConfig",
        "fp32",
        {"r": 8, "randlora_alpha": 8, "target_modules": ["k_proj", "up_proj"]},
    ),
    "randlora_sparse": ("RandLoraConfig", "fp32", {"r": 8, "randlora_alpha": 8, "very_sparse": True}),
    "randlora_gpt2": ("RandLoraConfig", "gpt2", {"r": 5, "randlora_alpha": 10, "target_modules": GPT2}),
    "randlora_nf4": ("RandLoraConfig", "nf4_dq", {"r": 5, "randlora_alpha": 10}),
    "road": ("RoadConfig", "fp32", {"group_size": 8}),
    "road_2": ("RoadConfig", "fp32", {"variant": "road_2", "group_size": 16}),
    "road_4": ("RoadConfig", "fp32", {"variant": "road_4", "group_size": 32}),
    "road_no_bias": ("RoadConfig", "bf16_odd", {"group_size": 10}),
    "road_nf4": ("RoadConfig", "nf4_dq", {"group_size": 64}),
    "vblora": ("VBLoRAConfig", "fp32", {"r": 4, "num_vectors": 20, "vector_length": 16, "topk": 3}),
    "vblora_topk": (
        "VBLoRAConfig",
        "fp32",
        {"r": 4, "num_vectors": 300, "vector_length": 16, "save_only_topk_weights": True},
    ),
    "vblora_gpt2": (
        "VBLoRAConfig",
        "gpt2",
        {"r": 3, "num_vectors": 9, "vector_length": 32, "target_modules": GPT2},
    ),
    "vblora_nf4": ("VBLoRAConfig", "nf4_dq", {"r": 4, "num_vectors": 20, "vector_length": 16}),
    "vera": ("VeraConfig", "fp32", {"r": 5}),
    "vera_unsaved": (
        "VeraConfig",
        "gpt2",
        {"r": 5, "save_projection": False, "projection_prng_key": 3, "target_modules": GPT2},
    ),
    "vera_gpt2": ("VeraConfig", "gpt2", {"r": 5, "target_modules": GPT2}),
    "vera_nf4": ("VeraConfig", "nf4_dq", {"r": 5}),
    "waveft": ("WaveFTConfig", "fp32", {"n_frequency": 300, "n_frequency_pattern": {"q_proj": 90}}),
    "waveft_db4": (
        "WaveFTConfig",
        "fp32",
        {"n_frequency": 300, "wavelet_family": "db4", "proportional_parameters": True},
    ),
    "waveft_sym7": (
        "WaveFTConfig",
        "bf16_odd",
        {"n_frequency": 300, "wavelet_family": "sym7", "random_loc_seed": 5},
    ),
    "waveft_sparse": ("WaveFTConfig", "fp32", {"n_frequency": 300, "use_idwt": False}),
    "waveft_gpt2": (
        "WaveFTConfig",
        "gpt2",
        {"n_frequency": 300, "wavelet_family": "db3", "target_modules": GPT2},
    ),
    "waveft_nf4": ("WaveFTConfig", "nf4_dq", {"n_frequency": 300}),
}
# How far from their start the trained tensors are moved, where 0.05 would change too little or too much.
SPREAD = {
    "delora": 0.2,
    "fourierft": 1.0,
    "randlora": 0.02,
    "vblora": 0.5,
    "waveft": 0.02,
    "vera": 0.5,
    "pvera": 0.5,
    "hira": 0.3,
}


def kind_of(case):
    return case.partition("_")[0]


KINDS = sorted({kind_of(case) for case in CASES})


@pytest.fixture
def tuned(base, tmp_path):
    """tuned(case) → (base, adapter, PEFT's model of the dense twin or of the decoded weights, unmerged)."""

    def make(case, **more):
        from transformers import AutoModelForCausalLM

        name, key, settings = CASES[case]
        ckpt = base(key)
        model = AutoModelForCausalLM.from_pretrained(
            base(QUANTIZED[key][0] if key in QUANTIZED else key), dtype=torch.float32
        )
        if key in QUANTIZED:
            model.load_state_dict({k: value.float() for k, (value, _) in decode(ckpt).items()}, strict=False)
        torch.manual_seed(1)
        defaults = {"target_modules": ["q_proj", "down_proj"], "task_type": "CAUSAL_LM"}
        model = peft.get_peft_model(model, getattr(peft, name)(**defaults | settings | more))
        with torch.no_grad():
            for p in model.parameters():
                if p.requires_grad:
                    p.add_(torch.randn_like(p) * SPREAD.get(kind_of(case), 0.05))
        model.save_pretrained(tmp_path / "adapter")
        return ckpt, tmp_path / "adapter", model.eval()

    return make


@pytest.mark.parametrize("case", CASES)
def test_the_merged_model_answers_as_the_unmerged_one(case, tuned, tmp_path, monkeypatch):
    monkeypatch.setattr("lorafuse.adapters.reading.vera_vectors.READ_NUMEL", 640)
    ckpt, adapter, model = tuned(case)
    receipt = lorafuse.convert(ckpt, adapter, tmp_path / "out", dtype="float32")
    assert_same_answers(tmp_path / "out", model)
    used, ignored = receipt["adapter_tensors"]["used"], receipt["adapter_tensors"]["ignored"]
    assert sorted([*used, *ignored]) == sorted(read_adapter(adapter))
    with model.disable_adapter(), pytest.raises(AssertionError):
        assert_same_answers(tmp_path / "out", model, tolerance=1e-3)


# Without the projections, which are not in the file, the answers alone are compared with PEFT's.
@pytest.mark.parametrize("scale", [1.0, 0.5])
@pytest.mark.parametrize("case", [case for case in CASES if not case.endswith("_unsaved")])
def test_merged_weights_are_those_of_float64(case, scale, tuned, tmp_path, monkeypatch):
    """W + scale · (W' − W), in tiles of a few rows."""
    monkeypatch.setattr("lorafuse.planning.plan.TILE_NUMEL", 640)
    monkeypatch.setattr("lorafuse.patches.lowrank.RIGHT_CHUNK_NUMEL", 640)
    ckpt, adapter, _ = tuned(case)
    receipt = lorafuse.convert(ckpt, adapter, tmp_path / "out", dtype="float32", adapter_scale=scale)
    found, wanted = read_tensors(tmp_path / "out"), float64_truth(ckpt, adapter, scale)
    assert {name for name, entry in receipt["tensors"].items() if entry["action"] == "merged"} == {*wanted}
    for name, tensor in wanted.items():
        assert (found[name].double() - tensor).abs().max() <= 1e-6 * tensor.abs().max(), name


def float64_truth(ckpt, adapter, scale):
    conf, tensors = config(adapter, "adapter_config.json"), read_adapter(adapter)
    weights = {name: value for name, (value, _) in decode(ckpt).items()}
    kind = conf["peft_type"]
    marker = re.compile(rf"base_model\.(?:model\.(.+)\.)?({kind.lower()}_.+)")
    modules = {}
    for key, tensor in tensors.items():
        if match := marker.fullmatch(key):
            modules.setdefault(match[1], {})[match[2].removeprefix(kind.lower() + "_")] = tensor.double()
    shared, merged = modules.pop(None, {}), {}
    for module, t in modules.items():
        W, b = weights[f"{module}.weight"], weights.get(f"{module}.bias")
        turned = config(ckpt)["model_type"] == "gpt2" and CONV1D.search(f"{module}.weight")
        new, new_b = TRUTHS[kind](W.T if turned else W, b, t, conf, shared)
        for name, old, updated in (("weight", W, new.T if turned else new), ("bias", b, new_b)):
            if old is not None and updated is not old and not torch.equal(old, updated):
                merged[f"{module}.{name}"] = old + scale * (updated - old)
    return merged


def beft(W, b, t, c, g):
    return W, b + t["bias"][0]


def delora(W, b, t, c, g):
    A, B = t["A"], t["B"]
    diagonal = torch.diag(t["lambda"] / len(A) / (A.norm(dim=1) * B.norm(dim=0)))
    return W + B @ diagonal @ A * t["w_norm"], b


def fourierft(W, b, t, c, g):
    return W + torch.fft.ifft2(scattered(W.shape, t["spectrum"], c)).real * c["scaling"], b


def scattered(shape, spectrum, c):
    dense = torch.zeros(shape[0] * shape[1], dtype=torch.float64)
    dense[
        torch.randperm(len(dense), generator=torch.Generator().manual_seed(c["random_loc_seed"]))[
            : len(spectrum)
        ]
    ] = spectrum
    return dense.view(shape)


def glora(W, b, t, c, g):
    def path(name, shape):
        if f"{name}.Xd" in t:
            return t[f"{name}.Xd"] @ t[f"{name}.Xu"]
        return t.get(f"{name}.X", t.get(f"{name}.zeros", torch.zeros(shape)))

    new = W + W * path("A", W.shape) + path("B", W.shape)
    if b is None:
        return new, None
    return new, b + b * path("D", b.shape) + path("E", b.shape) + (W @ path("C", (W.shape[1], 1)))[:, 0]


def gralora(W, b, t, c, g):
    A, B, k, delta = t["A"], t["B"], c["gralora_k"], torch.zeros_like(W)
    q, rows, cols = A.shape[2] // k, B.shape[2], A.shape[1]
    for m in range(k):
        for n in range(k):
            block = (A[n][:, m * q : (m + 1) * q] @ B[m][n * q : (n + 1) * q]).T
            delta[m * rows : (m + 1) * rows, n * cols : (n + 1) * cols] = block
    if c["hybrid_r"]:
        delta += t["B_general.weight"] @ t["A_general.weight"]
    return W + delta * c["alpha"] / (A.shape[2] + c["hybrid_r"]), b


def hira(W, b, t, c, g):
    factor = t["B"] @ t["A"] if "B" in t else (t["embedding_B"] @ t["embedding_A"]).T
    return W + W * factor, b


def vera(W, b, t, c, g):
    A, B = g["A"][:, : W.shape[1]], g["B"][: W.shape[0]]
    return W + (t["lambda_b"][:, None] * B) @ (t["lambda_d"][: B.shape[1], None] * A[: B.shape[1]]), b


def randlora(W, b, t, c, g):
    short, long = sorted(W.shape)
    n = t["lambda"].shape[1]
    A, B = g["A"][:, :, :short], g["B"][:long, :n]
    scaled = (t["lambda"][:, :, None] * A * t["gamma"]).flatten(0, 1)
    product = B.flatten(1) @ scaled
    return W + (product if W.shape[1] == short else product.T) * c["randlora_alpha"] / c["r"], b


def road(W, b, t, c, g):
    theta, alpha, group = t["theta"], t["alpha"], c["group_size"]
    R = torch.zeros(len(W), len(W), dtype=torch.float64)
    for i in range(len(W)):
        start, within, half = i // group * group, i % group, group // 2
        partner = start + (within + half) % group
        if c["variant"] == "road_1":
            first = second = start // 2 + within % half
        elif c["variant"] == "road_2":
            first = second = i
        else:
            first, second = 2 * start + within, 2 * start + group + within
        R[i, i] = alpha[first] * theta[first].cos()
        R[i, partner] = alpha[second] * theta[second].sin() * (-1 if within < half else 1)
    return R @ W, None if b is None else R @ b


def vblora(W, b, t, c, g):
    def mixed(side):
        if f"logits_{side}" in t:
            values, indices = t[f"logits_{side}"].topk(c["topk"])
            weights = values.softmax(-1)
        else:
            indices, most = t[f"logits_{side}_topk_indices"].long(), t[f"logits_{side}_topk_weights"]
            weights = torch.cat([most, 1 - most.sum(-1, keepdim=True)], -1)
        return torch.einsum("abk,abkv->abv", weights, g["vector_bank"][indices])

    return W + torch.einsum("orv,riw->oviw", mixed("B"), mixed("A")).reshape(W.shape), b


def waveft(W, b, t, c, g):
    coefficients = scattered(W.shape, t["spectrum"], c)
    if not c["use_idwt"]:
        return W + coefficients * c["scaling"], b
    reduction = WAVELET_REDUCTIONS[c["wavelet_family"]][0]
    shape = [(n + reduction + 1) // 2 * 2 for n in W.shape]
    top, left = ((a - n) // 2 for a, n in zip(shape, W.shape, strict=True))
    padded = torch.zeros(shape, dtype=torch.float64)
    padded[top : top + W.shape[0], left : left + W.shape[1]] = coefficients
    (a, h), (v, d) = (half.chunk(2, dim=1) for half in padded.chunk(2))
    return W + waverec2d((a, (h, v, d)), c["wavelet_family"])[: W.shape[0], : W.shape[1]] * c["scaling"], b


TRUTHS = {
    "BEFT": beft,
    "DELORA": delora,
    "FOURIERFT": fourierft,
    "GLORA": glora,
    "GRALORA": gralora,
    "HIRA": hira,
    "PVERA": vera,
    "RANDLORA": randlora,
    "ROAD": road,
    "VBLORA": vblora,
    "VERA": vera,
    "WAVEFT": waveft,
}


@pytest.mark.parametrize("kind", KINDS)
def test_the_adapter_name_in_a_key_is_accepted(kind, tuned, tmp_path):
    """Trainers that save the state dict themselves leave it in, after the parameter's name."""
    ckpt, adapter, _ = tuned(kind)
    lorafuse.convert(ckpt, adapter, tmp_path / "a")
    named = {re.sub(rf"({kind}_\w+)", r"\1.default", key): t for key, t in read_adapter(adapter).items()}
    save_file(named, adapter / "adapter_model.safetensors")
    lorafuse.convert(ckpt, adapter, tmp_path / "b")
    assert (tmp_path / "a/model.safetensors").read_bytes() == (tmp_path / "b/model.safetensors").read_bytes()


@pytest.mark.parametrize(
    "kind", [kind for kind in KINDS if "bias" in getattr(peft, CASES[kind][0]).__dataclass_fields__]
)
def test_a_trained_bias_is_replaced_before_it_is_updated(kind, tuned, tmp_path):
    """bias="all" saves the base's biases as trained; an update of the bias goes on top."""
    ckpt, adapter, model = tuned(kind, bias="all")
    lorafuse.convert(ckpt, adapter, tmp_path / "out")
    assert_same_answers(tmp_path / "out", model)


def test_hira_merges_convolutions_and_embeddings_as_in_peft(tmp_path):
    torch.manual_seed(0)
    model, ckpt = Convolutions(), tmp_path / "ckpt"
    ckpt.mkdir()
    save_file(dict(model.state_dict()), ckpt / "model.safetensors")
    (ckpt / "config.json").write_text(
        '{"model_type": "none", "architectures": ["Convolutions"], "dtype": "float32"}'
    )
    model = peft.get_peft_model(
        model, peft.HiraConfig(r=3, target_modules=["one", "two", "three", "point", "words"])
    )
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(torch.randn_like(p) * 0.1)
    model.save_pretrained(tmp_path / "adapter", save_embedding_layers=False)
    lorafuse.convert(ckpt, tmp_path / "adapter", tmp_path / "out")
    expected, found = model.merge_and_unload().state_dict(), read_tensors(tmp_path / "out")
    assert expected.keys() == found.keys()
    for name, tensor in expected.items():
        assert torch.allclose(found[name], tensor, rtol=1e-6, atol=1e-6), name


@pytest.mark.parametrize("left_nbytes", [0, 1 << 20])
@pytest.mark.parametrize("case", ["randlora", "randlora_wide", "randlora_gpt2"])
def test_randlora_bases_that_do_not_fit_are_read_again(case, left_nbytes, tuned, tmp_path, monkeypatch):
    """The bytes are those of a run that holds them."""
    monkeypatch.setattr("lorafuse.planning.plan.TILE_NUMEL", 640)
    monkeypatch.setattr("lorafuse.patches.lowrank.RIGHT_CHUNK_NUMEL", 640)
    monkeypatch.setattr("lorafuse.patches.lowrank.LEFT_RESIDENT_NBYTES", left_nbytes)
    ckpt, adapter, _ = tuned(case)
    lorafuse.convert(ckpt, adapter, tmp_path / "a")
    monkeypatch.setitem(LowRank.__init__.__kwdefaults__, "right_resident", False)
    lorafuse.convert(ckpt, adapter, tmp_path / "b")
    assert (tmp_path / "a/model.safetensors").read_bytes() == (tmp_path / "b/model.safetensors").read_bytes()


def test_randlora_bases_saved_with_each_module_suffice(tuned, tmp_path):
    """PEFT saves them with every module besides."""
    ckpt, adapter, _ = tuned("randlora")
    receipt = lorafuse.convert(ckpt, adapter, tmp_path / "a")
    assert set(receipt["adapter_tensors"]["ignored"].values()) == {
        "a copy of the bases that all modules share"
    }
    kept = {key: t for key, t in read_adapter(adapter).items() if not key.startswith("base_model.randlora_")}
    save_file(kept, adapter / "adapter_model.safetensors")
    lorafuse.convert(ckpt, adapter, tmp_path / "b")
    assert (tmp_path / "a/model.safetensors").read_bytes() == (tmp_path / "b/model.safetensors").read_bytes()


@pytest.mark.parametrize(
    ("n", "n_first", "seed"), [(1, 1, 0), (100, 100, 777), (6144, 301, 2**40 + 1), (10**6, 1000, 0)]
)
def test_places_are_those_of_randperm(n, n_first, seed):
    expected = torch.randperm(n, generator=torch.Generator().manual_seed(seed))[:n_first]
    assert torch.equal(first_of_randperm(n, n_first, seed), expected)


def test_places_of_a_large_weight_come_from_the_other_shuffle():
    """From 214748364 elements on torch.randperm shuffles inside out; compared with the plain loop, since
    randperm takes 1.7 GB."""
    draws, shuffled = torch.Generator().manual_seed(7), []
    for i in range(1000):
        word = int(torch.empty(1, dtype=torch.int64).random_(-(2**63), None, generator=draws)) % 2**64
        shuffled.append(i)
        shuffled[i], shuffled[word % (i + 1)] = shuffled[word % (i + 1)], i
    assert _inside_out(1000, 40, torch.Generator().manual_seed(7)).tolist() == shuffled[:40]


def test_filters_are_those_of_peft():
    for family in FAMILIES:
        wavelet = Wavelet(family)
        expected = torch.tensor([wavelet.rec_lo, wavelet.rec_hi], dtype=torch.float64)
        assert (reconstruction_filters(family) - expected).abs().max() < 1e-11, family
        assert WAVELET_REDUCTIONS[family] == (expected.shape[1] - 2,) * 2


# case → (fields of the config, what is done to the tensors, the message after the file's path)
Q = "base_model.model.model.layers.0.self_attn.q_proj"
W = "model.layers.0.self_attn.q_proj.weight"
B = "model.layers.0.self_attn.q_proj.bias"


def put(**tensors):
    return lambda found: found.update({f"{Q}.{leaf.replace('__', '.')}": t for leaf, t in tensors.items()})


def drop(key):
    return lambda found: found.pop(key)


REFUSED = {
    "beft shape": ({}, put(beft_bias=torch.zeros(64)), f"{Q}.beft_bias is F32 [64], expected [1, out]."),
    "beft size": (
        {}, put(beft_bias=torch.zeros(1, 63)), f"{Q}.beft_bias [1, 63] does not fit {B} [64]; is the adapter for another base?"
    ),
    "delora missing": ({}, drop(f"{Q}.delora_w_norm"), "model.layers.0.self_attn.q_proj has delora_A but no delora_w_norm."),
    "delora shape": ({}, put(delora_A=torch.zeros(2, 64)), f"{Q}.delora_B is F32 [64, 3], expected [out, 2] from {Q}.delora_A."),
    "delora size": (
        {}, put(delora_B=torch.zeros(63, 3)), f"{Q}.delora_B [63, 3] does not fit {W} [64, 64]; is the adapter for another base?"
    ),
    "fourierft scaling": ({"scaling": "much"}, None, "scaling is much, expected a number."),
    "fourierft seed": ({"random_loc_seed": None}, None, "random_loc_seed is None, expected an integer of at least 0."),
    "fourierft size": (
        {},
        put(fourierft_spectrum=torch.zeros(5000)),
        f"{Q}.fourierft_spectrum [5000] does not fit {W} [64, 64]; is the adapter for another base?",
    ),
    "glora half": ({}, drop(f"{Q}.glora_A.Xu"), "model.layers.0.self_attn.q_proj has glora_A.Xd but no glora_A.Xu."),
    "glora size": (
        {}, put(glora_C__Xd=torch.zeros(63, 3)), f"{Q}.glora_C.Xd [63, 3] does not fit {B} [64]; is the adapter for another base?"
    ),
    "gralora ranks": (
        {}, put(gralora_B=torch.zeros(2, 3, 32)), f"{Q}.gralora_B is F32 [2, 3, 32], expected [2, 4, out / k] from {Q}.gralora_A."
    ),
    "gralora size": (
        {},
        put(gralora_B=torch.zeros(2, 4, 31)),
        f"{Q}.gralora_B [2, 4, 31] does not fit {W} [64, 64]; is the adapter for another base?",
    ),
    "gralora alpha": ({"alpha": True}, None, "alpha is True, expected a number."),
    "hira kind": ({}, put(hira_C=torch.zeros(1)), f"{Q}.hira_C is of a kind that is not supported."),
    "hira size": (
        {}, put(hira_B=torch.zeros(63, 4)), f"{Q}.hira_B [63, 4] does not fit {W} [64, 64]; is the adapter for another base?"
    ),
    "pvera sampling": (
        {"sample_at_inference": True},
        None,
        "sample_at_inference is set, which is not supported: each forward pass samples anew, so no merged "
        "weight equals it. Set it to false to merge the mean.",
    ),
    "pvera rank": ({}, put(pvera_lambda_d=torch.zeros(9)), f"{Q}.pvera_lambda_d is F32 [9], expected [10]."),
    "randlora unsaved": (
        {},
        drop("base_model.randlora_A"),
        "base_model has randlora_B but no randlora_A.",
    ),
    "randlora unsaved both": (
        {"save_projection": False},
        lambda found: [found.pop(key) for key in list(found) if key.endswith(("randlora_A", "randlora_B"))],
        "holds no base_model.randlora_A, and what PEFT would draw in its place depends on the machine; save "
        "the adapter with save_projection=True.",
    ),
    "randlora size": (
        {},
        put(randlora_gamma=torch.zeros(13, 63)),
        f"{Q}.randlora_gamma [13, 63] does not fit {W} [64, 64]; is the adapter for another base?",
    ),
    "road variant": ({"variant": "road_3"}, None, "variant is road_3, which is not supported; known are road_1, road_2, road_4."),
    "road group": ({"group_size": 7}, None, "group_size is 7, expected an even number."),
    "road size": (
        {"group_size": 6}, None, f"{Q}.road_theta [32] does not fit {W} [64, 64]; is the adapter for another base?"
    ),
    "vblora bank": ({}, drop("base_model.vblora_vector_bank"), "holds no base_model.vblora_vector_bank."),
    "vblora vectors": (
        {},
        put(vblora_logits_A=torch.zeros(4, 4, 19)),
        f"{Q}.vblora_logits_A is F32 [4, 4, 19], expected [r, in / v, 20] from base_model.vblora_vector_bank.",
    ),
    "vblora topk": ({"topk": 21}, None, "base_model.vblora_vector_bank has 20 vectors, fewer than topk, 21."),
    "vera unsaved": (
        {},
        lambda found: (found.pop("base_model.vera_A"), found.pop("base_model.vera_B")),
        "holds no base_model.vera_A, though {adapter}/adapter_config.json says save_projection.",
    ),
    "vera rank": ({}, put(vera_lambda_d=torch.zeros(4)), f"{Q}.vera_lambda_d is F32 [4], expected [5]."),
    "vera projection": (
        {},
        lambda found: found.update({"base_model.vera_A": torch.zeros(5, 63)}),
        f"base_model.vera_A [5, 63] does not fit {W} [64, 64]; is the adapter for another base?",
    ),
    "waveft family": (
        {"wavelet_family": "coif1"},
        None,
        "wavelet_family is coif1, which is not supported; known are db1, db2, db3, db4, db5 and 14 more.",
    ),
    "waveft shape": ({}, put(waveft_spectrum=torch.zeros(5, 5)), f"{Q}.waveft_spectrum is F32 [5, 5], expected [n_frequency]."),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_does_not_fit_is_refused(case, tuned, tmp_path):
    """By file, tensor or field, what was expected and what was found; nothing is written."""
    fields, change, message = REFUSED[case]
    ckpt, adapter, _ = tuned(case.split()[0], target_modules=["q_proj"])
    rewrite(adapter, **fields)
    found = read_adapter(adapter)
    if change:
        change(found)
        save_file(found, adapter / "adapter_model.safetensors")
    with pytest.raises(AdapterError) as caught:
        lorafuse.convert(ckpt, adapter, tmp_path / "work" / "out")
    file = (
        "adapter_model.safetensors" if change or message.startswith("base_model") else "adapter_config.json"
    )
    assert refusal(caught) == f"{adapter}/{file}: {message.format(adapter=adapter)}"
    assert not (tmp_path / "work").exists()
