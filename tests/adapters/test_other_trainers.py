"""Adapters under the names of other trainers: LoRA on experts one by one where the checkpoint has stacks, and
Tinker's names and shared factors, against W + scale · B A in float64 and against transformers."""

import json

import build
import pytest
import torch
import transformers as t
from models import spread
from moe_models import COMMON, MODELS, load, logits
from safetensors.torch import load_file, save_file

import lorafuse
from lorafuse.errors import AdapterError

E, H, I, RANK, SCALE = 3, 12, 10, 2, 2.0  # noqa: E741  # experts, hidden, inner: as papers call them
LAYER = "model.layers.0"
# Orientation of stacks, and whether gate and up take turns, by model.
LAYOUTS = {
    "Qwen3_5MoeForCausalLM": ("qwen3_5_moe_text", False, False),
    "GptOssForCausalLM": ("gpt_oss", True, True),
    "Llama4ForCausalLM": ("llama4_text", True, False),
}


def random(*shape):
    return torch.randn(shape) * 0.3


def checkpoint(path, tensors, model_class, **config):
    path.mkdir()
    config = {"architectures": [model_class], "tie_word_embeddings": False} | config
    build.write_json(path / "config.json", config)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path / "model.safetensors")
    return path


def pair(module, n_out, n_in):
    """(tensors, the update in float64) of one module."""
    a, b = random(RANK, n_in), random(n_out, RANK)
    name = f"base_model.model.{module}"
    return {f"{name}.lora_A.weight": a, f"{name}.lora_B.weight": b}, SCALE * b.double() @ a.double()


def adapter(path, tensors, **config):
    return build.write_adapter(path, tensors, **{"r": RANK, "lora_alpha": SCALE * RANK} | config)


def stacks(model_class, h=H, i=I):
    """The checkpoint's tensors, and views of each expert's matrices (out, in) in float64 copies of them."""
    _, in_out, interleaved = LAYOUTS[model_class]
    shapes = ((E, 2 * i, h), (E, h, i))
    gate_up, down = (random(e, b, a) if in_out else random(e, a, b) for e, a, b in shapes)
    tensors = {f"{LAYER}.mlp.experts.gate_up_proj": gate_up, f"{LAYER}.mlp.experts.down_proj": down}
    truth = {name: tensor.double() for name, tensor in tensors.items()}
    both, last = (m.transpose(1, 2) if in_out else m for m in truth.values())
    halves = (both[:, ::2], both[:, 1::2]) if interleaved else (both[:, :i], both[:, i:])
    return tensors, truth, {"gate_proj": halves[0], "up_proj": halves[1], "down_proj": last, "gate_up": both}


def check(out, truth):
    made = load_file(out / "model.safetensors")
    assert made.keys() == truth.keys()
    for name, expected in truth.items():
        assert torch.allclose(made[name].double(), expected, rtol=1e-5, atol=1e-6), name


@pytest.mark.parametrize("size", [(H, I), (12, 6), (12, 12)], ids=["oblong", "square gate", "square down"])
@pytest.mark.parametrize("model_class", LAYOUTS)
@pytest.mark.parametrize("names", ["gate_proj up_proj down_proj", "w1 w3 w2", "gate_proj", "down_proj"])
def test_experts_one_by_one_onto_stacks(names, model_class, size, tmp_path):
    """Each expert's matrix in its place, whichever way round the stack is; what is not named stays."""
    torch.manual_seed(0)
    (h, i), hub = size, {"w1": "gate_proj", "w3": "up_proj", "w2": "down_proj"}
    tensors, truth, views = stacks(model_class, h, i)
    trained = {}
    for kind in names.split():
        own = hub.get(kind, kind)
        for expert in (0, 2):
            n_out, n_in = (h, i) if own == "down_proj" else (i, h)
            more, update = pair(f"{LAYER}.mlp.experts.{expert}.{kind}", n_out, n_in)
            trained |= more
            views[own][expert] += update
    path = checkpoint(tmp_path / "ckpt", tensors, model_class, model_type=LAYOUTS[model_class][0])
    made = adapter(tmp_path / "adapter", trained)
    lorafuse.convert(path, made, tmp_path / "out")
    check(tmp_path / "out", truth)
    receipt = json.loads((tmp_path / "out" / "lorafuse_receipt.json").read_text())
    assert sorted(receipt["adapter_tensors"]["used"]) == sorted(trained)
    lorafuse.verify(tmp_path / "out", ckpt=path, adapters=[made])


