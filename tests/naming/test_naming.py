"""Names: every name that an adapter may use for a weight, against transformers' own renaming and PEFT's
unmerged models."""

import json

import pytest
import torch
import transformers
from models import spread
from oracle import config, read_adapter, read_tensors
from peft import LoraConfig, get_peft_model
from renamed_models import answers, tiny
from safetensors.torch import load_file, save_file
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, rename_source_key, revert_weight_conversion

import lorafuse
from lorafuse.adapters.reading.keys import plain_name
from lorafuse.errors import AdapterError
from lorafuse.naming.aliases import Unsupported, find
from lorafuse.naming.resolve import Resolver
from lorafuse.naming.table import Renames

CLASSES = [
    "LlamaForCausalLM", "GPT2LMHeadModel", "GPTNeoXForCausalLM", "BertForMaskedLM", "MixtralForCausalLM",
    "MixtralModel",
    "Qwen2MoeForCausalLM", "Qwen3MoeForCausalLM", "OlmoeForCausalLM", "PhimoeForCausalLM",
    "DeepseekV3ForCausalLM",
    "GptOssForCausalLM", "GraniteMoeForCausalLM", "JambaForCausalLM", "LlavaForConditionalGeneration",
    "LlavaModel",
    "LlavaNextForConditionalGeneration", "Gemma3ForConditionalGeneration",
    "PaliGemmaForConditionalGeneration",
    "Mistral3ForConditionalGeneration", "InternVLForConditionalGeneration", "MllamaForConditionalGeneration",
    "Qwen2VLForConditionalGeneration", "Qwen2_5_VLForConditionalGeneration",
    "Qwen3VLMoeForConditionalGeneration",
    "Qwen2AudioForConditionalGeneration", "ViTForImageClassification", "ViTModel", "DeiTModel", "BeitModel",
    "Dinov2Model",
    "ASTModel", "CLIPModel", "SiglipModel", "NomicBertForMaskedLM", "NomicBertModel", "Qwen3_5ForCausalLM",
    "KimiLinearForCausalLM", "Molmo2ForConditionalGeneration", "Ernie4_5_VLMoeForConditionalGeneration",
]  # fmt: skip
# Made by operations that move single rows about.
UNSUPPORTED = {"Molmo2ForConditionalGeneration": 6, "Ernie4_5_VLMoeForConditionalGeneration": 4}


def on_meta(name):
    cls = getattr(transformers, name)
    conf = cls.config_class()
    for part in (conf, getattr(conf, "text_config", conf), getattr(conf, "vision_config", conf)):
        if not hasattr(part, "layer_types") and hasattr(part, "num_hidden_layers"):
            part.num_hidden_layers = 2
    with torch.device("meta"):
        return cls(conf)


def config_of(model):
    return json.loads(model.config.to_json_string(use_diff=False)) | {"architectures": [type(model).__name__]}


@pytest.mark.parametrize("name", CLASSES)
def test_names_and_shapes_are_those_of_transformers(name):
    """For every tensor that transformers would save: the name that it gives it when loading, and the shapes
    of all parameters."""
    model = on_meta(name)
    state = model.state_dict()
    saved = {key: tuple(t.shape) for key, t in revert_weight_conversion(model, dict(state)).items()}
    rules = get_model_conversion_mapping(model)
    converters = [rule for rule in rules if isinstance(rule, WeightConverter)]
    renamings = [rule for rule in rules if not isinstance(rule, WeightConverter)]
    renames = Renames(config_of(model))
    for key in sorted(saved):
        assert renames.memory_names(key)[0][0] == rename_source_key(key, renamings, converters)[0], key
    found = find(saved, state, renames.memory_names, model.config.model_type)
    assert found.keys() == state.keys()
    supported = {key: parameter for key, parameter in found.items() if not isinstance(parameter, Unsupported)}
    assert len(found) - len(supported) == UNSUPPORTED.get(name, 0)
    for key, parameter in supported.items():
        assert parameter.shape == tuple(state[key].shape) or parameter.parts[0].transposed, key


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """saved(kind) → a checkpoint as transformers writes it, not to be changed."""
    root = tmp_path_factory.mktemp("named")

    def get(kind):
        if not (root / kind).exists():
            spread(tiny(kind)).save_pretrained(root / kind)
        return root / kind

    return get


