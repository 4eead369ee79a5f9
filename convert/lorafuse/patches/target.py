"""What a patch is made for: a weight, and the part of a parameter that it holds."""

from dataclasses import dataclass

from lorafuse.codecs.sources import Sources
from lorafuse.files.tensors import TensorSpec

WHOLE = -1


@dataclass(frozen=True, slots=True)
class InStack:
    """Where a matrix (out, in) lies in a weight that is a stack of matrices: in that of `expert`, whose
    outputs are cut in `n_parts` equal parts; interleaved, every n_parts-th of them belongs to a part.

    `in_out`: whether the stack is (experts, in, out); None where it is not known, so that shapes decide.
    """

    expert: int
    part: int = 0
    n_parts: int = 1
    interleaved: bool = False
    in_out: bool | None = None

    def outputs(self, n_outputs: int) -> range:
        """Those of the part, among all of the matrix."""
        if self.interleaved:
            return range(self.part, n_outputs, self.n_parts)
        n_own = n_outputs // self.n_parts
        return range(self.part * n_own, (self.part + 1) * n_own)


@dataclass(frozen=True, slots=True)
class Part:
    """What a weight holds of a parameter, where these differ because loading stacks, joins or cuts tensors.

    Rows [row, row + n_rows) of the parameter are rows [weight_row, …) of the weight; with `expert`, the
    parameter is a stack of matrices, and rows are those of that matrix.
    """

    weight: str
    n_rows: int = WHOLE
    row: int = 0
    weight_row: int = 0
    expert: int | None = None
    transposed: bool = False  # in memory
    in_stack: InStack | None = None  # the parameter is one matrix of the weight, or a part of one

    @property
    def whole(self) -> bool:
        """Whether weight and parameter hold the same."""
        if self.in_stack is not None:
            return False
        return self.expert is None and self.row == self.weight_row == 0 and self.n_rows == WHOLE


@dataclass(frozen=True, slots=True)
class Parameter:
    """A parameter of the model in memory, found in the checkpoint: its shape there, and the weights that hold
    it."""

    shape: tuple[int, ...]
    parts: tuple[Part, ...]
    in_out: bool = False  # a stack that transformers 5 keeps as (E, in, out), against its custom
    either_way: bool = False  # a stack whose orientation in memory depends on the version that loads it


@dataclass(frozen=True)
class Target:
    """The weight that an update found: its name in the checkpoint, spec, and whether its matrix is stored as
    (in, out), as HF Conv1D's is."""

    name: str
    spec: TensorSpec
    is_conv1d: bool
    part: Part | None = None
    beside: Sources | None = None  # the other parameter that the update asked for, before any patch
    quantized: bool = False  # whether the base is
    model_type: object = None  # of the checkpoint's config