def test_small_tiles_and_little_memory(tmp_path, monkeypatch):
    """The bytes do not depend on the tiles; factors come and go with the experts."""
    from lorafuse.planning import plan

    torch.manual_seed(0)
    tensors, truth, views = stacks("GptOssForCausalLM")
    trained = {}
    for kind, n_out, n_in in (("gate_proj", I, H), ("up_proj", I, H), ("down_proj", H, I)):
        for expert in range(E):
            more, update = pair(f"{LAYER}.mlp.experts.{expert}.{kind}", n_out, n_in)
            trained |= more
            views[kind][expert] += update
    path = checkpoint(tmp_path / "ckpt", tensors, "GptOssForCausalLM", model_type="gpt_oss")
    made = adapter(tmp_path / "adapter", trained)
    for tile in (1, 33, 1 << 19):
        monkeypatch.setattr(plan, "TILE_NUMEL", tile)
        lorafuse.convert(path, made, tmp_path / f"out{tile}")
        check(tmp_path / f"out{tile}", truth)


@pytest.mark.parametrize("fused", [True, False], ids=["fused", "one by one"])
def test_unsloths_names_of_gpt_oss(fused, tmp_path):
    """`gate_up_projs.N`, `down_projs.N` and `router.linear`, onto the layout of either."""
    torch.manual_seed(0)
    tensors, truth, views = stacks("GptOssForCausalLM")
    tensors |= {f"{LAYER}.mlp.router.weight": random(E, H)}
    truth[f"{LAYER}.mlp.router.weight"] = tensors[f"{LAYER}.mlp.router.weight"].double()
    trained, update = pair(f"{LAYER}.mlp.router.linear", E, H)
    truth[f"{LAYER}.mlp.router.weight"] += update
    for expert in range(E):
        for kind, view, n_out, n_in in (("gate_up", "gate_up", 2 * I, H), ("down", "down_proj", H, I)):
            more, update = pair(f"{LAYER}.mlp.experts.{kind}_projs.{expert}", n_out, n_in)
            trained |= more
            views[view][expert] += update
    if not fused:
        for kind in ("gate_up", "down"):
            stack = tensors.pop(f"{LAYER}.mlp.experts.{kind}_proj")
            own = f"{LAYER}.mlp.experts.{kind}_projs"
            tensors |= {f"{own}.{n}.weight": matrix.T for n, matrix in enumerate(stack)}
        tensors[f"{LAYER}.mlp.router.linear.weight"] = tensors.pop(f"{LAYER}.mlp.router.weight")
    path = checkpoint(tmp_path / "ckpt", tensors, "GptOssForCausalLM", model_type="gpt_oss")
    lorafuse.convert(path, adapter(tmp_path / "adapter", trained), tmp_path / "out")
    check(tmp_path / "out", truth)


@pytest.mark.parametrize("kind", ["mixtral", "qwen3_moe", "deepseek_v3"])
def test_the_same_model_from_both_layouts(kind, tmp_path):
    """transformers' own conversion is the judge of what goes where: an adapter of transformers 4, into the
    checkpoint of the hub and into one with transformers 5's names in memory."""
    torch.manual_seed(0)
    model = spread(MODELS[kind]())
    model.save_pretrained(tmp_path / "hub")
    names = load_file(tmp_path / "hub" / "model.safetensors")
    build.write_json(tmp_path / "config.json", json.loads((tmp_path / "hub" / "config.json").read_text()))
    (tmp_path / "memory").mkdir()
    (tmp_path / "config.json").rename(tmp_path / "memory" / "config.json")
    stacked = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    save_file(stacked, tmp_path / "memory" / "model.safetensors", {"format": "pt"})
    assert len(stacked) < len(names)
    trained = {}
    for name, tensor in names.items():
        if "experts." in name and tensor.dim() == 2:
            trained |= pair(name.removesuffix(".weight"), *tensor.shape)[0]
    made = adapter(tmp_path / "adapter", trained)
    for layout in ("hub", "memory"):
        lorafuse.convert(tmp_path / layout, made, tmp_path / f"out-{layout}")
    assert not torch.allclose(logits(model.eval()), logits(load(tmp_path / "out-hub")), atol=1e-2)
    assert torch.allclose(
        logits(load(tmp_path / "out-hub")), logits(load(tmp_path / "out-memory")), atol=1e-5
    )


