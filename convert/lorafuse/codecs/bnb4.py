"""bitsandbytes 4-bit: NF4 and FP4, single and double quantization, any block size, any storage dtype.

For a weight X of n elements in blocks of `blocksize`: `X` holds ceil(n/2) bytes, two codes each, high nibble
first, viewed as any dtype; `X.absmax` one scale per block, fp32, or uint8 when double-quantized, then with
`X.nested_absmax` (fp32, one per `nested_blocksize` scales) and `X.nested_quant_map` (fp32 [256]);
`X.quant_map` the 16 values; and `X.quant_state.bitsandbytes__nf4` (or fp4) a JSON with shape, dtype, block
sizes and nested_offset. The format is that of bitsandbytes 0.50 functional.py, QuantState.as_dict;
dequantize.py has the formula.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch

from lorafuse.arithmetic.arena import DECODED_FP32, Arena
from lorafuse.arithmetic.dequantize import NARROW, byte_pairs, look_up, nested_absmax
from lorafuse.codecs.conv1d import is_conv1d
from lorafuse.codecs.sources import Scheme, Sources
from lorafuse.errors import CheckpointError, shown
from lorafuse.files.checkpoint import Checkpoint
from lorafuse.files.stores import read_all
from lorafuse.files.tensors import FLOATS, SAFETENSORS_NAMES, TensorInfo, TensorSpec

MARKER = ".quant_state.bitsandbytes__"
COMPANIONS = (".absmax", ".quant_map", ".nested_absmax", ".nested_quant_map")
MAX_STATE_NBYTES = 10_000
MAX_BLOCKSIZE = 1 << 16  # bitsandbytes has blocks of up to 4096; they are decoded whole


@dataclass(frozen=True, slots=True)
class QuantState:
    """What the quant_state JSON says, checked. `nested_blocksize` is 0 without double quantization."""

    dtype: str
    shape: tuple[int, ...]
    blocksize: int
    nested_blocksize: int
    nested_offset: float


def claim(stored: Mapping[str, TensorInfo]) -> dict[str, tuple[str, ...]]:
    claims = {}
    for state in stored:
        weight, marker, _ = state.partition(MARKER)
        if marker and weight in stored:
            claims[weight] = (weight, state, *(weight + c for c in COMPANIONS if weight + c in stored))
    return claims


def scheme(names: tuple[str, ...], blocksize: int = 0) -> Scheme:
    _, _, kind = names[1].partition(MARKER)
    return Scheme(kind, double_quant=any(name.endswith(COMPANIONS[2]) for name in names), blocksize=blocksize)


def open_sources(weight: str, names: tuple[str, ...], ckpt: Checkpoint) -> "FourBitSources":
    try:
        state = _read_state(names[1], ckpt)
        _check_companions(weight, state, ckpt)
    except (KeyError, TypeError, ValueError, RecursionError) as e:
        raise CheckpointError(
            f"{shown(ckpt.folder)}: the quant_state of {shown(weight)} is broken: {shown(e)}."
        ) from None
    return FourBitSources(weight, names, state, ckpt)


def _read_state(name: str, ckpt: Checkpoint) -> QuantState:
    if ckpt.tensors[name].spec.nbytes > MAX_STATE_NBYTES:
        raise ValueError("it is too long")
    raw: dict[str, Any] = json.loads(read_all(ckpt, name))
    dtype = SAFETENSORS_NAMES.get(str(raw["dtype"]))
    if dtype not in FLOATS:
        raise ValueError(f"the dtype is {raw['dtype']!r}")
    nested_blocksize = raw.get("nested_blocksize", 0)
    sizes = [*raw["shape"], raw["blocksize"]] + ([nested_blocksize] if "nested_blocksize" in raw else [])
    if not all(type(size) is int and size > 0 for size in sizes):
        raise ValueError("shape or block size is not a positive whole number")
    if max(raw["blocksize"], nested_blocksize) > MAX_BLOCKSIZE:
        raise ValueError(f"a block size is larger than {MAX_BLOCKSIZE}")
    if raw["blocksize"] % 2:
        raise ValueError(f"the block size {raw['blocksize']} is odd")
    return QuantState(
        dtype, tuple(raw["shape"]), raw["blocksize"], nested_blocksize, float(raw.get("nested_offset", 0.0))
    )


def _check_companions(weight: str, state: QuantState, ckpt: Checkpoint) -> None:
    """Every companion has the dtype and length that the quant_state implies."""
    numel = TensorSpec("U8", state.shape).numel
    n_blocks = -(-numel // state.blocksize)
    expected = {".quant_map": ("F32", 16), ".absmax": ("U8" if state.nested_blocksize else "F32", n_blocks)}
    if state.nested_blocksize:
        expected |= {
            ".nested_quant_map": ("F32", 256),
            ".nested_absmax": ("F32", -(-n_blocks // state.nested_blocksize)),
        }
    for companion, (dtype, length) in expected.items():
        info = ckpt.tensors.get(weight + companion)
        found = f"{info.spec.dtype} with {info.spec.numel} elements" if info else "missing"
        if found != f"{dtype} with {length} elements":
            raise ValueError(f"{companion[1:]} is {found}, expected {dtype} with {length} elements")
    # A storage dtype wider than a byte may have left some bytes of padding.
    nbytes, needed = ckpt.tensors[weight].spec.nbytes, -(-numel // 2)
    if not needed <= nbytes < needed + 8:
        raise ValueError(f"{nbytes} bytes are stored, {list(state.shape)} needs {needed}")


# All weights of a checkpoint have the same tables, as a rule: thousands of experts share one.
@cache
def _floats(raw: bytes) -> torch.Tensor:
    return torch.frombuffer(bytearray(raw), dtype=torch.float32)


@cache
def _pairs(quant_map: bytes) -> torch.Tensor:
    return byte_pairs(_floats(quant_map))


class FourBitSources(Sources):
    """The packed codes and scales of one weight. `transposed`: an HF Conv1D weight, stored (out, in), made
    (in, out)."""

    def __init__(self, weight: str, names: tuple[str, ...], state: QuantState, ckpt: Checkpoint) -> None:
        self.store, self.names, self._weight, self._state = ckpt, names, weight, state
        self.transposed = is_conv1d(ckpt.config, weight) and len(state.shape) == 2
        self.spec = TensorSpec(state.dtype, state.shape[::-1] if self.transposed else state.shape)
        self.out_dtype = state.dtype
        self.scheme = scheme(names, state.blocksize)
        self._n_blocks = -(-self.spec.numel // state.blocksize)
        self.nbytes = self.spec.numel if self.transposed else 0
        self._pairs = _pairs(bytes(read_all(ckpt, weight + ".quant_map")))
        self._nested_map = (
            _floats(bytes(read_all(ckpt, weight + ".nested_quant_map"))) if state.nested_blocksize else None
        )

    def _blocks(self, start: int, stop: int) -> tuple[int, int]:
        if self.transposed:
            start, stop = 0, self.spec.numel
        return start // self._state.blocksize, -(-stop // self._state.blocksize)

    def will_need(self, start: int, stop: int) -> None:
        first, last = self._blocks(start, stop)
        half = self._state.blocksize // 2
        nbytes = self.store.tensors[self._weight].spec.nbytes
        self.store.will_need(self._weight, first * half, min(last * half, nbytes) - first * half)

    def fetch(self, start: int, stop: int, arena: Arena) -> tuple[torch.Tensor, ...]:
        """Packed codes, absmax, and with double quantization nested_absmax, of the blocks that [start, stop)
        touches."""
        state = self._state
        first, last = self._blocks(start, stop)
        half = state.blocksize // 2
        end = min(last * half, -(-self.spec.numel // 2))
        packed = arena.fetch("bnb4.packed", self.store, self._weight, first * half, end - first * half)
        if not state.nested_blocksize:
            absmax = arena.fetch(
                "bnb4.absmax", self.store, self._weight + ".absmax", first * 4, (last - first) * 4
            )
            return packed, absmax.view(torch.float32)
        # Whole nested blocks: a tile may start inside one.
        outer, outer_end = first // state.nested_blocksize, -(-last // state.nested_blocksize)
        begin, end = outer * state.nested_blocksize, min(outer_end * state.nested_blocksize, self._n_blocks)
        codes = arena.fetch("bnb4.absmax", self.store, self._weight + ".absmax", begin, end - begin)
        nested = arena.fetch(
            "bnb4.nested", self.store, self._weight + ".nested_absmax", outer * 4, (outer_end - outer) * 4
        )
        return packed, codes, nested.view(torch.float32)

    def decode(self, raw: tuple[torch.Tensor, ...], start: int, stop: int, arena: Arena) -> torch.Tensor:
        packed = arena.place(raw[0])
        first, last = self._blocks(start, stop)
        absmax = self._absmax(raw, first, last, arena)
        if self.transposed:
            values = self._decode_transposed(packed, absmax, start, stop, arena)
        else:
            blocksize = self._state.blocksize
            # Room for whole blocks: the last one may be short, and the pad nibble of an odd count is decoded
            # and cut off.
            values = arena.get(DECODED_FP32, (last - first) * blocksize, torch.float32)
            look_up(packed, self._pairs, values, arena)
            values.view(-1, blocksize).mul_(absmax[:, None])
            values = values[start - first * blocksize : stop - first * blocksize]
        if self._state.dtype == "F32":
            return values
        narrow = arena.get(NARROW, stop - start, torch.int16).view(getattr(torch, self.spec.torch_name))
        return narrow.copy_(values)

    def _absmax(self, raw: tuple[torch.Tensor, ...], first: int, last: int, arena: Arena) -> torch.Tensor:
        """float32 [last - first], the scale of each block."""
        state = self._state
        if self._nested_map is None:
            return arena.place(raw[1])
        codes, nested = arena.place(raw[1]), arena.place(raw[2])
        outer = nested[:, None].expand(-1, state.nested_blocksize).reshape(-1)[: codes.numel()]
        scales = nested_absmax(
            codes, arena.place(self._nested_map), outer, state.nested_offset, first % state.nested_blocksize
        )
        return scales[: last - first]

    def _decode_transposed(
        self, packed: torch.Tensor, absmax: torch.Tensor, start: int, stop: int, arena: Arena
    ) -> torch.Tensor:
        """Rows of the transposed weight are columns of the stored one: element by element, since a byte may
        span two."""
        n_stored_rows, n_stored_cols = self._state.shape
        rows = torch.arange(start // n_stored_rows, stop // n_stored_rows, device=arena.device)
        flat = (rows[:, None] + torch.arange(n_stored_rows, device=arena.device) * n_stored_cols).view(-1)
        byte = packed[flat >> 1].int()
        code = torch.where(flat & 1 == 1, byte & 15, byte >> 4)
        quant_map = arena.place(self._pairs.view(torch.float32)[1:32:2])  # the second values of bytes 0…15
        return quant_map[code].mul_(absmax[flat // self._state.blocksize])
