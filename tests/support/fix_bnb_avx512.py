"""What bitsandbytes 0.50 does wrong on processors with AVX-512, undone: it judges in these tests what a
stored weight means.

Its kernel decodes a weight wrongly whose rows are not whole blocks, by its own code for other processors
(test_codecs.py::test_the_judge_is_right): here it gets every weight as a single row. It also makes zeros of
denormal values in bfloat16: here it decodes to float32, and torch rounds. A Linear4bit in eval mode packs its
weight anew for AVX512-BF16, with scales in bfloat16: here it does not.
"""

import copy

import bitsandbytes.functional as bnb
import torch
from bitsandbytes.nn import modules

dequantize_by_rows = bnb.dequantize_4bit


def dequantize_4bit(packed, quant_state, *args, **kw):
    """`bitsandbytes.functional.dequantize_4bit`."""
    state = copy.copy(quant_state)
    state.shape, state.dtype = torch.Size([1, quant_state.shape.numel()]), torch.float32
    values = dequantize_by_rows(packed.reshape(-1, 1), state, *args, **kw)
    values = values.reshape(quant_state.shape).to(quant_state.dtype)
    return values.t() if packed.shape[0] == 1 else values


def mend():
    bnb.dequantize_4bit = dequantize_4bit
    modules.has_avx512bf16 = lambda: False