def tinker(h=H, i=I, experts="mlp.experts"):
    """Tinker's tensors for the experts of a layer, and {kind: updates of all experts in float64}."""
    shapes = {"w1": (1, E, i, h), "w3": (1, E, i, h), "w2": (E, 1, h, i)}
    tensors, updates = {}, {}
    for kind, (n_a, n_b, n_out, n_in) in shapes.items():
        a, b = random(n_a, RANK, n_in), random(n_b, n_out, RANK)
        name = f"base_model.model.{LAYER}.{experts}.{kind}"
        tensors |= {f"{name}.lora_A.weight": a, f"{name}.lora_B.weight": b}
        updates[kind] = SCALE * b.double() @ a.double()
    return tensors, {"gate_proj": updates["w1"], "up_proj": updates["w3"], "down_proj": updates["w2"]}


@pytest.mark.parametrize("size", [(H, I), (12, 6), (12, 12)], ids=["oblong", "square gate", "square down"])
@pytest.mark.parametrize("model_class", LAYOUTS)
def test_tinkers_experts_onto_stacks(model_class, size, tmp_path):
    """One factor is the same for all experts."""
    torch.manual_seed(0)
    tensors, truth, views = stacks(model_class, *size)
    trained, updates = tinker(*size)
    for kind, update in updates.items():
        views[kind] += update
    path = checkpoint(tmp_path / "ckpt", tensors, model_class, model_type=LAYOUTS[model_class][0])
    lorafuse.convert(path, adapter(tmp_path / "adapter", trained), tmp_path / "out")
    check(tmp_path / "out", truth)


def test_tinkers_experts_onto_tensors_of_their_own(tmp_path):
    """As Qwen3-MoE and DeepSeek have them. Empty factors stand for a matrix that the model does not have."""
    torch.manual_seed(0)
    trained, updates = tinker()
    tensors, truth = {}, {}
    for kind, update in updates.items():
        for expert in range(E):
            name = f"{LAYER}.mlp.experts.{expert}.{kind}.weight"
            tensors[name] = random(*update.shape[1:])
            truth[name] = tensors[name].double() + update[expert]
    empty = "base_model.model.model.layers.1.mlp.experts.w3.lora_{}.weight"
    trained |= {empty.format("A"): torch.zeros(1, RANK, 0), empty.format("B"): torch.zeros(E, 0, RANK)}
    path = checkpoint(tmp_path / "ckpt", tensors, "Qwen3MoeForCausalLM", model_type="qwen3_moe")
    lorafuse.convert(path, adapter(tmp_path / "adapter", trained), tmp_path / "out")
    check(tmp_path / "out", truth)
    receipt = json.loads((tmp_path / "out" / "lorafuse_receipt.json").read_text())
    reason = "it is empty: experts of this model have no such matrix"
    assert receipt["adapter_tensors"]["ignored"] == {empty.format(leaf): reason for leaf in "AB"}


@pytest.mark.parametrize("prefix", ["model", "model.language_model"])
def test_tinkers_head_attention_and_parts_of_a_joined_weight(prefix, tmp_path):
    """`unembed_tokens`, `attn` in gpt-oss, and query, key and value of a linear attention."""
    torch.manual_seed(0)
    linear = {"linear_num_key_heads": 2, "linear_key_head_dim": 3}
    linear |= {"linear_num_value_heads": 4, "linear_value_head_dim": 2}
    joined = f"{prefix}.layers.0.linear_attn.in_proj_qkv.weight"
    tensors = {
        joined: random(20, H),
        "lm_head.weight": random(30, H),
        f"{prefix}.embed_tokens.weight": random(30, H),
    }
    truth = {name: tensor.double() for name, tensor in tensors.items()}
    trained, update = pair("model.unembed_tokens", 30, H)
    truth["lm_head.weight"] += update
    for kind, start, n_rows in (("q", 0, 6), ("k", 6, 6), ("v", 12, 8)):
        more, update = pair(f"model.layers.0.linear_attn.in_proj_{kind}", n_rows, H)
        trained |= more
        truth[joined][start : start + n_rows] += update
    config = linear if prefix == "model" else {"text_config": linear}
    path = checkpoint(
        tmp_path / "ckpt", tensors, "Qwen3_5ForConditionalGeneration", model_type="qwen3_5", **config
    )
    lorafuse.convert(path, adapter(tmp_path / "adapter", trained), tmp_path / "out")
    check(tmp_path / "out", truth)


