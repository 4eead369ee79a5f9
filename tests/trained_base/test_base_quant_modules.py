"""Which weights --base-quant quantizes: those that transformers does when it loads the model, found without a
model."""

import json

import pytest
import torch
import transformers
from transformers import BitsAndBytesConfig
from transformers.quantizers.quantizers_utils import should_convert_module

from lorafuse.codecs import Arena, open_weights
from lorafuse.codecs.dense import DenseSources
from lorafuse.errors import CheckpointError
from lorafuse.files.checkpoint import Checkpoint
from lorafuse.files.local_folder import LocalFolder
from lorafuse.files.tensors import Box
from lorafuse.settings import BaseQuant
from lorafuse.trained_base.base_weights import as_trained, load_dtype
from lorafuse.trained_base.linear_layers import load_table
from lorafuse.trained_base.skip_lists import is_skipped
from lorafuse.trained_base.trainer_configs import read_base_quant

SIZES = {
    "vocab_size": 96,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}
GROUPED = SIZES | {"num_key_value_heads": 2}
TOKENS = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
VISION = SIZES | {"image_size": 28, "patch_size": 14}
T5 = {
    "vocab_size": 96,
    "d_model": 64,
    "d_kv": 16,
    "d_ff": 96,
    "num_layers": 2,
    "num_heads": 4,
    "decoder_start_token_id": 0,
}
MIXTURE = {"num_local_experts": 2, "num_experts_per_tok": 1}
# Class → fields of its config.
MODELS = {
    "LlamaForCausalLM": GROUPED | {"tie_word_embeddings": False},
    "LlamaForCausalLM tied": GROUPED | {"tie_word_embeddings": True},
    "Qwen2ForCausalLM": GROUPED,
    "GPT2LMHeadModel": {"vocab_size": 96, "n_positions": 32, "n_embd": 64, "n_layer": 2, "n_head": 4},
    "OPTForCausalLM": SIZES | {"ffn_dim": 96, "word_embed_proj_dim": 32, "max_position_embeddings": 32},
    "MixtralForCausalLM": GROUPED | MIXTURE,
    "PhimoeForCausalLM": GROUPED | MIXTURE,
    "Phi3ForCausalLM": GROUPED,
    "Gemma2ForCausalLM": GROUPED | {"head_dim": 16},
    "GPTNeoXForCausalLM": SIZES,
    "T5ForConditionalGeneration": T5 | {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False},
    "BertForMaskedLM": SIZES,
    "FalconForCausalLM": SIZES,
    "LlamaForSequenceClassification": GROUPED,
}


def build(name):
    cls = getattr(transformers, name.split()[0])
    torch.manual_seed(0)
    return cls(cls.config_class(**TOKENS | MODELS[name])).to(torch.bfloat16)


def llava():
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

    torch.manual_seed(0)
    text, vision = LlamaConfig(**TOKENS | GROUPED), CLIPVisionConfig(**VISION, projection_dim=64)
    return LlavaForConditionalGeneration(
        LlavaConfig(vision_config=vision, text_config=text, image_token_index=5)
    ).to(torch.bfloat16)


def both(model, path, **settings):
    """The checkpoint, and the one that transformers and bitsandbytes write after loading it quantized."""
    model.save_pretrained(path / "dense")
    config = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, **settings
    )
    type(model).from_pretrained(path / "dense", quantization_config=config).save_pretrained(path / "stored")
    return Checkpoint(LocalFolder(path / "dense")), Checkpoint(LocalFolder(path / "stored"))


def quantized(weights):
    return {name for name, sources in weights.items() if not isinstance(sources, DenseSources)}


def whole(sources):
    return sources.values(Box.whole(sources.spec), Arena(torch.device("cpu"))).clone()


def unmatched_by_5(model, skip):
    """The entries that match no layer of the model, by transformers' own rule."""
    layers = [name for name, module in model.named_modules() if list(module.parameters(recurse=False))]
    return [entry for entry in skip if all(should_convert_module(name, [entry]) for name in layers)]


def without_match(folder, entries, version="5"):
    return (
        f"{folder}: {', '.join(entries)}: of the names of modules that training did not quantize, these "
        f"match no module, by the rule of transformers {version}."
    )


def check(model, path, quant, warnings=(), **settings):
    dense, stored = both(model, path, **settings)
    said = []
    made, expected = as_trained(open_weights(dense), dense, quant, said.append), open_weights(stored)
    assert quantized(made) == quantized(expected)
    assert all(torch.equal(whole(made[name]), whole(expected[name])) for name in quantized(made))
    assert said == list(warnings)
    return made


@pytest.mark.parametrize("name", sorted(MODELS.keys() - {"FalconForCausalLM"}))
def test_as_transformers(name, tmp_path):
    """The same weights with the same values, for a model of each kind."""
    assert check(build(name), tmp_path, BaseQuant(kind="nf4"))


