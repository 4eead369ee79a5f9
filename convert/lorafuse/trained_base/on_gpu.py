"""The base as training saw it, by bitsandbytes' own kernels on the GPU: the whole weight lies in the GPU's
memory, the host holds a piece at a time."""

import torch

from lorafuse.arithmetic import bnb_kernels
from lorafuse.arithmetic.arena import Arena
from lorafuse.codecs.held import ComputedOnce
from lorafuse.codecs.sources import Raw, Sources
from lorafuse.files.tensors import SAFETENSORS_NAMES, Box, TensorSpec
from lorafuse.settings import BaseQuant
from lorafuse.trained_base.passes import PASS_NUMEL, pieces


class ByKernels(Sources):
    """One weight, quantized and dequantized whole when the first tile needs it."""

    def __init__(self, dense: Sources, quant: BaseQuant, dtype: torch.dtype, *, transposed: bool) -> None:
        self._dense, self._quant, self._dtype, self._transposed = dense, quant, dtype, transposed
        self.out_dtype = SAFETENSORS_NAMES[str(dtype).removeprefix("torch.")]
        self.spec = TensorSpec("F32" if quant.kind == "int8" else self.out_dtype, dense.spec.shape)
        self.names, self.store, self.scheme = dense.names, dense.store, dense.scheme
        self._weight = ComputedOnce()

    def prepare(self, arena: Arena) -> None:
        self._weight.get(lambda: (self._whole(arena),))

    def release(self) -> None:
        self._weight.drop()

    def will_need(self, box: Box) -> None:
        self._dense.will_need(box)

    def fetch(self, box: Box, arena: Arena) -> Raw:
        return self._weight.get(lambda: (self._whole(arena),))

    def decode(self, raw: Raw, box: Box, arena: Arena) -> torch.Tensor:
        return raw[0][slice(*box.run)]

    def _whole(self, arena: Arena) -> torch.Tensor:
        """The weight after quantization, flat, on the arena's device."""
        weight = torch.empty(self.spec.numel, dtype=self._dtype, device=arena.device)
        for start, piece in pieces(self._dense, PASS_NUMEL, arena):
            weight[start : start + piece.numel()] = piece
        weight = weight.view(self.spec.shape)
        if self._transposed:
            made = self._quantized(weight.T.contiguous()).T.contiguous().view(-1)
        else:
            made = self._quantized(weight).view(-1)
        arena.settle()  # all workers use it
        return made

    def _quantized(self, weight: torch.Tensor) -> torch.Tensor:
        """A weight (out, in) after quantization."""
        if self._quant.kind == "int8":
            return bnb_kernels.int8(weight)
        return bnb_kernels.four_bit(
            weight, self._quant.kind, self._quant.blocksize, double_quant=self._quant.double_quant
        )
