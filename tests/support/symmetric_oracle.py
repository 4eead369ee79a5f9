"""Symmetric quantization as compressed-tensors defines it, in float64, one number at a time where that is
plainest. Nothing here uses lorafuse or torch's arithmetic."""

import numpy as np
import torch

# dtype → (bits of the significand, exponent of the smallest normal number, largest number)
FLOATS = {
    torch.float32: (24, -126, float(np.finfo(np.float32).max)),
    torch.float16: (11, -14, 65504.0),
    torch.bfloat16: (8, -126, (2 - 2**-7) * 2.0**127),
    torch.float8_e4m3fn: (4, -6, 448.0),
}
# word → (bits, lowest, highest, group)
LEVELS = {"fp8": (8, -448.0, 448.0), "w8a16": (8, -128.0, 127.0), "w4a16": (4, -8.0, 7.0)}


def rounded(x, dtype):
    """float64 → the nearest numbers of a dtype, ties to even, as float64."""
    digits, lowest, largest = FLOATS[dtype]
    exponent = np.frexp(x)[1] - 1
    quantum = np.ldexp(1.0, np.maximum(exponent, lowest) - digits + 1)
    with np.errstate(over="ignore"):
        nearest = np.rint(x / quantum) * quantum
    return np.where(np.abs(nearest) > largest, np.copysign(np.inf, nearest), nearest)


def quantized(weight, word, group):
    """(codes as numbers, scales, what they decode to, number of clipped), float64 [rows, groups, …], of a
    tensor [N, K] in the dtype that its scales have."""
    _, lowest, highest = LEVELS[word]
    digits = FLOATS[weight.dtype][0]
    x = weight.double().numpy().reshape(len(weight), -1, group)
    scales = rounded(np.abs(x).max(-1) / ((highest - lowest) / 2), weight.dtype)
    scales[scales == 0] = 2.0 ** (1 - digits)
    quotients = rounded(x / scales[..., None], weight.dtype)
    n_clipped = int(((quotients > highest) | (quotients < lowest)).sum())
    inside = np.clip(quotients, lowest, highest)
    codes = rounded(inside, torch.float8_e4m3fn) if word == "fp8" else np.rint(inside)
    return codes, scales, rounded(codes * scales[..., None], weight.dtype), n_clipped


def stored(tensors, module, word):
    """(codes as numbers [N, K], scales [N, groups]) of a module in a checkpoint, float64."""
    scales = tensors[f"{module}.weight_scale"].double().numpy()
    if word == "fp8":
        return tensors[f"{module}.weight"].double().numpy(), scales
    bits = LEVELS[word][0]
    n_rows, n_cols = tensors[f"{module}.weight_shape"].tolist()
    words = tensors[f"{module}.weight_packed"].numpy().astype(np.int64) & 0xFFFFFFFF
    each = [(words >> shift) & ((1 << bits) - 1) for shift in range(0, 32, bits)]
    codes = np.stack(each, -1).reshape(n_rows, -1)
    assert codes.shape[1] == n_cols
    return codes.astype(np.float64) - 2 ** (bits - 1), scales
