"""LoRA on parameters: stacks of experts, fused in memory and per expert or fused on disk, against PEFT's
unmerged models and the formula in float64."""

import json

import pytest
import torch
from models import spread
from moe_models import BOTH, MODELS, load, logits, train
from oracle import read_adapter, read_tensors
from peft import PeftModel
from safetensors.torch import save_file

import lorafuse
from lorafuse.errors import AdapterError


@pytest.fixture(scope="module")
def moe(tmp_path_factory):
    """moe(kind) → a checkpoint as transformers writes it, not to be changed."""
    root = tmp_path_factory.mktemp("moe")

    def get(kind):
        if not (root / kind).exists():
            torch.manual_seed(0)
            spread(MODELS[kind]()).save_pretrained(root / kind)
        return root / kind

    return get


PATTERNS = {
    "rank_pattern": {"experts.down_proj": 3},
    "alpha_pattern": {r"layers\.0\.mlp\.experts\.down_proj": 9},
}
CASES = {kind: (kind, {"target_parameters": BOTH, **PATTERNS}) for kind in MODELS}
CASES |= {
    "one parameter": ("mixtral", {"target_parameters": BOTH[1:]}),
    "another order in the config": ("qwen3_moe", {"target_parameters": BOTH[::-1], **PATTERNS}),
    "rslora": ("mixtral", {"target_parameters": BOTH, "use_rslora": True, "r": 4}),
    "the router too": ("mixtral", {"target_parameters": [*BOTH, "mlp.gate.weight"]}),
    "one layer": ("olmoe", {"target_parameters": [f"model.layers.1.{BOTH[0]}"]}),
}
# PEFT writes bare names itself, where target_modules name what transformers 5 stacks.
BARE = {"target_parameters": ["gate_up_proj", "down_proj"], "target_modules": ["q_proj", "o_proj"]}
LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "w1", "w2", "w3"]
CASES |= {f"bare names, {kind}": (kind, BARE) for kind in MODELS if kind != "deepseek_v3"}
CASES |= {
    f"bare names by PEFT, {kind}": (kind, {"target_modules": LINEARS}) for kind in MODELS if kind != "gpt_oss"
}
CASES |= {
    "bare names, nothing else": ("qwen3_moe", BARE | {"target_modules": []}),
    "one bare name": ("mixtral", BARE | {"target_parameters": ["down_proj"]}),
    "all-linear": ("qwen3_moe", {"target_modules": "all-linear"}),
}


@pytest.mark.parametrize("case", CASES)
def test_the_merged_model_answers_as_the_unmerged_one(case, moe, tmp_path):
    kind, settings = CASES[case]
    peft = train(moe(kind), tmp_path / "adapter", **{"target_modules": ["o_proj"]} | settings)
    receipt = lorafuse.convert(moe(kind), tmp_path / "adapter", tmp_path / "out")
    assert sorted(receipt["adapter_tensors"]["used"]) == sorted(read_adapter(tmp_path / "adapter"))
    assert read_tensors(tmp_path / "out").keys() == read_tensors(moe(kind)).keys()
    merged = logits(load(tmp_path / "out"))
    assert (merged - logits(peft)).abs().max() < 1e-4 < (merged - logits(load(moe(kind)))).abs().max()


@pytest.mark.parametrize("targets", [BOTH, BOTH[1:], ["gate_up_proj", "down_proj"]])
def test_stacks_stored_in_the_other_orientation(targets, moe, tmp_path):
    """The hub's Qwen3-VL-MoE has (E, in, out), which transformers 5 turns round when it loads them."""
    kind = "qwen3_vl_moe"
    stored = {
        name: weight.transpose(1, 2).contiguous() if ".experts." in name else weight
        for name, weight in read_tensors(moe(kind)).items()
    }
    base = write(tmp_path / "base", stored, **json.loads((moe(kind) / "config.json").read_text()))
    peft = train(base, tmp_path / "adapter", target_modules=["o_proj"], target_parameters=targets)
    lorafuse.convert(base, tmp_path / "adapter", tmp_path / "out")
    assert (logits(load(tmp_path / "out")) - logits(peft)).abs().max() < 1e-4


