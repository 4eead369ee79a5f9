"""A full-precision weight as training saw it: quantized by bitsandbytes when the model was loaded, and
dequantized to be used.

The stored weight is first cast to the dtype in which the model was loaded. A 4-bit weight comes out in that
dtype, an int8 one in fp32, as from a checkpoint that bitsandbytes wrote. HF Conv1D weights are quantized
transposed, so their scales run across tiles.

What a tile needs of the whole weight, one pass over it computes (`prepare`): for double quantization the mean
of all scales and a scale for each 256 of them, for a transposed weight all scales; otherwise nothing, since
the blocks of a tile are read whole. On a GPU bitsandbytes' own kernels make the whole weight: on_gpu.py.
"""

import torch

from lorafuse.arithmetic.arena import Arena
from lorafuse.codecs.encoder import FinishedTile
from lorafuse.codecs.quantizing import QuantizedOnLoad
from lorafuse.codecs.sources import Raw, Sources
from lorafuse.files.tensors import Box
from lorafuse.settings import BaseQuant
from lorafuse.trained_base.four_bit import FourBit
from lorafuse.trained_base.int8 import Int8
from lorafuse.trained_base.on_gpu import ByKernels


def simulated(dense: Sources, quant: BaseQuant, dtype: str, *, transposed: bool) -> Sources:
    """The weight `dense` as a model loaded in `dtype` (a torch name) has it after quantization; `transposed`
    for HF Conv1D."""
    loaded = getattr(torch, dtype)
    on_host = (Int8 if quant.kind == "int8" else FourBit)(dense, quant, loaded, transposed=transposed)
    return Simulated(quant, on_host, ByKernels(dense, quant, loaded, transposed=transposed))


class Simulated(QuantizedOnLoad):
    """A weight that is made a tile at a time on the host, and whole on a GPU."""

    def __init__(self, quant: BaseQuant, on_host: FourBit | Int8, on_gpu: Sources) -> None:
        self.quant, self._on_host, self._on_gpu = quant, on_host, on_gpu
        self.spec, self.out_dtype = on_host.spec, on_host.out_dtype
        self.names, self.store, self.scheme = on_host.names, on_host.store, on_host.scheme
        self.nbytes, self.held_nbytes = on_host.nbytes, on_host.held_nbytes

    def loaded(self, tile: FinishedTile, arena: Arena) -> Raw:
        """What is stored is made on the host, of a weight on a GPU too."""
        raw = tile.raw if arena.on_host else self._on_host.fetch(tile.box, arena.host)
        return self._on_host.loaded(raw, tile.box, arena.host)

    def _where(self, arena: Arena) -> Sources:
        return self._on_host if arena.on_host else self._on_gpu

    def prepare(self, arena: Arena) -> None:
        self._where(arena).prepare(arena)

    def release(self) -> None:
        self._on_host.release()
        self._on_gpu.release()

    def will_need(self, box: Box) -> None:
        self._on_host.will_need(box)

    def fetch(self, box: Box, arena: Arena) -> Raw:
        return self._where(arena).fetch(box, arena)

    def decode(self, raw: Raw, box: Box, arena: Arena) -> torch.Tensor:
        return self._where(arena).decode(raw, box, arena)
