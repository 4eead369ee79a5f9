"""Models as they were trained, to compare with: a checkpoint decoded by bitsandbytes, and PEFT's adapter on
top, unmerged."""

import torch
from models import spread
from oracle import config, decode

SMALL = {
    "vocab_size": 96, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 64, "pad_token_id": 0,
}  # fmt: skip
IDS = torch.arange(1, 20)[None]


def small(kind, auto, path, **settings):
    """Saves a tiny model with random weights."""
    from transformers import AutoConfig

    torch.manual_seed(0)
    model = auto.from_config(AutoConfig.for_model(kind, **SMALL | settings))
    spread(model).save_pretrained(path)
    return path


def dense_model(ckpt, auto, **settings):
    """The checkpoint in fp32 as one of transformers' Auto classes; what it lacks is random."""
    from transformers import AutoConfig

    fields = {name: value for name, value in config(ckpt).items() if name != "quantization_config"}
    torch.manual_seed(3)
    model = auto.from_config(AutoConfig.for_model(**fields | settings), dtype=torch.float32)
    stored = {name: value.float() for name, (value, _) in decode(ckpt).items()}
    own, prefix = model.state_dict(), model.base_model_prefix + "."
    found = {
        next((n for n in (name, prefix + name, name.removeprefix(prefix)) if n in own), name): t
        for name, t in stored.items()
    }
    assert own.keys() & found.keys(), "nothing of the checkpoint is in the model"
    model.load_state_dict(found, strict=False)
    return model.eval()


def train(model, path, **settings):
    """Gives a model an adapter whose trained tensors are random, saves it, and returns the model as PEFT runs
    it."""
    from peft import LoraConfig, get_peft_model

    peft = get_peft_model(model, LoraConfig(**{"r": 4, "lora_alpha": 8} | settings))
    torch.manual_seed(1)
    with torch.no_grad():
        for p in peft.parameters():
            if p.requires_grad:
                p.add_(torch.randn_like(p) * 0.1)
    peft.save_pretrained(path)
    return peft.eval()


def largest_difference(out_dir, auto, peft):
    """Loads a merged checkpoint, which must lack nothing, and compares everything that the two models
    compute."""
    merged, info = auto.from_pretrained(out_dir, dtype=torch.float32, output_loading_info=True)
    assert not any(info.values()), info
    with torch.no_grad():
        ours, theirs = merged.eval()(IDS), peft(input_ids=IDS)
    return max(
        float((ours[key] - theirs[key]).abs().max()) for key in ours if isinstance(ours[key], torch.Tensor)
    )
