"""What bitsandbytes on the CPU makes of weights in full precision, as transformers stores it."""

import json
import re

import bitsandbytes.functional as bnb
import torch


def by_bitsandbytes(name, weight, kind, *, double_quant=True, blocksize=64):
    """The stored tensors of a weight (out, in); the order of its sums is that of a thread."""
    n_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        if kind == "int8":
            q, scb, _ = bnb.int8_vectorwise_quant(weight.half())
            module = name.removesuffix("weight")
            return {
                name: q,
                f"{module}SCB": scb,
                f"{module}weight_format": torch.tensor(0, dtype=torch.uint8),
            }
        packed, state = bnb.quantize_4bit(
            weight, quant_type=kind, blocksize=blocksize, compress_statistics=double_quant
        )
        companions = {f"{name}.{part}": t for part, t in state.as_dict(packed=True).items()}
        return {name: packed} | companions
    finally:
        torch.set_num_threads(n_threads)


def state_of(tensor):
    return json.loads(bytes(tensor.tolist()))


def assert_stored(found, expected):
    """To the bit; a quant_state has the same fields, the fields in the same order."""
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        if ".quant_state." in name:
            assert list(state_of(found[name]).items()) == list(state_of(tensor).items()), name
            continue
        assert (found[name].dtype, found[name].shape) == (tensor.dtype, tensor.shape), name
        bits = (t.contiguous().view(-1).view(torch.uint8) for t in (found[name], tensor))
        assert torch.equal(*bits), name


def linear_weights(tensors):
    """Those of a Llama or GPT-2 that transformers quantizes."""
    in_blocks = re.compile(r".*_proj\.weight|.*\.h\..*\.(c_attn|c_proj|c_fc)\.weight")
    return [name for name in tensors if in_blocks.fullmatch(name)]
