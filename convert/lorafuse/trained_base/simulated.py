"""A full-precision weight as training saw it: quantized by bitsandbytes when the model was loaded, and
dequantized to be used.

The stored weight is first cast to the dtype in which the model was loaded. A 4-bit weight comes out in that
dtype, an int8 one in fp32, as from a checkpoint that bitsandbytes wrote. HF Conv1D weights are quantized
transposed, so their scales run across tiles.

What a tile needs of the whole weight, one pass over it computes (`prepare`): for double quantization the mean
of all scales and a scale for each 256 of them, for a transposed weight all scales; otherwise nothing, since
the blocks of a tile are read whole. On a GPU bitsandbytes' own kernels make the whole weight: bnb_gpu.py.
"""

import torch

from lorafuse.codecs.sources import Sources
from lorafuse.settings import BaseQuant
from lorafuse.trained_base.four_bit import FourBit
from lorafuse.trained_base.int8 import Int8


def simulated(inner: Sources, quant: BaseQuant, dtype: str, *, transposed: bool) -> Sources:
    """The weight `inner` as a model loaded in `dtype` (a torch name) has it after quantization; `transposed`
    for HF Conv1D."""
    return (Int8 if quant.kind == "int8" else FourBit)(
        inner, quant, getattr(torch, dtype), transposed=transposed
    )