def test_linears_per_expert_that_peft_fused_and_saved_again(moe, tmp_path):
    """PEFT makes one block-diagonal update of rank 2r of w1 and w3; both forms of the adapter give the same
    weights."""
    torch.manual_seed(2)
    tensors = {}
    for name, weight in read_tensors(moe("mixtral")).items():
        if name.endswith((".w1.weight", ".w2.weight", ".w3.weight")):
            module = f"base_model.model.{name.removesuffix('.weight')}"
            tensors[f"{module}.lora_A.weight"] = torch.randn(2, weight.shape[1])
            tensors[f"{module}.lora_B.weight"] = torch.randn(weight.shape[0], 2)
    old = write(tmp_path / "old", tensors, target_modules=["w1", "w2", "w3"], r=2, lora_alpha=6)
    PeftModel.from_pretrained(load(moe("mixtral")), old).save_pretrained(tmp_path / "new")
    assert any("experts.base_layer.lora_A" in key for key in read_adapter(tmp_path / "new"))
    lorafuse.convert(moe("mixtral"), old, tmp_path / "a")
    lorafuse.convert(moe("mixtral"), tmp_path / "new", tmp_path / "b")
    a, b = read_tensors(tmp_path / "a"), read_tensors(tmp_path / "b")
    assert all(torch.allclose(a[name], b[name], rtol=1e-5, atol=1e-5) for name in a)


def write(path, tensors, **fields):
    """An adapter directory, or with `model_type` among the fields a checkpoint."""
    path.mkdir()
    files = (
        ("model.safetensors", "config.json")
        if "model_type" in fields
        else ("adapter_model.safetensors", "adapter_config.json")
    )
    save_file(tensors, path / files[0])
    (path / files[1]).write_text(
        json.dumps(fields if "model_type" in fields else {"peft_type": "LORA"} | fields)
    )
    return path


E, R = 3, 2


def factors(n_out, n_in, seed=0):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(R * E, n_in, generator=g), torch.randn(n_out, R * E, generator=g)


def product(a, b, scale):
    """[E, out, in] in float64; expert e has rows e·R… of A and columns e, E + e, … of B."""
    return torch.stack([scale * b.double()[:, e::E] @ a.double()[e * R : (e + 1) * R] for e in range(E)])


PRE = "base_model.model.model.layers.0.mlp.experts"
FUSED = "model.layers.0.mlp.experts"


def fused(tmp_path, shapes, **config):
    torch.manual_seed(3)
    tensors = {f"{FUSED}.{name}": torch.randn(shape) for name, shape in shapes.items()}
    return write(
        tmp_path / "ckpt",
        tensors,
        **{"model_type": "gpt_oss", "architectures": ["GptOssForCausalLM"]} | config,
    ), tensors


ORIENTED = {
    "out × in": ((20, 8), (20, 8), "0.19.1", False),
    "in × out": ((8, 20), (20, 8), "0.18.0", True),
    "square, and no version": ((8, 8), (8, 8), None, True),
    "square, old PEFT": ((8, 8), (8, 8), "0.18.1", True),
}


@pytest.mark.parametrize("case", ORIENTED)
def test_orientation_by_shapes_or_version(case, tmp_path):
    matrix, (n_out, n_in), version, transposed = ORIENTED[case]
    ckpt, base = fused(tmp_path, {"down_proj": (E, *matrix)})
    a, b = factors(n_out, n_in)
    lora = {f"{PRE}.lora_A.weight": a, f"{PRE}.lora_B.weight": b}
    fields = {"peft_version": version} if version else {}
    write(tmp_path / "adapter", lora, target_parameters=["experts.down_proj"], r=R, lora_alpha=6, **fields)
    lorafuse.convert(ckpt, tmp_path / "adapter", tmp_path / "out")
    delta = product(a, b, 6 / R)
    found = (
        read_tensors(tmp_path / "out")[f"{FUSED}.down_proj"].double() - base[f"{FUSED}.down_proj"].double()
    )
    assert torch.allclose(found, delta.mT if transposed else delta, atol=1e-5)


@pytest.mark.parametrize("transposed", [False, True])
def test_square_matrices_take_the_orientation_of_the_others(transposed, tmp_path):
    """gpt-oss's down_proj is square; gate_up_proj of the same module tells."""
    ckpt, base = fused(tmp_path, {"gate_up_proj": (E, 8, 20), "down_proj": (E, 8, 8)})
    (a_up, b_up), (a, b) = factors(*((20, 8) if transposed else (8, 20))), factors(8, 8, seed=1)
    lora = {f"{PRE}.base_layer.lora_A.weight": a_up, f"{PRE}.base_layer.lora_B.weight": b_up}
    lora |= {f"{PRE}.lora_A.weight": a, f"{PRE}.lora_B.weight": b}
    write(tmp_path / "adapter", lora, target_parameters=BOTH, r=R, lora_alpha=6, peft_version="0.21.2")
    lorafuse.convert(ckpt, tmp_path / "adapter", tmp_path / "out")
    found = read_tensors(tmp_path / "out")
    for name, delta in (("gate_up_proj", product(a_up, b_up, 3)), ("down_proj", product(a, b, 3))):
        change = found[f"{FUSED}.{name}"].double() - base[f"{FUSED}.{name}"].double()
        assert torch.allclose(change, delta.mT if transposed else delta, atol=1e-5), name