@pytest.mark.parametrize("kind", ["mixtral", "qwen3_moe", "nomic_bert", "vit", "gemma3"])
def test_the_parts_of_a_parameter_are_what_loading_puts_together(kind, saved):
    """Every row of every parameter in memory is the row of the stored weight that its part says."""
    model = type(tiny(kind)).from_pretrained(saved(kind), dtype=torch.float32)
    stored, memory = read_tensors(saved(kind)), model.state_dict()
    shapes = {name: tuple(t.shape) for name, t in stored.items()}
    resolver = Resolver(shapes, config(saved(kind)))
    wanted = {name: name for name in memory if name not in model.all_tied_weights_keys}
    for name, parameter in resolver.resolve(wanted, "adapter", print).items():
        for part in parameter.parts:
            matrix = memory[name] if part.expert is None else memory[name][part.expert]
            weight = stored[part.weight]
            if not part.whole:
                matrix = matrix[part.row : part.row + part.n_rows]
                weight = weight[part.weight_row : part.weight_row + part.n_rows]
            assert torch.equal(matrix, weight), name


def train(model, **settings):
    """PEFT's model and no factor zero."""
    torch.manual_seed(1)
    peft = get_peft_model(model, LoraConfig(**{"r": 4, "lora_alpha": 8} | settings))
    with torch.no_grad():
        for p in peft.parameters():
            if p.requires_grad:
                p.add_(torch.randn_like(p) * 0.05)
    return peft.eval()


TRAINED = {
    "gpt_neox": ["query_key_value", "lm_head"],
    "nomic_bert": ["q_proj", "v_proj", "up_proj", "o_proj"],
    "vit": ["q_proj", "fc1", "classifier"],
    "gemma3": ["q_proj", "fc1", "down_proj"],
    "llava": ["q_proj", "fc1", "linear_1", "lm_head"],
}