def test_a_vision_model_too(tmp_path):
    """Layers of the tower and the projector are quantized like those of the language model."""
    made = check(llava(), tmp_path, BaseQuant(kind="nf4"))
    assert sum("vision_tower" in name for name in quantized(made)) == 12


@pytest.mark.parametrize("name", ["LlamaForCausalLM", "LlamaForCausalLM tied", "T5ForConditionalGeneration"])
@pytest.mark.parametrize(
    "skip",
    [
        ("q_proj",),
        ("model.layers.1", "lm_head"),
        ("layers.1.mlp",),
        (r"model\.layers\.\d+\.mlp", "encoder.*"),
        ("v_pro",),
    ],
    ids=str,
)
def test_a_list_replaces_the_default(name, skip, tmp_path):
    """Without lm_head in it, an untied output embedding is quantized; T5's `wo` never is. Entries that match
    no module are warned of."""
    model = build(name)
    check(
        model,
        tmp_path,
        BaseQuant(kind="nf4", skip=skip),
        warnings=[without_match(tmp_path / "dense", unmatched)]
        if (unmatched := unmatched_by_5(model, skip))
        else [],
        llm_int8_skip_modules=list(skip),
    )


def test_single_experts_are_quantized_on_request(tmp_path):
    """transformers 5 keeps a mixture's experts in full precision, as one parameter; 4 had a linear layer for
    each matrix."""
    build("MixtralForCausalLM").save_pretrained(tmp_path)
    ckpt, said = Checkpoint(LocalFolder(tmp_path)), []
    weights = open_weights(ckpt)
    experts = {name for name in weights if ".experts." in name}
    made = [
        quantized(as_trained(weights, ckpt, BaseQuant(kind="nf4", experts=value), said.append))
        for value in (False, True)
    ]
    assert experts and not made[0] & experts and made[1] == made[0] | experts
    assert said == [
        f"{tmp_path}: its routers are left in full precision, although transformers 4, which quantized "
        "experts, quantized those that were linear layers too."
    ]


def test_experts_that_were_quantized_together_are_refused(tmp_path):
    """By axolotl; a model without experts is what it is without that setting."""
    quant = BaseQuant(kind="nf4", stacked_experts=True)
    build("LlamaForCausalLM").save_pretrained(tmp_path / "llama")
    ckpt = Checkpoint(LocalFolder(tmp_path / "llama"))
    assert len(quantized(as_trained(open_weights(ckpt), ckpt, quant, print))) == 14
    build("MixtralForCausalLM").save_pretrained(tmp_path / "mixtral")
    ckpt = Checkpoint(LocalFolder(tmp_path / "mixtral"))
    with pytest.raises(CheckpointError) as e:
        as_trained(open_weights(ckpt), ckpt, quant, print)
    assert str(e.value) == (
        f"{tmp_path}/mixtral: model.layers.0.block_sparse_moe.experts.0.w1.weight is of an expert. axolotl's "
        "quantize_moe_experts quantized the experts of a layer together, which --base-quant-from does not "
        "simulate. --base-quant nf4 --quant-experts quantizes each expert by itself: only the second "
        "quantization, that of the scales, then differs."
    )


def test_experts_are_asked_for_where_there_are_none(tmp_path):
    build("LlamaForCausalLM").save_pretrained(tmp_path)
    ckpt, said = Checkpoint(LocalFolder(tmp_path)), []
    as_trained(open_weights(ckpt), ckpt, BaseQuant(kind="nf4", experts=True), said.append)
    assert said == [f"{tmp_path}: holds no matrix of a single expert, which --quant-experts would quantize."]


def test_a_model_that_is_not_known_is_taken_by_its_names(tmp_path):
    model = build("LlamaForCausalLM")
    model.save_pretrained(tmp_path)
    config = (tmp_path / "config.json").read_text().replace('"llama"', '"of_tomorrow"')
    (tmp_path / "config.json").write_text(config)
    ckpt, said = Checkpoint(LocalFolder(tmp_path)), []
    made = as_trained(open_weights(ckpt), ckpt, BaseQuant(kind="nf4"), said.append)
    assert len(quantized(made)) == 14
    assert said == [
        f"{tmp_path}: of of_tomorrow it is not known which layers are quantized on loading; 14 of 21 weights "
        "are, by their names."
    ]


@pytest.mark.parametrize(
    ("name", "skip"), [("LlamaForCausalLM", ("model", "lm_head")), ("FalconForCausalLM", None)]
)
def test_nothing_to_quantize_is_refused(name, skip, tmp_path):
    """All is on the list; or no layer is of class nn.Linear itself, and transformers 5 quantizes none."""
    model = build(name)
    assert name != "FalconForCausalLM" or not quantized(open_weights(both(model, tmp_path / "falcon")[1]))
    model.save_pretrained(tmp_path)
    ckpt = Checkpoint(LocalFolder(tmp_path))
    with pytest.raises(CheckpointError) as e:
        as_trained(open_weights(ckpt), ckpt, BaseQuant(kind="nf4", skip=skip), print)
    assert (
        str(e.value)
        == f"{tmp_path}: transformers 5 quantizes no weight of it on loading; leave --base-quant out."
    )


