"""A large matrix as a file, and an adapter for it, of which nobody ever holds more than a piece."""

import json
import struct

import numpy as np


def write(path, tensors):
    """{name: (dtype, shape, piece, how often it is repeated)}, without holding any of it."""
    header, at = {}, 0
    for name, (dtype, shape, piece, n) in tensors.items():
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [at, at + len(piece) * n]}
        at += len(piece) * n
    text = json.dumps(header).encode()
    with open(path, "wb") as f:
        f.write(struct.pack("<Q", len(text)) + text)
        for _, _, piece, n in tensors.values():
            for _ in range(n):
                f.write(piece)


def write_pair(tmp_path, weight, shape, rank, tensors, model_type="llama"):
    """(checkpoint of `tensors`, adapter of zeros for one of them) and what the checkpoint needs beside its
    weights."""
    ckpt, lora = tmp_path / "ckpt", tmp_path / "lora"
    ckpt.mkdir()
    lora.mkdir()
    write(ckpt / "model.safetensors", tensors)
    config = {"model_type": model_type, "architectures": ["LlamaForCausalLM"], "dtype": "bfloat16"}
    (ckpt / "config.json").write_text(json.dumps(config))
    key = f"base_model.model.{weight.removesuffix('.weight')}"
    n_out, n_in = shape[::-1] if model_type == "gpt2" else shape
    factors = {f"{key}.lora_A.weight": [rank, n_in], f"{key}.lora_B.weight": [n_out, rank]}
    write(
        lora / "adapter_model.safetensors",
        {k: ("F32", s, bytes(4 * s[0] * s[1]), 1) for k, s in factors.items()},
    )
    (lora / "adapter_config.json").write_text(f'{{"peft_type": "LORA", "r": {rank}, "lora_alpha": {rank}}}')
    return ckpt, lora


def nf4(w, rows, cols):
    """The stored tensors of an NF4 matrix, double-quantized, of random codes, as `write` takes them."""
    import bitsandbytes.functional as bnb

    n, rng = rows * cols, np.random.default_rng(0)
    state = {"quant_type": "nf4", "blocksize": 64, "dtype": "bfloat16", "shape": [rows, cols]}
    state |= {"nested_blocksize": 256, "nested_dtype": "float32", "nested_offset": 0.05}
    packed = json.dumps(state).encode()
    piece = rng.integers(0, 256, 1 << 17, dtype=np.uint8).tobytes()
    maps = [
        bnb.create_dynamic_map().numpy().tobytes(),
        bnb.get_4bit_type("nf4", device="cpu").numpy().tobytes(),
    ]
    return {
        w: ("U8", [n // 2, 1], piece, n // 2 >> 17),
        f"{w}.absmax": ("U8", [n // 64], piece, n // 64 >> 17),
        f"{w}.nested_absmax": (
            "F32",
            [n // 64 // 256],
            np.full(n // 64 // 256, 0.02, np.float32).tobytes(),
            1,
        ),
        f"{w}.nested_quant_map": ("F32", [256], maps[0], 1),
        f"{w}.quant_map": ("F32", [16], maps[1], 1),
        f"{w}.quant_state.bitsandbytes__nf4": ("U8", [len(packed)], packed, 1),
    }
