"""Tied embeddings: LoRA on one side changes only that side in training, so the pair comes apart unless both
sides agree."""

import json
import time

import pytest
import torch
from oracle import config, read_adapter, read_tensors
from safetensors.torch import load_file, save_file

import lorafuse
from lorafuse.errors import AdapterError
from lorafuse.patches.dora import Dora

EMBED, HEAD = "model.embed_tokens.weight", "lm_head.weight"


def logits(model):
    with torch.no_grad():
        return model.eval()(torch.arange(1, 20)[None]).logits


def check(out_dir, peft, *, tied):
    """The written tie flag and tensors agree, and the model answers as the unmerged one."""
    from transformers import AutoModelForCausalLM

    assert config(out_dir)["tie_word_embeddings"] is tied
    assert (HEAD in read_tensors(out_dir)) is not tied
    merged, info = AutoModelForCausalLM.from_pretrained(
        out_dir, dtype=torch.float32, output_loading_info=True
    )
    assert not any(info.values())
    assert (logits(merged) - logits(peft)).abs().max() < 1e-4


CASES = {
    "embedding only": (False, {"target_modules": ["embed_tokens", "q_proj"]}),
    "head only": (False, {"target_modules": ["lm_head", "q_proj"]}),
    "both, each its own": (False, {"target_modules": ["embed_tokens", "lm_head"]}),
    "both, tied in training": (
        True,
        {"target_modules": ["embed_tokens", "lm_head"], "ensure_weight_tying": True},
    ),
    "embedding replaced": (False, {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]}),
    "both replaced, different": (
        False,
        {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens", "lm_head"]},
    ),
    "both replaced, equal": (
        True,
        {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"], "ensure_weight_tying": True},
    ),
    "untouched": (True, {"target_modules": ["q_proj"]}),
    "tokens": (True, {"target_modules": ["q_proj"], "trainable_token_indices": [3, 90, 7]}),
    "tokens of both, the same": (
        True,
        {
            "target_modules": ["q_proj"],
            "trainable_token_indices": {"embed_tokens": [3, 90], "lm_head": [3, 90]},
        },
    ),
    "tokens of both, different": (
        False,
        {
            "target_modules": ["q_proj"],
            "trainable_token_indices": {"embed_tokens": [3, 90, 7], "lm_head": [8]},
        },
    ),
    "tokens of the head only": (
        False,
        {"target_modules": ["q_proj"], "trainable_token_indices": {"lm_head": [8, 2]}},
    ),
    "tokens below LoRA of the head": (
        False,
        {"target_modules": ["lm_head"], "trainable_token_indices": [3, 90, 7]},
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_a_tied_pair(case, base, adapter, tmp_path):
    tied, settings = CASES[case]
    lora = adapter("fp32_tied", **settings)
    receipt = lorafuse.convert(base("fp32_tied"), lora, tmp_path / "out")
    check(tmp_path / "out", adapter.model, tied=tied)
    used, ignored = receipt["adapter_tensors"]["used"], receipt["adapter_tensors"]["ignored"]
    assert sorted([*used, *ignored]) == sorted(read_adapter(lora))


def test_the_head_of_a_quantized_base_comes_from_its_embedding(base, adapter, tmp_path):
    """The added head is the embedding before the update, bit for bit."""
    lora = adapter("nf4_tied", target_modules=["embed_tokens"])
    receipt = lorafuse.convert(base("nf4_tied"), lora, tmp_path / "out")
    found, stored = read_tensors(tmp_path / "out"), read_tensors(base("nf4_tied"))
    assert receipt["tensors"][HEAD]["action"] == "added"
    assert torch.equal(found[HEAD], stored[EMBED]) and not torch.equal(found[EMBED], stored[EMBED])


@pytest.mark.parametrize("whole", [False, True], ids=["rows", "rows and the embedding"])
@pytest.mark.parametrize(
    ("indices", "target"),
    [([3, 90, 7], "lm_head"), ({"embed_tokens": [3, 90, 7], "lm_head": [8, 3]}, "q_proj")],
    ids=["list", "dict"],
)
def test_tokens_of_an_untied_pair(indices, target, whole, base, adapter, tmp_path):
    save = {"save_embedding_layers": whole}
    lora = adapter("fp32", target_modules=[target], trainable_token_indices=indices, save=save)
    lorafuse.convert(base("fp32"), lora, tmp_path / "out")
    check(tmp_path / "out", adapter.model, tied=False)


def test_tokens_without_their_indices_are_refused(base, adapter, tmp_path):
    lora = adapter(
        "fp32", target_modules=["q_proj"], trainable_token_indices={"embed_tokens": [3], "lm_head": [8]}
    )
    settings = config(lora, "adapter_config.json") | {
        "trainable_token_indices": {"lm_head": [8], "other": [3]}
    }
    (lora / "adapter_config.json").write_text(json.dumps(settings))
    with pytest.raises(AdapterError, match=r"trainable_token_indices is .*, expected a list of integers\.$"):
        lorafuse.convert(base("fp32"), lora, tmp_path / "out")


def with_stored_head(source, target):
    """The same checkpoint with an equal lm_head.weight in the file, as some trainers write it."""
    target.mkdir()
    tensors = load_file(source / "model.safetensors")
    save_file(tensors | {HEAD: tensors[EMBED].clone()}, target / "model.safetensors")
    (target / "config.json").write_text((source / "config.json").read_text())
    return target


@pytest.mark.parametrize("together", [False, True])
def test_a_stored_head_follows_the_same_rule(together, base, adapter, tmp_path):
    ckpt = with_stored_head(base("fp32_tied"), tmp_path / "ckpt")
    targets = ["embed_tokens", "lm_head"] if together else ["embed_tokens"]
    lora = adapter("fp32_tied", target_modules=targets, ensure_weight_tying=together)
    lorafuse.convert(ckpt, lora, tmp_path / "out")
    found, stored = read_tensors(tmp_path / "out"), read_tensors(ckpt)
    assert config(tmp_path / "out")["tie_word_embeddings"] is together
    assert torch.equal(found[HEAD], found[EMBED] if together else stored[HEAD])


def test_a_patch_of_both_stored_sides_is_prepared_for_each(monkeypatch, base, adapter, tmp_path):
    """One side is in the file, the other has the same patch by ensure_weight_tying; the two are neighbours in
    the plan."""
    ckpt = with_stored_head(base("fp32_tied"), tmp_path / "ckpt")
    settings = {"target_modules": ["embed_tokens", "lm_head"], "use_dora": True, "ensure_weight_tying": True}
    lora = adapter("fp32_tied", save={"save_embedding_layers": False}, **settings)
    tensors = {key: tensor for key, tensor in read_adapter(lora).items() if "lm_head" not in key}
    save_file(tensors, lora / "adapter_model.safetensors")
    apply = Dora.apply
    monkeypatch.setattr(
        Dora, "apply", lambda *args: (time.sleep(0.05), apply(*args))
    )  # the first is not done when the second begins
    lorafuse.convert(ckpt, lora, tmp_path / "out")
    found = read_tensors(tmp_path / "out")
    assert torch.equal(found[HEAD], found[EMBED]) and not torch.equal(found[EMBED], read_tensors(ckpt)[EMBED])


def test_tokens_are_replaced_in_a_stored_head_too(base, adapter, tmp_path):
    ckpt = with_stored_head(base("fp32_tied"), tmp_path / "ckpt")
    lora = adapter("fp32_tied", target_modules=["q_proj"], trainable_token_indices=[3, 90, 7])
    lorafuse.convert(ckpt, lora, tmp_path / "out")
    found = read_tensors(tmp_path / "out")
    rows = read_adapter(lora)["base_model.model.model.embed_tokens.token_adapter.trainable_tokens_delta"]
    assert config(tmp_path / "out")["tie_word_embeddings"]
    assert torch.equal(found[EMBED][[3, 90, 7]], rows) and torch.equal(found[HEAD], found[EMBED])


def resized(adapter, base, kind, n_tokens=100, **settings):
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(base(kind), dtype=torch.float32)
    model.resize_token_embeddings(n_tokens, mean_resizing=False)
    return adapter(kind, model=model, save={"save_embedding_layers": True}, **settings)


@pytest.mark.parametrize("kind", ["fp32", "fp32_tied"])
def test_a_resized_vocabulary_is_taken_whole(kind, base, adapter, tmp_path):
    lora = resized(adapter, base, kind, target_modules=["q_proj"])
    lorafuse.convert(base(kind), lora, tmp_path / "out")
    assert config(tmp_path / "out")["vocab_size"] == 100
    check(tmp_path / "out", adapter.model, tied=kind == "fp32_tied")


def test_an_update_goes_on_top_of_a_resized_embedding(base, adapter, tmp_path):
    lora = resized(adapter, base, "fp32", target_modules=["embed_tokens", "lm_head"])
    lorafuse.convert(base("fp32"), lora, tmp_path / "out")
    check(tmp_path / "out", adapter.model, tied=False)


def test_a_vocabulary_resized_on_one_side_is_refused(base, adapter, tmp_path):
    lora = resized(adapter, base, "fp32", target_modules=["q_proj"])
    tensors = {key: t for key, t in read_adapter(lora).items() if "lm_head" not in key}
    save_file(tensors, lora / "adapter_model.safetensors")
    with pytest.raises(
        AdapterError, match=r"resizes the vocabulary on one side only: lm_head\.weight has 96 rows and"
    ):
        lorafuse.convert(base("fp32"), lora, tmp_path / "work" / "out")
    assert not (tmp_path / "work").exists()


@pytest.mark.parametrize("kind", ["fp32", "fp32_tied"])
@pytest.mark.parametrize("side", ["embed_tokens", "lm_head"])
def test_the_other_side_of_a_smaller_vocabulary_is_cut(side, kind, base, adapter, tmp_path):
    """PEFT saves the embedding below an update, here that of one side."""
    lora = resized(adapter, base, kind, n_tokens=90, target_modules=["q_proj", side])
    tensors = {key: t for key, t in read_adapter(lora).items() if "lora_" in key or f"{side}.base" in key}
    save_file(tensors, lora / "adapter_model.safetensors", {"format": "pt"})
    warned = []
    lorafuse.convert(base(kind), lora, tmp_path / "out", on_event=warned.append)
    assert config(tmp_path / "out")["vocab_size"] == 90
    check(tmp_path / "out", adapter.model, tied=False)
    said = [event["message"] for event in warned if event["event"] == "warning"]
    other = HEAD if side == "embed_tokens" else EMBED
    cut = f"the vocabulary has 90 tokens, not the checkpoint's 96; {other} is cut to the first 90 rows."
    assert any(cut in message for message in said) is (kind == "fp32")  # what is tied is saved with it


def test_an_embedding_update_without_its_rows_is_refused(base, adapter, tmp_path):
    """LoRA on a resized embedding whose rows were not saved."""
    lora = resized(adapter, base, "fp32", target_modules=["embed_tokens"])
    tensors = {key: t for key, t in read_adapter(lora).items() if "lora_" in key}
    save_file(tensors, lora / "adapter_model.safetensors")
    with pytest.raises(AdapterError, match="was the vocabulary resized without saving the embedding"):
        lorafuse.convert(base("fp32"), lora, tmp_path / "work" / "out")


def test_shared_embeddings_of_encoder_decoder_models_are_refused(base, adapter, tmp_path):
    """T5 scales its logits when the head is tied: untying it would change more than the weight."""
    ckpt = tmp_path / "ckpt"
    ckpt.mkdir()
    (ckpt / "model.safetensors").symlink_to(base("fp32_tied") / "model.safetensors")
    conf = config(base("fp32_tied")) | {"model_type": "t5", "architectures": ["T5ForConditionalGeneration"]}
    (ckpt / "config.json").write_text(json.dumps(conf))
    lora = adapter("fp32_tied", target_modules=["embed_tokens"])
    with pytest.raises(AdapterError, match="t5 shares between encoder, decoder and head"):
        lorafuse.convert(ckpt, lora, tmp_path / "out")