@pytest.mark.parametrize("kind", TRAINED)
def test_names_of_transformers_5(kind, saved, tmp_path):
    """An adapter that PEFT trained now, on a checkpoint with its own names: the answers of the unmerged
    model."""
    cls = type(tiny(kind))
    peft = train(cls.from_pretrained(saved(kind), dtype=torch.float32), target_modules=TRAINED[kind])
    peft.save_pretrained(tmp_path / "adapter", save_embedding_layers=False)
    lorafuse.convert(saved(kind), tmp_path / "adapter", tmp_path / "out")
    assert read_tensors(tmp_path / "out").keys() == read_tensors(saved(kind)).keys()
    merged, info = cls.from_pretrained(tmp_path / "out", dtype=torch.float32, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    base = cls.from_pretrained(saved(kind), dtype=torch.float32)
    assert (
        (answers(merged) - answers(peft)).abs().max() < 1e-4 < (answers(merged) - answers(base)).abs().max()
    )


def write_adapter(path, modules, **settings):
    """LoRA of rank 2 on modules, given with their (out, in)."""
    torch.manual_seed(2)
    tensors = {}
    for module, (n_out, n_in) in modules.items():
        tensors[f"base_model.model.{module}.lora_A.weight"] = torch.randn(2, n_in)
        tensors[f"base_model.model.{module}.lora_B.weight"] = torch.randn(n_out, 2)
    path.mkdir(exist_ok=True)
    save_file(tensors, path / "adapter_model.safetensors")
    (path / "adapter_config.json").write_text(
        json.dumps({"peft_type": "LORA", "r": 2, "lora_alpha": 4} | settings)
    )
    return path


GEMMA = "language_model.model.layers.0.self_attn.q_proj"
TOWER = "vision_tower.encoder.layers.0.self_attn.q_proj"


def merged_weights(ckpt, adapter, out):
    events = []
    receipt = lorafuse.convert(ckpt, adapter, out, on_event=events.append)
    said = [event["message"] for event in events if event["event"] == "warning"]
    return sorted(n for n, entry in receipt["tensors"].items() if entry["action"] == "merged"), said


NAMED = {
    "disk": ("gemma3", [GEMMA, TOWER], [GEMMA, TOWER], False),
    "transformers 4 and 5": (
        "gemma3",
        [f"model.{GEMMA}".replace("el.model", "el"), f"model.{TOWER}"],
        [GEMMA, TOWER],
        False,
    ),
    "headless": ("gemma3", [GEMMA.replace("el.model", "el"), TOWER], [GEMMA, TOWER], False),
    "its text model alone": ("gemma3", ["model.layers.0.self_attn.q_proj"], [GEMMA], True),
    "its text model alone, headless": ("gemma3", ["layers.0.self_attn.q_proj"], [GEMMA], True),
    "qwen2_5_vl, old": (
        "qwen2_5_vl",
        ["model.layers.0.self_attn.q_proj"],
        ["model.layers.0.self_attn.q_proj"],
        False,
    ),
    "qwen2_5_vl, new": (
        "qwen2_5_vl",
        ["model.language_model.layers.0.self_attn.q_proj", "model.visual.blocks.0.attn.proj"],
        ["model.layers.0.self_attn.q_proj", "visual.blocks.0.attn.proj"],
        False,
    ),
    "vit, old": (
        "vit",
        ["vit.encoder.layer.1.attention.attention.query"],
        ["vit.encoder.layer.1.attention.attention.query"],
        False,
    ),
    "vit, headless and new": (
        "vit",
        ["layers.1.attention.q_proj"],
        ["vit.encoder.layer.1.attention.attention.query"],
        False,
    ),
}


@pytest.mark.parametrize("case", NAMED)
def test_each_kind_of_name(case, saved, tmp_path):
    kind, modules, weights, warned = NAMED[case]
    lora = write_adapter(tmp_path / "adapter", dict.fromkeys(modules, (32, 32)))
    merged, said = merged_weights(saved(kind), lora, tmp_path / "out")
    assert merged == sorted(f"{name}.weight" for name in weights)
    assert len(said) == warned and all("other prefixes" in message for message in said)


def test_gpt2_of_the_hub_has_no_base_prefix(base, adapter, tmp_path):
    ckpt = tmp_path / "ckpt"
    ckpt.mkdir()
    tensors = {
        name.removeprefix("transformer."): t
        for name, t in load_file(base("gpt2") / "model.safetensors").items()
    }
    save_file(tensors, ckpt / "model.safetensors")
    (ckpt / "config.json").write_text((base("gpt2") / "config.json").read_text())
    merged, said = merged_weights(
        ckpt, adapter("gpt2", target_modules=["c_attn"], fan_in_fan_out=True), tmp_path / "out"
    )
    assert merged == ["h.0.attn.c_attn.weight", "h.1.attn.c_attn.weight"] and said == []


@pytest.mark.parametrize("modules", [["mlp.gate"], ["block_sparse_moe.gate"]])
def test_a_checkpoint_in_the_names_of_transformers_5(modules, tmp_path):
    """Saved without reverting the names; adapters with old and new names find their weights."""
    spread(tiny("mixtral")).save_pretrained(tmp_path / "ckpt", save_original_format=False)
    lora = write_adapter(tmp_path / "adapter", {f"model.layers.0.{name}": (4, 32) for name in modules})
    merged, _ = merged_weights(tmp_path / "ckpt", lora, tmp_path / "out")
    assert merged == ["model.layers.0.mlp.gate.weight"]


REFUSED = {
    "two kinds of names": (
        "gemma3",
        [GEMMA, f"model.{TOWER}"],
        f"{GEMMA}.weight is one of the checkpoint's names and model.{TOWER}.weight one of transformers 5's; "
        "an adapter's names must all be of one kind.",
    ),
    "a tower without its name": (
        "gemma3",
        ["encoder.layers.0.self_attn.q_proj"],
        "base_model.model.encoder.layers.0.self_attn.q_proj.lora_A.weight belongs to "
        "encoder.layers.0.self_attn.q_proj.weight, which the checkpoint does not have (nearest: "
        "vision_tower.encoder.layers.0.self_attn.q_proj.weight, "
        "vision_tower.encoder.layers.1.self_attn.q_proj.weight, "
        "language_model.model.layers.0.self_attn.q_proj.weight).",
    ),
    "some that are nowhere": (
        "llava",
        [GEMMA, GEMMA.replace("0", "5"), GEMMA.replace("0", "6")],
        "base_model.model.language_model.model.layers.5.self_attn.q_proj.lora_A.weight belongs to "
        "language_model.model.layers.5.self_attn.q_proj.weight, which the checkpoint does not have (nearest: "
        "language_model.model.layers.1.self_attn.q_proj.weight, "
        "language_model.model.layers.0.self_attn.q_proj.weight, "
        "vision_tower.encoder.layers.1.self_attn.q_proj.weight). The same is true of 1 more: "
        "language_model.model.layers.6.self_attn.q_proj.weight.",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_names_that_follow_no_rule_are_refused(case, saved, tmp_path):
    kind, modules, message = REFUSED[case]
    lora = write_adapter(tmp_path / "adapter", dict.fromkeys(modules, (32, 32)))
    with pytest.raises(AdapterError) as caught:
        lorafuse.convert(saved(kind), lora, tmp_path / "work" / "out")
    assert str(caught.value) == f"{lora}/adapter_model.safetensors: {message}"
    assert not (tmp_path / "work").exists()


def test_a_name_that_means_two_weights_is_refused():
    """Two rules that both find everything must find the same."""
    shapes = {"visual.x.weight": (4, 4), "model.visual.x.weight": (4, 4)}
    config = {"architectures": ["Qwen2_5_VLForConditionalGeneration"], "model_type": "qwen2_5_vl"}
    with pytest.raises(AdapterError) as caught:
        Resolver(shapes, config).resolve({"model.visual.x.weight": "key"}, "file", print)
    assert str(caught.value) == (
        "file: key may belong to model.visual.x.weight, by the checkpoint's names, or to one that is "
        "model.visual.x.weight and visual.x.weight, by transformers 5's names; which is meant?"
    )


def test_what_is_made_by_moving_single_rows_is_refused():
    """A rotary permutation has no place in tiles of rows."""
    shapes = {"vision_tower.encoder.blocks.0.wqkv.weight": (96, 32)}
    config = {"architectures": ["Kimi_K25ForConditionalGeneration"], "model_type": "kimi_k25"}
    with pytest.raises(AdapterError) as caught:
        Resolver(shapes, config).resolve(
            {"model.vision_tower.layers.0.attn.q_proj.weight": "key"}, "file", print
        )
    assert str(caught.value) == (
        "file: key belongs to model.vision_tower.layers.0.attn.q_proj.weight, which is made from "
        "vision_tower.encoder.blocks.0.wqkv.weight by chunk0 and PermuteForRope, which is not supported."
    )


P = "base_model.model."
Q = "model.layers.0.self_attn.q_proj"


@pytest.mark.parametrize(
    "key",
    [
        f"{P}{Q}",
        f"{P}{P}{Q}",
        f"module.{P}{Q}",
        f"_orig_mod.{P}{Q}",
        f"{P}_orig_mod.{Q}",
        Q,
        f"module.{Q}",
        f"module._orig_mod.{P}{Q}",
        f"{P}{Q}".replace("self_attn", "_fsdp_wrapped_module.self_attn"),
    ],
)
def test_prefixes_of_wrappers_are_dropped(key):
    assert plain_name(key) == Q


def test_a_module_of_the_name_module_is_kept():
    assert (
        plain_name(f"{P}module.{Q}") == f"module.{Q}" and plain_name(f"{P}my_orig_mod.x") == "my_orig_mod.x"
    )


def test_dropped_prefixes_are_said_once(base, adapter, tmp_path):
    lora = adapter("fp32", target_modules=["q_proj"])
    save_file(
        {key.removeprefix(P): t for key, t in read_adapter(lora).items()}, lora / "adapter_model.safetensors"
    )
    merged, said = merged_weights(base("fp32"), lora, tmp_path / "out")
    assert len(merged) == 2
    assert said == [
        f"{lora}/adapter_model.safetensors: {Q}.lora_A.weight is taken for {P}{Q}.lora_A.weight; PEFT itself "
        "would not load keys of this form."
    ]


def test_an_update_that_needs_the_whole_of_a_joined_weight_is_refused(saved, tmp_path):
    """A replaced q_proj would be rows of Wqkv."""
    lora = write_adapter(tmp_path / "adapter", {})
    key = f"{P}nomic_bert.layers.0.self_attn.q_proj.weight"
    save_file({key: torch.zeros(32, 32)}, lora / "adapter_model.safetensors")
    with pytest.raises(AdapterError) as caught:
        lorafuse.convert(saved("nomic_bert"), lora, tmp_path / "work" / "out")
    assert str(caught.value).endswith(
        f"{key} replaces a parameter that the checkpoint stores in another form, in "
        "nomic_bert.encoder.layers.0.attn.Wqkv.weight; that is not supported."
    )
    assert not (tmp_path / "work").exists()


def test_the_table_says_what_it_was_made_from():
    from lorafuse.naming.table import load_table

    table = load_table()
    assert table["transformers"] == transformers.__version__ and table["v4"]["transformers"] == "4.57.1"
    assert len(table["rules"]) > 200 and len(table["classes"]) > 400


@pytest.mark.parametrize(
    ("model_class", "prefix"),
    [
        ("LlamaForCausalLM", "model"),
        ("LlamaForQuestionAnswering", "transformer"),
        ("GPT2LMHeadModel", "transformer"),
        ("Else", "model"),
    ],
)
def test_the_base_prefix_is_that_of_the_class(model_class, prefix):
    """Some classes of one model type have another than the rest."""
    kind = "gpt2" if model_class.startswith("GPT2") else "llama"
    assert Renames({"model_type": kind, "architectures": [model_class]}).base_prefix == prefix
