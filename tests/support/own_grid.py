"""What `--format base` has to make of a weight, by its definition, with bitsandbytes' own scales."""

import hashlib

import bitsandbytes.functional as bnb
import numpy as np
import torch
from safetensors.torch import load_file

import lorafuse

M = np.uint64(0xFFFFFFFFFFFFFFFF)


def mix(z):
    """The finalizer of SplitMix64 for numpy's unsigned integers, which wrap."""
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


def uniform(weight, n):
    """float64 [n]: u of arithmetic/draws.py, by its formula (its last bits are lost in the sum)."""
    words = np.frombuffer(hashlib.sha256(weight.encode()).digest()[:16], "<u8")
    gamma, i = np.uint64(0x9E3779B97F4A7C15), np.arange(n, dtype=np.uint64)
    with np.errstate(over="ignore"):
        of_eight = mix(words[0] + (i // np.uint64(8) + np.uint64(1)) * gamma)
        byte = (of_eight >> (np.uint64(8) * (i % np.uint64(8)))) & np.uint64(255)
        fraction = mix(words[1] + (i + np.uint64(1)) * gamma) >> np.uint64(11)
    return (byte.astype(np.float64) + fraction.astype(np.float64) / 2**53) / 256


def merged(root, ckpt, adapter, weight):
    """(sums in fp32 as float64 [numel], all that was written onto the own grid, the weight's entry in the
    receipt), of a merge into `root`."""
    lorafuse.convert(ckpt, adapter, root / "sums", dtype="float32")
    receipt = lorafuse.convert(ckpt, adapter, root / "out", format="base")
    sums, found = (load_file(root / name / "model.safetensors") for name in ("sums", "out"))
    return sums[weight].double().view(-1), found, receipt["tensors"][weight]


def grid_of(tensors, weight):
    """(codes int64 [n], values float64 [n, number of codes]) of a weight, in the order in which it is
    stored."""
    if f"{weight.removesuffix('.weight')}.SCB" in tensors:
        q, scb = tensors[weight], tensors[f"{weight.removesuffix('.weight')}.SCB"]
        levels = torch.arange(-128, 128, dtype=torch.float32)
        values = levels[None] * scb.repeat_interleave(q.shape[1])[:, None] * 7.874015718698502e-3
        return q.view(-1).long() + 128, values.double()
    state = bnb.QuantState.from_dict(
        {n.removeprefix(f"{weight}."): t for n, t in tensors.items() if n.startswith(f"{weight}.")}, "cpu"
    )
    absmax = state.absmax
    if state.nested:
        absmax = bnb.dequantize_blockwise(state.absmax, state.state2) + state.offset
    numel = state.shape.numel()
    packed = tensors[weight].view(torch.uint8).view(-1)
    codes = torch.stack((packed >> 4, packed & 15), dim=1).view(-1)[:numel].long()
    scales = absmax.float().repeat_interleave(state.blocksize)[:numel]
    return codes, (scales[:, None] * state.code[None]).to(state.dtype).double()


def rounded(codes, values, sums, u):
    """(codes, clipped) of float64 `sums`, by the definition: between the base's value and the sum lie none or
    several values; the last of them and the next one are the neighbours."""
    result, n_clipped = codes.clone(), 0
    for i in range(len(codes)):
        own, x, of_codes = float(values[i, codes[i]]), float(sums[i]), values[i].numpy()
        if x == own:
            continue
        sign = 1 if x > own else -1
        ahead = sorted({v for v in of_codes if v * sign > own * sign}, key=lambda v: v * sign)
        passed = [own, *(v for v in ahead if v * sign <= x * sign)]
        last, following = passed[-1], next((v for v in ahead if v * sign > x * sign), None)
        if following is None:
            n_clipped += last != x
        elif u[i] < (x - last) / (following - last):
            last = following
        if last != own:
            result[i] = int(np.flatnonzero(of_codes == last)[0])
    return result, n_clipped
