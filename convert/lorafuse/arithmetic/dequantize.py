"""What bitsandbytes' codes stand for: the formulas that stored and simulated quantization share.

bitsandbytes 0.50 functional.py, dequantize_4bit, dequantize_blockwise and int8_vectorwise_dequant, with which
the results are bit-identical:

    absmax = nested_quant_map[absmax_u8] * nested_absmax[block // nested_blocksize] + nested_offset   (nested)
    W      = dtype(quant_map[code] * absmax[i // blocksize])                    (fp32, then one cast)
    W      = q · SCB · fp32(1/127)                                              (int8: fp32, uncast)

bitsandbytes itself is not imported: a 256-entry table from byte to its two values does the look-up.
"""

import torch

from lorafuse.arithmetic import compiled
from lorafuse.arithmetic.arena import DECODED_FP32, Arena

INV_127 = 7.874015718698502e-3  # fp32(1/127), as bitsandbytes spells it
# The scratch of the indexes, and then of the decoded weight: they never live at once, and less has to stay in
# cache.
NARROW = "bnb4.narrow"


def byte_pairs(quant_map: torch.Tensor) -> torch.Tensor:
    """float64 [256]: the two values (of quant_map, fp32 [16]) of each byte, high nibble first, viewed as one
    number, so that index_select copies a pair at a time."""
    byte = torch.arange(256)
    return torch.stack([quant_map[byte >> 4], quant_map[byte & 15]], dim=1).view(torch.float64).view(-1)


def look_up(packed: torch.Tensor, pairs: torch.Tensor, values: torch.Tensor, arena: Arena) -> None:
    """values[:2 * len(packed)] = the two values of each byte."""
    index = arena.get(NARROW, 2 * packed.numel(), torch.int16).view(torch.int32).copy_(packed)
    torch.index_select(arena.table(pairs), 0, index, out=values[: 2 * packed.numel()].view(torch.float64))


# Bytes of a vector → a dtype of as many. torch copies single elements three times as fast as short rows.
_AS_ONE = {4: torch.float32, 8: torch.float64, 16: torch.complex128}


def select(vectors: torch.Tensor, index: torch.Tensor, chosen: torch.Tensor) -> None:
    """chosen (1-D) = those rows of `vectors` (2-D) that `index` (int32) names, one after another."""
    one = _AS_ONE.get(vectors.shape[1] * vectors.element_size())
    if one is None:
        torch.index_select(vectors, 0, index, out=chosen.view(-1, vectors.shape[1]))
    else:
        torch.index_select(vectors.view(one).view(-1), 0, index, out=chosen.view(one))


def decode_four_bit(
    packed: torch.Tensor,
    quant_map: torch.Tensor,
    pairs: torch.Tensor,
    absmax: torch.Tensor,
    blocksize: int,
    skip: int,
    numel: int,
    dtype: torch.dtype,
    arena: Arena,
) -> torch.Tensor:
    """Elements [skip, skip + numel) of whole blocks, in `dtype`: 1-D, and valid until the arena's next use.
    `packed` (uint8, on the arena's device) has the codes of these blocks, the last of which may be short;
    `absmax` (fp32) the scale of each; `pairs` is byte_pairs(quant_map)."""
    narrow = None if dtype == torch.float32 else arena.get(NARROW, numel, torch.int16).view(dtype)
    if arena.kernel and narrow is not None:
        given = packed, quant_map, absmax, blocksize, skip, narrow
        if compiled.decode_four_bit(arena.kernel, *given):
            return narrow
    # Room for whole blocks: the pad nibble of an odd count is decoded and cut off.
    values = arena.get(DECODED_FP32, absmax.numel() * blocksize, torch.float32)
    look_up(packed, pairs, values, arena)
    values.view(-1, blocksize).mul_(absmax[:, None])
    values = values[skip : skip + numel]
    return values if narrow is None else narrow.copy_(values)


def nested_absmax(
    codes: torch.Tensor, nested_map: torch.Tensor, nested: torch.Tensor, offset: float, skip: int = 0
) -> torch.Tensor:
    """float32 [blocks]: the scales that codes stand for, given the scale of each (`nested`, expanded to
    blocks, of which the first `skip` are not wanted)."""
    # Allocated: for so few elements that costs less than looking for scratch.
    return nested_map.index_select(0, codes.int()).mul_(nested).add_(offset)[skip:]


def nested_scales(
    codes: torch.Tensor,
    nested_map: torch.Tensor,
    nested: torch.Tensor,
    blocksize: int,
    offset: float,
    skip: int,
    n: int,
    arena: Arena,
) -> torch.Tensor:
    """float32 [n]: the scales of blocks [skip, skip + n), of whole nested blocks of `blocksize` codes
    (uint8), the last of which may be short; `nested` (fp32) has the scale of each."""
    if arena.kernel:
        scales = torch.empty(n, dtype=torch.float32, device=arena.device)
        compiled.nested_scales(arena.kernel, codes, nested_map, nested, blocksize, offset, skip, scales)
        return scales
    outer = nested[:, None].expand(-1, blocksize).reshape(-1)[: codes.numel()]
    return nested_absmax(codes, nested_map, outer, offset, skip)[:n]


def decode_int8(tile: torch.Tensor, scb: torch.Tensor) -> torch.Tensor:
    """Makes q in `tile` (fp32) the weight, in place; `scb` (fp32) is broadcast against it."""
    return tile.mul_(scb).mul_(INV_127)
