"""Tied weights of classes whose head is not called lm_head or whose embedding has an unusual name: merged,
loaded,
and compared with the model that PEFT trained."""

import json

import pytest
import torch
import transformers as t
from oracle import config
from peft import LoraConfig, get_peft_model

import lorafuse
from lorafuse.errors import AdapterError

IDS = torch.tensor([[5, 60, 61, 7, 62, 9]])
ENCODER = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "max_position_embeddings": 40,
    "pad_token_id": 1,
}
DECODER = {
    "vocab_size": 64,
    "d_model": 32,
    "encoder_layers": 1,
    "decoder_layers": 1,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 48,
    "max_position_embeddings": 40,
    "pad_token_id": 1,
    "bos_token_id": 0,
    "eos_token_id": 2,
    "decoder_start_token_id": 2,
}
# class → (config, a module inside its layers, embedding, head)
CLASSES = {
    "BertForMaskedLM": (t.BertConfig(**ENCODER), "query", "word_embeddings", "cls.predictions.decoder"),
    "RobertaForMaskedLM": (t.RobertaConfig(**ENCODER), "query", "word_embeddings", "lm_head.decoder"),
    "DistilBertForMaskedLM": (
        t.DistilBertConfig(vocab_size=64, dim=32, hidden_dim=48, n_layers=1, n_heads=4),
        "q_lin",
        "word_embeddings",
        "vocab_projector",
    ),
    "ElectraForMaskedLM": (
        t.ElectraConfig(**ENCODER, embedding_size=32),
        "query",
        "word_embeddings",
        "generator_lm_head",
    ),
    "MambaForCausalLM": (
        t.MambaConfig(vocab_size=64, hidden_size=32, state_size=8, num_hidden_layers=1),
        "in_proj",
        "embeddings",
        "lm_head",
    ),
    "BioGptForCausalLM": (t.BioGptConfig(**ENCODER), "q_proj", "embed_tokens", "output_projection"),
    "XLNetLMHeadModel": (
        t.XLNetConfig(vocab_size=64, d_model=32, n_layer=1, n_head=4, d_inner=48),
        "layer_1",
        "word_embedding",
        "lm_loss",
    ),
    "TrOCRForCausalLM": (
        t.TrOCRConfig(
            vocab_size=64, d_model=32, decoder_layers=1, decoder_attention_heads=4, decoder_ffn_dim=48
        ),
        "q_proj",
        "embed_tokens",
        "output_projection",
    ),
    "WhisperForConditionalGeneration": (
        t.WhisperConfig(**DECODER | {"num_mel_bins": 8, "max_source_positions": 20}),
        "q_proj",
        "embed_tokens",
        "proj_out",
    ),
}
SHARED = {
    "BartForConditionalGeneration": t.BartConfig(**DECODER, forced_eos_token_id=None),
    "MarianMTModel": t.MarianConfig(**DECODER, forced_eos_token_id=None),
    "M2M100ForConditionalGeneration": t.M2M100Config(**DECODER),
}


def randomize(model, seed=0):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)
    return model


def logits(model):
    inputs = {"input_ids": IDS}
    if model.config.model_type == "whisper":
        inputs = {"input_features": torch.linspace(-1, 1, 8 * 40).reshape(1, 8, 40), "decoder_input_ids": IDS}
    elif model.config.is_encoder_decoder:
        inputs["decoder_input_ids"] = IDS
    with torch.no_grad():
        return model.eval()(**inputs).logits


def trained(name, settings, folder, *, n_tokens=64):
    """Writes base and adapter; returns the model that was trained."""
    cls = getattr(t, name)
    made = CLASSES[name][0] if name in CLASSES else SHARED[name]
    randomize(cls(made)).save_pretrained(folder / "base")
    model = cls.from_pretrained(folder / "base")
    if n_tokens != 64:
        model.resize_token_embeddings(n_tokens, mean_resizing=False)
    peft = get_peft_model(model, LoraConfig(r=4, **settings))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in peft.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.3)
    peft.save_pretrained(folder / "adapter")
    return peft