@pytest.mark.parametrize("transposed", [False, True])
def test_one_matrix_for_each_expert_on_disk(transposed, tmp_path):
    """In both orientations, and with the square gate_up_proj that 2·I = H makes."""
    gate, up, down = "gate_proj", "up_proj", "down_proj"
    torch.manual_seed(3)
    shapes = {gate: (4, 8), up: (4, 8), down: (8, 4)}
    base = {
        f"{FUSED}.{e}.{name}.weight": torch.randn(shape) for e in range(E) for name, shape in shapes.items()
    }
    ckpt = write(tmp_path / "ckpt", base, model_type="qwen3_moe", architectures=["Qwen3MoeForCausalLM"])
    (a_up, b_up), (a, b) = factors(8, 8), factors(*((4, 8) if transposed else (8, 4)), seed=1)
    lora = {f"{PRE}.base_layer.lora_A.weight": a_up, f"{PRE}.base_layer.lora_B.weight": b_up}
    lora |= {f"{PRE}.lora_A.weight": a, f"{PRE}.lora_B.weight": b}
    write(tmp_path / "adapter", lora, target_parameters=BOTH, r=R, lora_alpha=6, peft_version="0.20.0")
    lorafuse.convert(ckpt, tmp_path / "adapter", tmp_path / "out")
    found = read_tensors(tmp_path / "out")
    d_up, d_down = product(a_up, b_up, 3), product(a, b, 3)
    if transposed:
        d_up, d_down = d_up.mT, d_down.mT
    for e in range(E):
        for name, delta in ((gate, d_up[e, :4]), (up, d_up[e, 4:]), (down, d_down[e])):
            key = f"{FUSED}.{e}.{name}.weight"
            assert torch.allclose(found[key].double(), base[key].double() + delta, atol=1e-5), key


@pytest.mark.parametrize(
    "targets", [["mlp.experts.up_proj", "mlp.experts.down_proj"], ["experts.down_proj", "experts.up_proj"]]
)
def test_parameters_of_one_size_are_told_apart_by_nesting(targets, tmp_path):
    """up_proj and down_proj fit each other's factors, transposed; the last registered one, down_proj, is
    outermost."""
    ckpt, base = fused(tmp_path, {"up_proj": (E, 20, 8), "down_proj": (E, 8, 20)})
    (a_up, b_up), (a, b) = factors(20, 8), factors(8, 20, seed=1)
    lora = {f"{PRE}.base_layer.lora_A.weight": a_up, f"{PRE}.base_layer.lora_B.weight": b_up}
    lora |= {f"{PRE}.lora_A.weight": a, f"{PRE}.lora_B.weight": b}
    write(tmp_path / "adapter", lora, target_parameters=targets, r=R, lora_alpha=6)
    lorafuse.convert(ckpt, tmp_path / "adapter", tmp_path / "out")
    found = read_tensors(tmp_path / "out")
    for name, delta in (("up_proj", product(a_up, b_up, 3)), ("down_proj", product(a, b, 3))):
        change = found[f"{FUSED}.{name}"].double() - base[f"{FUSED}.{name}"].double()
        assert torch.allclose(change, delta, atol=1e-5), name


@pytest.mark.parametrize("transposed", [False, True])
def test_tiles_stay_within_one_expert(transposed, tmp_path):
    """Matrices larger than a tile, and a last tile of each that is smaller; the same bytes whatever the
    memory."""
    n_rows, n_cols = 700, 600
    ckpt, base = fused(tmp_path, {"gate_up_proj": (E, n_rows, n_cols)})
    a, b = factors(*((n_cols, n_rows) if transposed else (n_rows, n_cols)))
    lora = {f"{PRE}.lora_A.weight": a, f"{PRE}.lora_B.weight": b}
    write(tmp_path / "adapter", lora, target_parameters=BOTH[:1], r=R, lora_alpha=6)
    lorafuse.convert(ckpt, tmp_path / "adapter", tmp_path / "out")
    lorafuse.convert(ckpt, tmp_path / "adapter", tmp_path / "little", memory_limit="70MB")
    delta = product(a, b, 3)
    found = read_tensors(tmp_path / "out")[f"{FUSED}.gate_up_proj"]
    wanted = base[f"{FUSED}.gate_up_proj"].double() + (delta.mT if transposed else delta)
    assert torch.allclose(found.double(), wanted, atol=1e-5)
    assert torch.equal(found, read_tensors(tmp_path / "little")[f"{FUSED}.gate_up_proj"])


