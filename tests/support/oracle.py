"""The independent judge of the tests: decoding by bitsandbytes, updates in float64, one rounding to the
output's dtype.

It shares no code with the package.
"""

import json
import math
import re
from dataclasses import dataclass
from pathlib import Path

import bitsandbytes.functional as bnb
import numpy as np
import torch
from safetensors.torch import load_file

NAMES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
CONV1D = re.compile(r"\.(c_attn|c_proj|c_fc)\.weight$")


def config(path, name="config.json"):
    return json.loads((Path(path) / name).read_text())


def read_tensors(path):
    """All tensors of a directory, through its index if it has one."""
    index = Path(path) / "model.safetensors.index.json"
    files = (
        sorted(set(json.loads(index.read_text())["weight_map"].values()))
        if index.exists()
        else ["model.safetensors"]
    )
    return {name: tensor for file in files for name, tensor in load_file(Path(path) / file).items()}


def read_adapter(path):
    return load_file(Path(path) / "adapter_model.safetensors")


def decode(path):
    """{weight: (value in float64, dtype that `--dtype auto` keeps)}, as bitsandbytes decodes it, in the
    layout of a dense file."""
    stored, conf, out = read_tensors(path), config(path), {}
    marker = ".quant_state.bitsandbytes__"
    four = {name.split(marker)[0] for name in stored if marker in name}
    eight = {name[:-3] + "weight" for name in stored if name.endswith(".SCB")}
    gone = {n for w in four for n in stored if n.startswith(w + ".")}
    gone |= {w[:-6] + end for w in eight for end in ("SCB", "weight_format")}
    for name in stored.keys() - gone:
        tensor = stored[name]
        dtype = tensor.dtype
        if name in four:
            parts = {n[len(name) + 1 :]: t for n, t in stored.items() if n.startswith(name + ".")}
            state = bnb.QuantState.from_dict(parts, device="cpu")
            tensor = bnb.dequantize_4bit(tensor.contiguous().view(torch.uint8).reshape(-1, 1), state).reshape(
                state.shape
            )
            dtype = state.dtype
        elif name in eight:
            tensor = bnb.int8_vectorwise_dequant(tensor, stored[name[:-6] + "SCB"])
            dtype = NAMES[conf.get("dtype") or conf["torch_dtype"]]
        if name in four | eight and conf["model_type"] == "gpt2" and CONV1D.search(name):
            tensor = tensor.T.contiguous()
        out[name] = (tensor.double() if tensor.is_floating_point() else tensor, dtype)
    return out


@dataclass
class Truth:
    """What a weight must be: its float64 value, its dtype, and how far fp32 arithmetic may be from it (None:
    not at all)."""

    value: torch.Tensor
    dtype: torch.dtype
    slack: torch.Tensor | None = None


def truth(ckpt, adapter, scale=1.0):
    """{weight: Truth} of base + LoRA on linears, Conv1D and biases; s = alpha / r."""
    conf, wanted = (
        config(adapter, "adapter_config.json"),
        {name: Truth(*pair) for name, pair in decode(ckpt).items()},
    )
    tensors = read_adapter(adapter)
    conv1d = config(ckpt)["model_type"] == "gpt2"
    for key in [key for key in tensors if key.endswith("lora_A.weight")]:
        module = key.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
        a, b = tensors[key].double(), tensors[key.replace("lora_A", "lora_B")].double()
        r = a.shape[0]
        s = scale * conf["lora_alpha"] / (math.sqrt(r) if conf.get("use_rslora") else r)
        delta, size = s * b @ a, abs(s) * b.abs() @ a.abs()
        if conv1d and CONV1D.search(module + ".weight"):
            delta, size = delta.T, size.T
        w = wanted[module + ".weight"]
        wanted[module + ".weight"] = _updated(w, delta, size, r)
        bias = tensors.get(key.replace("lora_A.weight", "lora_B.bias"))
        if bias is not None:
            wanted[module + ".bias"] = _updated(
                wanted[module + ".bias"], s * bias.double(), (s * bias.double()).abs(), 1
            )
    return wanted


def _updated(w, delta, size, rank):
    value = w.value + delta
    # One fp32 rounding of the sum, and one for each of the rank + 2 operations behind each element of the
    # update.
    return Truth(value, w.dtype, 2.0**-24 * (value.abs() + (rank + 2) * size) * 2)


def round_once(x, dtype):
    """float64 → dtype to nearest even. torch goes through fp32 for bfloat16 and so rounds twice."""
    if dtype == torch.float64:
        return x
    if dtype == torch.float32:
        return x.float()
    if dtype == torch.float16:
        return torch.from_numpy(np.asarray(x.numpy()).astype(np.float16))
    near = x.float().bfloat16().reshape(-1)  # at most one step away
    code = near.view(torch.int16).int()
    around = torch.stack([code - 1, code, code + 1]).to(torch.int16).view(torch.bfloat16)
    distance = (around.double() - x.reshape(-1)).abs()
    distance = torch.where(distance.isnan(), torch.inf, distance)
    best = distance.min(dim=0).values
    # On a tie the even code wins.
    rank = distance.ne(best).int() * 2 + (around.view(torch.int16) & 1)
    return around.gather(0, rank.argmin(dim=0, keepdim=True))[0].reshape(x.shape)


def ulps(a, b):
    """Distance of two tensors of one floating dtype, in steps."""
    kind = {2: torch.int16, 4: torch.int32}[a.element_size()]
    ordered = [t.contiguous().view(kind).long() for t in (a, b)]
    low = 1 << (8 * a.element_size() - 1)
    ordered = [torch.where(t < 0, -(t + low), t) for t in ordered]
    return (ordered[0] - ordered[1]).abs()


# CONTRACT: the share of elements that fp32 arithmetic may put on the other side of a rounding boundary.
SHARE = {torch.bfloat16: 1e-4, torch.float16: 5e-4}


def complaints(out_dir, wanted, dtype="auto"):
    """What is wrong with a merged directory; an empty list when nothing is."""
    found, bad, off, total = read_tensors(out_dir), [], 0, 0
    if found.keys() != wanted.keys():
        return [f"names differ: {sorted(found.keys() ^ wanted.keys())[:4]}"]
    out = None
    for name, w in wanted.items():
        out = w.dtype if dtype == "auto" or not w.value.is_floating_point() else NAMES[dtype]
        got = found[name]
        if got.dtype != out or got.shape != w.value.shape:
            bad.append(f"{name}: {got.dtype} {list(got.shape)}, expected {out} {list(w.value.shape)}")
            continue
        expected = round_once(w.value, out) if w.value.is_floating_point() else w.value
        if w.slack is None:
            if not torch.equal(got, expected):
                bad.append(f"{name}: differs, though nothing is computed")
        elif out == torch.float32:
            over = (got.double() - w.value).abs() - w.slack
            if over.max() > 0:
                bad.append(f"{name}: {over.max():.3g} beyond the fp32 bound")
        else:
            steps = ulps(got, expected)
            # Near zero many steps are a tiny distance, within what fp32 arithmetic explains.
            far = (steps > 1) & (
                (got.double() - w.value).abs() > w.slack + (expected.double() - w.value).abs()
            )
            if far.any():
                bad.append(f"{name}: {int(far.sum())} elements are more than one step off")
            off, total = off + int((steps != 0).sum()), total + steps.numel()
    share = SHARE.get(out, 1.0) * total
    if off > share + 4 * math.sqrt(share) + 3:  # a count of rare events scatters
        bad.append(f"{off} of {total} elements differ from the value rounded once")
    return bad