def check(name, settings, tmp_path, *, n_tokens=64):
    peft = trained(name, settings, tmp_path, n_tokens=n_tokens)
    receipt = lorafuse.convert(tmp_path / "base", tmp_path / "adapter", tmp_path / "out")
    merged, info = getattr(t, name).from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(info.values())
    assert (logits(merged) - logits(peft)).abs().max() < 1e-4 * logits(peft).abs().max()
    return receipt


@pytest.mark.parametrize("kind", ["LoRA on the embedding", "LoRA on the head", "both trained whole"])
@pytest.mark.parametrize("name", CLASSES)
def test_sides_that_were_trained_apart_come_apart(name, kind, tmp_path):
    _, inside, embed, head = CLASSES[name]
    settings = {
        "LoRA on the embedding": {"target_modules": [inside, embed]},
        "LoRA on the head": {"target_modules": [inside, head]},
        "both trained whole": {"target_modules": [inside], "modules_to_save": [embed, head]},
    }
    check(name, settings[kind], tmp_path)
    assert config(tmp_path / "out")["tie_word_embeddings"] is False


@pytest.mark.parametrize("name", ["BertForMaskedLM", "MambaForCausalLM", "WhisperForConditionalGeneration"])
def test_a_resized_vocabulary_stays_tied(name, tmp_path):
    check(name, {"target_modules": [CLASSES[name][1]]}, tmp_path, n_tokens=67)
    assert config(tmp_path / "out")["tie_word_embeddings"] and config(tmp_path / "out")["vocab_size"] == 67


def test_a_tied_bias_is_one_parameter(tmp_path):
    check("BertForMaskedLM", {"target_modules": ["query"], "bias": "all"}, tmp_path)
    assert config(tmp_path / "out")["tie_word_embeddings"]


def test_rows_of_a_head_with_a_bias_are_trained_without_it(tmp_path, caplog):
    """PEFT multiplies by the rows and adds no bias; its merge keeps the bias, and so does the output."""
    peft = trained(
        "DistilBertForMaskedLM", {"target_modules": ["q_lin"], "trainable_token_indices": [60]}, tmp_path
    )
    events = []
    lorafuse.convert(tmp_path / "base", tmp_path / "adapter", tmp_path / "out", on_event=events.append)
    assert any(
        "which PEFT then computes without vocab_projector.bias" in json.dumps(event) for event in events
    )
    merged = t.DistilBertForMaskedLM.from_pretrained(tmp_path / "out")
    assert (logits(merged) - merged.vocab_projector.bias - logits(peft)).abs().max() < 1e-4


@pytest.mark.parametrize("name", SHARED)
def test_rows_that_three_share_are_replaced_in_all(name, tmp_path):
    check(name, {"target_modules": ["q_proj"], "trainable_token_indices": [60, 61]}, tmp_path)


@pytest.mark.parametrize("name", SHARED)
def test_what_three_share_does_not_come_apart(name, tmp_path):
    trained(name, {"target_modules": ["q_proj", "lm_head"]}, tmp_path)
    with pytest.raises(AdapterError, match="shares between encoder, decoder and head; that is not supported"):
        lorafuse.convert(tmp_path / "base", tmp_path / "adapter", tmp_path / "out")


def test_a_bias_of_logits_that_was_resized_too_is_missed(tmp_path):
    trained("BartForConditionalGeneration", {"target_modules": ["q_proj"]}, tmp_path, n_tokens=67)
    with pytest.raises(
        AdapterError, match=r"one side only: final_logits_bias has 64 rows and .* save the base"
    ):
        lorafuse.convert(tmp_path / "base", tmp_path / "adapter", tmp_path / "out")


def test_a_bias_of_logits_loses_the_rows_that_the_vocabulary_loses(tmp_path):
    check("BartForConditionalGeneration", {"target_modules": ["q_proj"]}, tmp_path, n_tokens=63)
    assert config(tmp_path / "out")["vocab_size"] == 63
