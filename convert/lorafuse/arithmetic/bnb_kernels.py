"""What bitsandbytes' own kernels make of a whole weight, on the device that holds it.

They are what trained the adapter. Their results on a GPU may differ in the last bit from those of
quantize.py: the mean of the scales is summed in another order.
"""

from types import ModuleType

import torch

from lorafuse.errors import UsageError


def four_bit(weight: torch.Tensor, kind: str, blocksize: int, *, double_quant: bool) -> torch.Tensor:
    """Returns `weight` (out, in) after NF4 or FP4, in its dtype. Raises UsageError where bitsandbytes is not
    installed."""
    bnb = _functional()
    packed, state = bnb.quantize_4bit(
        weight, blocksize=blocksize, compress_statistics=double_quant, quant_type=kind
    )
    made: torch.Tensor = bnb.dequantize_4bit(packed.view(-1, 1), state).view(weight.shape)
    return made


def int8(weight: torch.Tensor) -> torch.Tensor:
    """Returns `weight` (out, in) after LLM.int8, in fp32. Raises UsageError where bitsandbytes is not
    installed."""
    bnb = _functional()
    q, scb, _ = bnb.int8_vectorwise_quant(weight.half())
    made: torch.Tensor = bnb.int8_vectorwise_dequant(q, scb)
    return made


def _functional() -> ModuleType:
    try:
        # Seconds, and needed here alone.
        import bitsandbytes.functional
    except ImportError as e:
        raise UsageError(
            f"--base-quant on a GPU needs bitsandbytes ({e}); install it, or choose --device cpu."
        ) from None
    return bitsandbytes.functional
