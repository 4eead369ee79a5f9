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
    offset: int  # bytes from the start of that file; only safetensors_file makes and uses it


class StoredTensor(NamedTuple):
    """One entry of an output file's header."""

    name: str
    spec: TensorSpec

    @property
    def nbytes(self) -> int:
        return self.spec.nbytes


@dataclass(frozen=True, slots=True)
class Box:
    """Rows and columns of one matrix of a weight.

    Whoever asks for it says how the weight is seen: as a stack of matrices [height, width], one after
    another, each row by row. A matrix is a stack of one, a vector is rows of one element, a convolution is
    its first dimension × the rest.
    """

    rows: range
    cols: range
    height: int
    width: int
    matrix: int = 0  # its place in the stack

    @classmethod
    def of_rows(cls, spec: TensorSpec, first: int, last: int) -> "Box":
        """Indexes [first, last) of the first dimension."""
        return cls(range(first, last), range(spec.n_cols), math.prod(spec.shape[:1]), spec.n_cols)

    @classmethod
    def of_run(cls, spec: TensorSpec, start: int, stop: int) -> "Box":
        """Elements [start, stop) of the flattened weight, which is seen as one row."""
        return cls(range(1), range(start, stop), 1, spec.numel)

    @classmethod
    def whole(cls, spec: TensorSpec) -> "Box":
        """All of the weight, seen as its first dimension × the rest."""
        return cls.of_rows(spec, 0, math.prod(spec.shape[:1]))

    @property
    def numel(self) -> int:
        return len(self.rows) * len(self.cols)

    @property
    def run(self) -> tuple[int, int]:
        """(start, stop): its elements in the flattened weight, where they lie together."""
        assert len(self.rows) == 1 or len(self.cols) == self.width, f"{self} does not lie together"
        start = (self.matrix * self.height + self.rows.start) * self.width + self.cols.start
        return start, start + self.numel