def test_the_parts_of_a_joined_weight_are_transformers_own():
    """transformers splits what in_proj_qkv makes in this order, at these sizes."""
    config = t.Qwen3_5TextConfig(
        **COMMON,
        head_dim=8,
        layer_types=["linear_attention", "full_attention"],
        linear_num_key_heads=2,
        linear_num_value_heads=4,
        linear_key_head_dim=3,
        linear_value_head_dim=5,
    )
    layer = t.Qwen3_5ForCausalLM(config).model.layers[0].linear_attn
    assert (layer.key_dim, layer.value_dim) == (6, 20)
    assert layer.in_proj_qkv.weight.shape[0] == 2 * 6 + 20


def test_tinkers_attention_in_gpt_oss(tmp_path):
    torch.manual_seed(0)
    name = f"{LAYER}.self_attn.q_proj.weight"
    tensors = {name: random(8, H)}
    trained, update = pair(f"{LAYER}.attn.q_proj", 8, H)
    path = checkpoint(tmp_path / "ckpt", tensors, "GptOssForCausalLM", model_type="gpt_oss")
    lorafuse.convert(path, adapter(tmp_path / "adapter", trained), tmp_path / "out")
    check(tmp_path / "out", {name: tensors[name].double() + update})


def refused(path, made, out):
    with pytest.raises(AdapterError) as caught:
        lorafuse.convert(path, made, out)
    assert not out.exists()
    return str(caught.value)


def test_a_square_stack_of_an_unknown_model_is_refused(tmp_path):
    """Neither shapes nor the model say which way round it is."""
    tensors = {f"{LAYER}.mlp.experts.down_proj": random(E, 8, 8)}
    trained, _ = pair(f"{LAYER}.mlp.experts.0.down_proj", 8, 8)
    path = checkpoint(tmp_path / "ckpt", tensors, "SomethingNew", model_type="something")
    made = adapter(tmp_path / "adapter", trained)
    key = next(iter(trained))
    assert refused(path, made, tmp_path / "out") == (
        f"{made}/adapter_model.safetensors: {key} updates a matrix of {LAYER}.mlp.experts.down_proj, "
        f"[{E}, 8, 8], of which it is not known whether it is (experts, out, in) or (experts, in, out); the "
        "update fits both."
    )


def test_dora_on_one_matrix_of_a_stack_is_refused(tmp_path):
    """It needs the norms of that matrix alone."""
    tensors, _, _ = stacks("Qwen3_5MoeForCausalLM")
    trained, _ = pair(f"{LAYER}.mlp.experts.0.down_proj", H, I)
    trained[f"base_model.model.{LAYER}.mlp.experts.0.down_proj.lora_magnitude_vector"] = random(H)
    path = checkpoint(tmp_path / "ckpt", tensors, "Qwen3_5MoeForCausalLM", model_type="qwen3_5_moe_text")
    made = adapter(tmp_path / "adapter", trained, use_dora=True)
    assert refused(path, made, tmp_path / "out").endswith(
        f"changes one matrix of {LAYER}.mlp.experts.down_proj, [{E}, {H}, {I}], in a way that is supported "
        "only where each expert has a tensor of its own."
    )


@pytest.mark.parametrize(
    ("module", "trainer"),
    [
        ("model.unembed_tokens", "Tinker"),
        (f"{LAYER}.linear_attn.in_proj_q", "Tinker"),
        (f"{LAYER}.mlp.experts.gate_up_projs.0", "Unsloth"),
        (f"{LAYER}.mlp.router.linear", "Unsloth"),
    ],
)
def test_a_refusal_says_whose_names_they_are(module, trainer, tmp_path):
    trained, _ = pair(module, 4, 4)
    path = checkpoint(tmp_path / "ckpt", {"a.weight": random(4, 4)}, "Anything", model_type="any")
    made = adapter(tmp_path / "adapter", trained)
    text = refused(path, made, tmp_path / "out")
    assert f"{module}.weight, which the checkpoint does not have, a name that {trainer} gives" in text


def test_tinkers_factors_must_fit_each_other(tmp_path):
    trained, _ = tinker()
    name = f"base_model.model.{LAYER}.mlp.experts.w1.lora_B.weight"
    trained[name] = trained[name][:, :, :1].contiguous()
    tensors, _, _ = stacks("Qwen3_5MoeForCausalLM")
    path = checkpoint(tmp_path / "ckpt", tensors, "Qwen3_5MoeForCausalLM", model_type="qwen3_5_moe_text")
    made = adapter(tmp_path / "adapter", trained)
    assert f"{name} is F32 [{E}, {I}, 1]; they do not make one update" in refused(
        path, made, tmp_path / "out"
    )
