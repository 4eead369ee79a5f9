"""What becomes of a quantized base with a light format."""

import json

import torch
from build import write_adapter
from quantized_base import write
from safetensors.torch import load_file

import lorafuse


def light(tmp_path, stored, section, tensors, form="mixed", where="quantization_config", **options):
    """(config.json, tensors, receipt) of what becomes of a base; `options` of the adapter are in `lora`."""
    dense = {"model.embed_tokens.weight": torch.randn(8, 4).bfloat16()}
    config = {where: section} if where != "quantization_config" else {}
    named = section if where == "quantization_config" else None
    base = write(
        tmp_path / "ckpt", stored | dense, named, vocab_size=8, **config, **options.pop("config", {})
    )
    settings = {"r": 2, "lora_alpha": 2} | options.pop("lora", {})
    adapter = write_adapter(tmp_path / "adapter", tensors, **settings)
    receipt = lorafuse.convert(base, adapter, tmp_path / "out", format=form, **options)
    lorafuse.verify(tmp_path / "out", ckpt=base, adapters=[adapter])
    found = load_file(tmp_path / "out/model.safetensors")
    for name in found.keys() & stored.keys():
        if receipt["tensors"].get(name, {}).get("action") == "copied":
            assert torch.equal(found[name].view(torch.uint8), stored[name].view(torch.uint8)), name
    return json.loads((tmp_path / "out/config.json").read_text()), found, receipt
