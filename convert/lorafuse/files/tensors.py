"""What a tensor is without its data: dtype and shape, and where it is stored.

The dtype table is the safetensors format's (its README, "Format"), with the names that torch and config.json
use.
"""

import math
from dataclasses import dataclass
from typing import NamedTuple

# safetensors name → (bytes per element, torch name); the torch name is also the one that config.json uses.
DTYPES: dict[str, tuple[int, str]] = {
    "BOOL": (1, "bool"),
    "U8": (1, "uint8"),
    "I8": (1, "int8"),
    "F8_E5M2": (1, "float8_e5m2"),
    "F8_E4M3": (1, "float8_e4m3fn"),
    "F8_E8M0": (1, "float8_e8m0fnu"),
    "F8_E4M3FNUZ": (1, "float8_e4m3fnuz"),
    "F8_E5M2FNUZ": (1, "float8_e5m2fnuz"),
    "I16": (2, "int16"),
    "U16": (2, "uint16"),
    "F16": (2, "float16"),
    "BF16": (2, "bfloat16"),
    "I32": (4, "int32"),
    "U32": (4, "uint32"),
    "F32": (4, "float32"),
    "C64": (8, "complex64"),
    "F64": (8, "float64"),
    "I64": (8, "int64"),
    "U64": (8, "uint64"),
}
SAFETENSORS_NAMES = {torch_name: name for name, (_, torch_name) in DTYPES.items()}
# The dtypes of ordinary weights: what --dtype converts, and what an adapter may update.
FLOATS = ("F32", "F16", "BF16")


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """dtype (safetensors name) and shape of a tensor."""

    dtype: str
    shape: tuple[int, ...]

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        return self.numel * DTYPES[self.dtype][0]

    @property
    def torch_name(self) -> str:
        return DTYPES[self.dtype][1]

    @property
    def n_cols(self) -> int:
        """Elements per row, a row being an index of the first dimension; 1 for vectors and scalars."""
        return math.prod(self.shape[1:])

    def __str__(self) -> str:
        return f"{self.dtype} {list(self.shape)}"


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """A stored tensor: its spec and the number of the file that holds it, in its store's list of files."""

    spec: TensorSpec
    file: int
    offset: int  # bytes from the start of that file; only shardfile makes and uses it


class StoredTensor(NamedTuple):
    """One entry of an output file's header."""

    name: str
    spec: TensorSpec

    @property
    def nbytes(self) -> int:
        return self.spec.nbytes