def test_the_dtype_of_loading(tmp_path):
    """That of config.json; without one, that of the weight."""
    build("LlamaForCausalLM").save_pretrained(tmp_path)
    ckpt = Checkpoint(LocalFolder(tmp_path))
    sources = next(iter(open_weights(ckpt).values()))
    assert load_dtype(ckpt, sources) == "bfloat16"
    for config, expected in (
        ({"dtype": "float16"}, "float16"),
        ({"torch_dtype": "float32"}, "float32"),
        ({}, "bfloat16"),
    ):
        ckpt.config = config
        assert load_dtype(ckpt, sources) == expected


def test_entries_of_a_list_match_as_in_transformers():
    names = [
        "lm_head",
        "model.layers.1.mlp.up_proj",
        "model.layers.11.mlp.up_proj",
        "model.layers.1.mlp.gate",
        "visual.merger",
    ]
    entries = ["model.layers.1", "up_proj", "mlp", r".*mlp\.gate", "visual.", "model|visual", "lm", "head"]
    for entry in entries:
        for name in names:
            assert is_skipped(name, [entry]) is not should_convert_module(name, [entry])


def test_the_table_is_of_the_version_that_is_tested():
    assert load_table()["transformers"] == "5.23.0"


OLD_LISTS = {
    # Of checkpoints with a quantized language model alone, and of transformers' own documentation.
    "4.37.2": ("vision_tower", "lm_head", "layers.1.mlp", "rojector"),
    "4.39.3": ("model.layers.1", "visual"),
    "4.44.0": ("vision_tower", "layers.1.mlp", "self_atn", "q_proj"),
    "4.51.3": ("language_model.model.layers.1.mlp", "vision_tower", "multi_modal_projector", "merger"),
    "4.57.1": ("model.language_model.layers.1.mlp", "model.vision_tower", "up_proj", "layer.1"),
}


def by_transformers_4(name, skip, version):
    """Whether transformers 4 leaves a linear layer as it is, as its loops are written: 4.39 and 4.57."""
    parts, last = name.split("."), name.split(".")[-1]
    if version < "4.40":
        return any(key in ".".join(parts) for key in skip)
    whole = ".".join(parts)
    return last in skip or any((key + "." in whole) or (key == whole) for key in skip)


def old_name(name):
    """Of a module of Llava, before 4.52, and on disk until today."""
    if name == "lm_head":
        return "language_model.lm_head"
    return name.removeprefix("model.").replace("language_model", "language_model.model")


@pytest.mark.parametrize("version", OLD_LISTS)
def test_a_list_is_read_by_the_rule_and_the_names_of_its_version(version, tmp_path):
    """Of a config.json, which says what wrote it."""
    model, skip, dense = llava(), OLD_LISTS[version], tmp_path / "dense"
    model.save_pretrained(dense)
    old = {name: old_name(name) for name, module in model.named_modules() if type(module) is torch.nn.Linear}
    assert {f"{name}.weight" for name in old.values()} <= open_weights(Checkpoint(LocalFolder(dense))).keys()
    listed_names = old if version < "4.52" else {name: name for name in old}
    left = {name for name in old if by_transformers_4(listed_names[name], skip, version)}
    path = tmp_path / "config.json"
    said = {"load_in_4bit": True, "quant_method": "bitsandbytes", "llm_int8_skip_modules": list(skip)}
    path.write_text(json.dumps({"transformers_version": version, "quantization_config": said}))
    quant, warnings = read_base_quant(path), []
    assert quant.that_decide_bytes["skip_version"] == version
    ckpt = Checkpoint(LocalFolder(dense))
    chosen = quantized(as_trained(open_weights(ckpt), ckpt, quant, warnings.append))
    assert chosen == {f"{old[name]}.weight" for name in old.keys() - left}
    nowhere = [
        entry
        for entry in skip
        if not any(by_transformers_4(name, [entry], version) for name in listed_names.values())
    ]
    assert left and warnings == ([without_match(dense, nowhere, version)] if nowhere else [])


def test_a_list_of_transformers_5_is_read_by_its_rule(tmp_path):
    """Also one of a file that does not say what wrote it."""
    path = tmp_path / "config.json"
    said = {"load_in_4bit": True, "llm_int8_skip_modules": ["lm_head"]}
    for version in ({}, {"transformers_version": "5.0.0"}, {"transformers_version": "5.23.0.dev0"}):
        path.write_text(json.dumps({"model_type": "llama", "quantization_config": said, **version}))
        assert read_base_quant(path) == BaseQuant(kind="fp4", double_quant=False, skip=("lm_head",))
