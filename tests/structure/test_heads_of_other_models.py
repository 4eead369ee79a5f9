"""Task heads of vision, audio and vision-language classes, and for another number of labels: transformers
loads the output without a word and computes what unmerged PEFT does."""

import pytest
import torch
import transformers as t
from oracle import config, read_tensors
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file

import lorafuse
from lorafuse.errors import AdapterError

SMALL = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
IMAGE = SMALL | {"image_size": 16, "patch_size": 8}
TEXT = SMALL | {"vocab_size": 64, "num_key_value_heads": 2, "head_dim": 8, "pad_token_id": 0}
SPEECH = SMALL | {
    "conv_dim": (8, 8),
    "conv_kernel": (4, 4),
    "conv_stride": (4, 4),
    "num_feat_extract_layers": 2,
    "num_conv_pos_embeddings": 4,
    "num_conv_pos_embedding_groups": 2,
    "classifier_proj_size": 12,
    "codevector_dim": 16,
    "proj_codevector_dim": 16,
    "num_codevectors_per_group": 4,
    "apply_spec_augment": False,
}
TOWER = SMALL | {"image_size": 16, "patch_size": 8, "projection_dim": 16}
LINEAR = {
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "layer_types": ["linear_attention", "full_attention"],
}
SEEING = {"depth": 1, "hidden_size": 16, "intermediate_size": 32, "num_heads": 2, "patch_size": 8}
SEGFORMER = {
    "depths": [1, 1, 1, 1],
    "hidden_sizes": [8, 8, 16, 16],
    "num_attention_heads": [1, 1, 2, 2],
    "decoder_hidden_size": 16,
    "sr_ratios": [1, 1, 1, 1],
}
WHISPER = {
    "vocab_size": 64,
    "d_model": 32,
    "encoder_layers": 1,
    "decoder_layers": 1,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 48,
    "num_mel_bins": 8,
    "max_source_positions": 20,
    "max_target_positions": 20,
    "classifier_proj_size": 12,
    "pad_token_id": 1,
    "bos_token_id": 0,
    "eos_token_id": 2,
    "decoder_start_token_id": 2,
}
# name → (class of the checkpoint, its config, class that was trained, modules inside it, its head)
CASES = {
    "ViT": ("ViTModel", t.ViTConfig(**IMAGE), "ViTForImageClassification", "query|q_proj", "classifier"),
    "ViT of another head": (
        "ViTForMaskedImageModeling",
        t.ViTConfig(**IMAGE, encoder_stride=8),
        "ViTForImageClassification",
        "query|q_proj",
        "classifier",
    ),
    "DINOv2": (
        "Dinov2Model",
        t.Dinov2Config(**IMAGE),
        "Dinov2ForImageClassification",
        "query|q_proj",
        "classifier",
    ),
    "BEiT": ("BeitModel", t.BeitConfig(**IMAGE), "BeitForImageClassification", "query|q_proj", "classifier"),
    "Swin": (
        "SwinModel",
        t.SwinConfig(
            image_size=16, patch_size=2, embed_dim=8, depths=[1, 1], num_heads=[1, 2], window_size=2
        ),
        "SwinForImageClassification",
        "query|q_proj",
        "classifier",
    ),
    "ConvNeXt": (
        "ConvNextModel",
        t.ConvNextConfig(hidden_sizes=[8, 16], depths=[1, 1], num_stages=2, patch_size=2),
        "ConvNextForImageClassification",
        "pwconv1",
        "classifier",
    ),
    "CLIP": (
        "CLIPModel",
        t.CLIPConfig(text_config=SMALL | {"vocab_size": 64, "projection_dim": 16}, vision_config=TOWER),
        "CLIPForImageClassification",
        "q_proj",
        "classifier",
    ),
    "SigLIP": (
        "SiglipModel",
        t.SiglipConfig(text_config=SMALL | {"vocab_size": 64}, vision_config=TOWER),
        "SiglipForImageClassification",
        "q_proj",
        "classifier",
    ),
    "wav2vec2": (
        "Wav2Vec2Model",
        t.Wav2Vec2Config(**SPEECH),
        "Wav2Vec2ForSequenceClassification",
        "q_proj",
        "classifier|projector",
    ),
    "wav2vec2 before training": (
        "Wav2Vec2ForPreTraining",
        t.Wav2Vec2Config(**SPEECH),
        "Wav2Vec2ForAudioFrameClassification",
        "q_proj",
        "classifier",
    ),
    "HuBERT": (
        "HubertModel",
        t.HubertConfig(**SPEECH),
        "HubertForSequenceClassification",
        "q_proj",
        "classifier|projector",
    ),
    "Whisper": (
        "WhisperForConditionalGeneration",
        t.WhisperConfig(**WHISPER),
        "WhisperForAudioClassification",
        "q_proj",
        "classifier|projector",
    ),
    "Segformer": (
        "SegformerModel",
        t.SegformerConfig(**SEGFORMER),
        "SegformerForSemanticSegmentation",
        "query|q_proj",
        "decode_head",
    ),
    "Gemma 3": (
        "Gemma3ForConditionalGeneration",
        t.Gemma3Config(text_config=TEXT, vision_config=IMAGE, mm_tokens_per_image=4),
        "Gemma3ForSequenceClassification",
        "down_proj",
        "score",
    ),
    "Qwen 3.5": (
        "Qwen3_5ForConditionalGeneration",
        t.Qwen3_5Config(
            text_config=TEXT | LINEAR | {"tie_word_embeddings": True},
            vision_config=SEEING | {"out_hidden_size": 32, "num_position_embeddings": 16},
        ),
        "Qwen3_5ForTokenClassification",
        "down_proj",
        "score",
    ),
}


