"""The quant_state of a 4-bit weight, read and checked."""

import json
from dataclasses import dataclass
from typing import Any

from lorafuse.files.checkpoint import Checkpoint
from lorafuse.files.stores import read_all
from lorafuse.files.tensors import FLOATS, SAFETENSORS_NAMES, TensorSpec

MARKER = ".quant_state.bitsandbytes__"  # before the kind, in the name of a stored quant_state
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


def read_state(name: str, ckpt: Checkpoint) -> QuantState:
    """Raises ValueError and what Python raises for JSON that is broken."""
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


def check_companions(weight: str, state: QuantState, ckpt: Checkpoint) -> None:
    """Raises ValueError unless every companion has the dtype and length that the quant_state implies."""
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
