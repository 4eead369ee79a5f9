"""The base as training saw it, by bitsandbytes' own kernels on the GPU that holds the weight.

They are what trained the adapter. Their results may differ in the last bit from those on the CPU: the mean of
the scales is summed in another order. The whole weight lies in the GPU's memory, the host holds a piece at a
time.
"""

from types import ModuleType

import torch

from lorafuse.arithmetic.arena import Arena
from lorafuse.codecs.sources import Sources
from lorafuse.errors import UsageError
from lorafuse.settings import BaseQuant

PIECE_NUMEL = 1 << 19


def four_bit(
    inner: Sources, quant: BaseQuant, dtype: torch.dtype, transposed: bool, arena: Arena
) -> tuple[torch.Tensor]:
    """The weight, flat, in `dtype`, after NF4 or FP4. Raises UsageError where bitsandbytes is not
    installed."""
    bnb = _functional()
    weight = _weight(inner, dtype, transposed, arena)
    packed, state = bnb.quantize_4bit(
        weight, blocksize=quant.blocksize, compress_statistics=quant.double_quant, quant_type=quant.kind
    )
    return (_flat(bnb.dequantize_4bit(packed.view(-1, 1), state).view(weight.shape), transposed),)


def int8(inner: Sources, dtype: torch.dtype, transposed: bool, arena: Arena) -> tuple[torch.Tensor]:
    """The weight, flat, in fp32, after LLM.int8. Raises UsageError where bitsandbytes is not installed."""
    bnb = _functional()
    q, scb, _ = bnb.int8_vectorwise_quant(_weight(inner, dtype, transposed, arena).half())
    return (_flat(bnb.int8_vectorwise_dequant(q, scb), transposed),)


def _weight(inner: Sources, dtype: torch.dtype, transposed: bool, arena: Arena) -> torch.Tensor:
    """[out, in] on the arena's device, as the model was loaded."""
    weight = torch.empty(inner.spec.numel, dtype=dtype, device=arena.device)
    for start in range(0, weight.numel(), PIECE_NUMEL):
        stop = min(start + PIECE_NUMEL, weight.numel())
        weight[start:stop] = inner.decode(inner.fetch(start, stop, arena), start, stop, arena)
    weight = weight.view(inner.spec.shape)
    return weight.T.contiguous() if transposed else weight


def _flat(weight: torch.Tensor, transposed: bool) -> torch.Tensor:
    return (weight.T.contiguous() if transposed else weight).view(-1)


def _functional() -> ModuleType:
    try:
        # Seconds, and needed here alone.
        import bitsandbytes.functional
    except ImportError as e:
        raise UsageError(
            f"--base-quant on a GPU needs bitsandbytes ({e}); install it, or choose --device cpu."
        ) from None
    return bitsandbytes.functional
