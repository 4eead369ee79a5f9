"""An update of one matrix, brought to the stack of matrices that the checkpoint has it in."""

from collections.abc import Callable
from dataclasses import replace

from lorafuse.adapters import Patch, Target
from lorafuse.errors import AdapterError, shown
from lorafuse.files.tensors import TensorSpec
from lorafuse.patches.lowrank import LowRank
from lorafuse.patches.matrices import Matrices, MatrixUpdate
from lorafuse.patches.target import InStack


def patch_of_matrix(
    make: Callable[[Target], Patch], in_stack: InStack, target: Target, subject: str
) -> Matrices:
    """What `make` makes of the matrix, in the stack that `target` is. `subject` begins a refusal: file and
    tensor. Raises AdapterError where the update does not fit, or fits in both orientations."""
    ways = [way for first in (bool(in_stack.in_out),) for way in (first, not first)]
    if in_stack.n_parts == 1 and target.spec.shape[1] != target.spec.shape[2]:
        ways = ways[:1]  # the update finds its orientation by itself
    fitting: list[Matrices] = []
    misfits: list[AdapterError] = []
    for in_out in ways:
        try:
            fitting.append(_oriented(make, in_stack, target, subject, in_out=in_out))
        except AdapterError as e:
            if not e.misfit:
                raise
            misfits.append(e)
    if not fitting:
        raise misfits[0]
    if len(fitting) > 1 and in_stack.in_out is None:
        raise AdapterError(
            f"{subject} updates a matrix of {shown(target.name)}, {list(target.spec.shape)}, of which it is "
            "not known whether it is (experts, out, in) or (experts, in, out); the update fits both."
        )
    return fitting[0]


def _oriented(
    make: Callable[[Target], Patch], in_stack: InStack, target: Target, subject: str, *, in_out: bool
) -> Matrices:
    _, n_rows, n_cols = target.spec.shape
    n_outputs, rest = divmod(n_cols if in_out else n_rows, in_stack.n_parts)
    outputs = in_stack.outputs(n_outputs * in_stack.n_parts)
    rows, cols = (range(n_rows), outputs) if in_out else (outputs, range(n_cols))
    spec = TensorSpec(target.spec.dtype, (len(rows), len(cols)))
    inner = make(replace(target, spec=spec, is_conv1d=in_out, part=None))
    if rest or not isinstance(inner, LowRank):
        raise AdapterError(
            f"{subject} changes one matrix of {shown(target.name)}, {list(target.spec.shape)}, in a way that "
            "is supported only where each expert has a tensor of its own."
        )
    return Matrices([MatrixUpdate(in_stack.expert, rows, cols, inner)], n_rows)