A, B = factors(20, 8)
LORA = {f"{PRE}.lora_A.weight": A, f"{PRE}.lora_B.weight": B}
NESTED = {f"{PRE}.base_layer.lora_A.weight": A.clone(), f"{PRE}.base_layer.lora_B.weight": B.clone()}
SQUARE = dict(zip(LORA, factors(8, 8), strict=True))
DOWN = {"target_parameters": ["mlp.experts.down_proj"]}
REFUSED = {
    "unnamed parameters": (
        LORA | NESTED,
        DOWN,
        f"{FUSED} has LoRA on 2 parameters, but target_parameters in adapter_config.json names down_proj of "
        "it.",
    ),
    "no names": (
        LORA | NESTED,
        {},
        f"{FUSED} has LoRA on 2 parameters, but target_parameters in adapter_config.json names none of it.",
    ),
    "no list": (LORA, {"target_parameters": "down_proj"},
    "target_parameters is down_proj, expected a list of names."),
    "another size": (
        {f"{PRE}.lora_A.weight": A[:, :7].contiguous(), f"{PRE}.lora_B.weight": B},
        DOWN,
        f"{PRE}.lora_A.weight and {PRE}.lora_B.weight (20 × 7) do not fit {FUSED}.down_proj [3, 20, 8]; "
        "is the adapter for another base?",
    ),
    "factors of a convolution": (
        {key: tensor[..., None].contiguous() for key, tensor in LORA.items()},
        DOWN,
        f"{PRE}.lora_A.weight is F32 {[*A.shape, 1]} and {PRE}.lora_B.weight is F32 {[*B.shape, 1]}; they "
        "are not the two factors of one update.",
    ),
    "another number of experts": (
        {f"{PRE}.lora_A.weight": A[:5].contiguous(), f"{PRE}.lora_B.weight": B[:, :5].contiguous()},
        DOWN,
        f"{PRE}.lora_A.weight and {PRE}.lora_B.weight (20 × 8) do not fit {FUSED}.down_proj [3, 20, 8]; "
        "is the adapter for another base?",
    ),
    "half": ({f"{PRE}.lora_A.weight": A}, DOWN, f"{FUSED} has lora_A.weight but no lora_B.weight."),
    "an unknown orientation": (
        SQUARE,
        DOWN | {"peft_version": "0.19.1"},
        f"the matrices of {FUSED}.down_proj are square, and PEFT 0.19.1 stores their update in one "
        "orientation with transformers 4 and in the other with 5; the adapter does not say which it was.",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_does_not_fit_is_refused(case, tmp_path):
    tensors, fields, message = REFUSED[case]
    ckpt, _ = fused(tmp_path, {"down_proj": (E, 8, 8) if "peft_version" in fields else (E, 20, 8)})
    write(tmp_path / "adapter", tensors, r=R, lora_alpha=6, **fields)
    with pytest.raises(AdapterError) as caught:
        lorafuse.convert(ckpt, tmp_path / "adapter", tmp_path / "work" / "out")
    assert str(caught.value).endswith(f": {message}")
    assert not (tmp_path / "work").exists()


def test_a_missing_expert_is_refused(tmp_path):
    base = {f"{FUSED}.{e}.down_proj.weight": torch.zeros(20, 8) for e in (0, 2)}
    ckpt = write(tmp_path / "ckpt", base, model_type="qwen3_moe", architectures=["Qwen3MoeForCausalLM"])
    write(tmp_path / "adapter", LORA, r=R, lora_alpha=6, **DOWN)
    with pytest.raises(AdapterError) as caught:
        lorafuse.convert(ckpt, tmp_path / "adapter", tmp_path / "work" / "out")
    assert str(caught.value) == (
        f"{tmp_path}/adapter/adapter_model.safetensors: {PRE}.lora_A.weight belongs to {FUSED}.down_proj, "
        f"which is made from {FUSED}.0.down_proj.weight and others, but one of expert 1 is missing."
    )
    assert not (tmp_path / "work").exists()