def inputs(name):
    if any(word in name for word in ("Wav2Vec2", "Hubert")):
        return {"input_values": torch.linspace(-1, 1, 400).reshape(1, 400).sin()}
    if "Whisper" in name:
        return {"input_features": torch.linspace(-1, 1, 320).reshape(1, 8, 40)}
    if any(word in name for word in ("Gemma3", "Qwen3_5", "Bert")):
        return {"input_ids": torch.tensor([[5, 60, 61, 7, 9]])}
    side = 64 if "Segformer" in name else 16
    return {"pixel_values": torch.linspace(-1, 1, 3 * side * side).reshape(1, 3, side, side).mul(9).sin()}


def logits(model, name):
    with torch.no_grad():
        return model.eval()(**inputs(name)).logits


def randomize(tensors, seed, scale):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for tensor in tensors:
            tensor.add_(torch.randn(tensor.shape, generator=generator) * scale)


def trained(case, folder, *, n_labels=5, source=None):
    """Writes base and adapter, as PEFT's recipes do; returns the model that was trained."""
    base, made, name, inside, head = CASES[case]
    checkpoint = getattr(t, source or base)(made)
    randomize(checkpoint.parameters(), 0, 0.1)
    checkpoint.save_pretrained(folder / "base")
    model = getattr(t, name).from_pretrained(
        folder / "base", num_labels=n_labels, ignore_mismatched_sizes=True
    )
    settings = LoraConfig(
        r=4, target_modules=rf".*\.({inside})", modules_to_save=head.split("|"), task_type=None
    )
    peft = get_peft_model(model, settings)
    randomize((one for one in peft.parameters() if one.requires_grad), 1, 0.1)
    logits(peft.train(), name)
    if case == "Segformer":
        peft.train()(**inputs(name))  # BatchNorm counts
    peft.save_pretrained(folder / "adapter")
    return peft


def check(case, peft, folder):
    name = CASES[case][2]
    receipt = lorafuse.convert(folder / "base", folder / "adapter", folder / "out")
    merged, info = getattr(t, name).from_pretrained(folder / "out", output_loading_info=True)
    assert not any(info.values()), info
    want = logits(peft, name)
    assert (logits(merged, name) - want).abs().max() < 1e-4 * want.abs().max()
    assert config(folder / "out")["architectures"] == [name]
    return receipt


@pytest.mark.parametrize("case", CASES)
def test_a_head_that_the_checkpoint_lacks(case, tmp_path):
    peft = trained(case, tmp_path)
    receipt = check(case, peft, tmp_path)
    assert len(config(tmp_path / "out")["id2label"]) == 5
    head = tuple(f"{module}." for module in CASES[case][4].split("|"))
    added = {name for name, entry in receipt["tensors"].items() if entry["action"] == "added"}
    assert added == {name for name in receipt["tensors"] if name.startswith(head)}


def test_counters_of_batch_norm_are_those_of_training(tmp_path):
    peft = trained("Segformer", tmp_path)
    check("Segformer", peft, tmp_path)
    counted = read_tensors(tmp_path / "out")["decode_head.batch_norm.num_batches_tracked"]
    assert counted.dtype == torch.int64 and counted.item() == 1


@pytest.mark.parametrize("case", ["ViT", "Segformer", "wav2vec2", "Gemma 3"])
def test_a_head_for_another_number_of_labels(case, tmp_path):
    """The checkpoint has this head for two."""
    peft = trained(case, tmp_path, source=CASES[case][2])
    check(case, peft, tmp_path)
    written = config(tmp_path / "out")
    assert list(written["id2label"]) == ["0", "1", "2", "3", "4"] and len(written["label2id"]) == 5


def test_a_projector_that_was_random_in_training_is_refused(tmp_path):
    trained("wav2vec2", tmp_path)
    file = tmp_path / "adapter/adapter_model.safetensors"
    save_file(
        {name: tensor for name, tensor in load_file(file).items() if "projector" not in name},
        file,
        {"format": "pt"},
    )
    with pytest.raises(AdapterError, match=r"also has projector\.weight, projector\.bias, which neither"):
        lorafuse.convert(tmp_path / "base", tmp_path / "adapter", tmp_path / "out")
