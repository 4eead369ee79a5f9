"""Factors of an adapter of MLX-LM, and the float64 weights that they make."""

import torch
from oracle import Truth, decode

RANK = 4


def factors(modules, seed=5, dtype=torch.float32):
    """{key: tensor} of lora_a [in, r] and lora_b [r, out] for {module: (in, out)}."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for module, (n_in, n_out) in modules.items():
        tensors[f"{module}.lora_a"] = (torch.randn(n_in, RANK, generator=generator) * 0.1).to(dtype)
        tensors[f"{module}.lora_b"] = (torch.randn(RANK, n_out, generator=generator) * 0.1).to(dtype)
    return tensors


def truth(ckpt, tensors, scale, weight=lambda module: f"{module}.weight", as_is=()):
    """Every weight with its update: (lora_a @ lora_b)ᵀ of linears, lora_a @ lora_b of the modules in
    `as_is`."""
    wanted = {name: Truth(*pair) for name, pair in decode(ckpt).items()}
    for key in [key for key in tensors if key.endswith(".lora_a")]:
        module = key.removesuffix(".lora_a")
        a, b = tensors[key].double(), tensors[f"{module}.lora_b"].double()
        delta, size = scale * a @ b, abs(scale) * a.abs() @ b.abs()
        if module not in as_is:
            delta, size = delta.T, size.T
        w = wanted[weight(module)]
        value = w.value + delta
        wanted[weight(module)] = Truth(value, w.dtype, 2.0**-24 * (value.abs() + (RANK + 2) * size) * 2)
    return wanted
