"""The call of the compiled kernel that decodes rows of codes; compiled.py has the others."""

import ctypes

import torch

from lorafuse.arithmetic.codes import Codes, Numbers
from lorafuse.arithmetic.compiled import DTYPES, address
from lorafuse.arithmetic.kernel import Kernel

_DIFFERENCE, _BIASED = 1, 2  # of kernel.c


class _Rows(ctypes.Structure):
    """`struct rows` of kernel.c."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("packed", "levels", "scales", "zeros", "group_of", "values")),
        *((name, ctypes.c_int64) for name in ("n_rows", "row_nbytes", "n_cols", "width")),
        *((name, ctypes.c_int64) for name in ("numbers_step", "step", "skip")),
        *((name, ctypes.c_int32) for name in ("bits", "kind", "padded", "turned", "how", "via")),
        *((name, ctypes.c_int32) for name in ("dtype", "level")),
    )


def decode_rows(
    kernel: Kernel,
    packed: torch.Tensor,
    codes: Codes,
    numbers: Numbers,
    dtypes: list[torch.dtype],
    values: torch.Tensor,
    skip: int | None = None,
) -> bool:
    """coded_rows.decode_rows, or with `skip` decode_turned. False where it is left to torch: bits of NaN are
    its own."""
    turned = skip is not None
    n_cols = values.shape[0] + skip if skip is not None else values.shape[1]
    scales, zeros = _laid_out(numbers)
    n_groups, group_of, width = scales.shape[1], None, n_cols
    if isinstance(numbers.group_of, torch.Tensor):
        group_of = numbers.group_of.int().contiguous()
    elif n_groups > 1:
        width = numbers.group_of
    fits = len(scales) in (1, len(packed)) and (zeros is None or zeros.shape == scales.shape)
    known = len(dtypes) == 1 or (len(dtypes) == 2 and not numbers.are_biases)
    if not (fits and known) or (group_of is None and width * n_groups < n_cols) or (turned and codes.padded):
        return False
    via = dtypes[0] if numbers.are_biases or len(dtypes) > 1 else torch.float32
    call = _Rows(
        packed=packed.data_ptr(), levels=address(codes.levels), scales=address(scales), zeros=address(zeros),
        group_of=address(group_of), values=address(values),
        n_rows=len(packed), row_nbytes=packed.stride(0), n_cols=n_cols, width=width,
        numbers_step=n_groups if len(scales) > 1 else 0, step=values.shape[1], skip=skip or 0,
        bits=codes.bits, kind=codes.kind, padded=codes.padded and 32 % codes.bits > 0, turned=turned,
        how=_BIASED if numbers.are_biases else _DIFFERENCE, via=DTYPES[via], dtype=DTYPES[values.dtype],
        level=kernel.level,
    )  # fmt: skip
    return bool(kernel.rows(ctypes.byref(call)))


def _laid_out(numbers: Numbers) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Scales and zero points, contiguous, and of as many rows."""
    if numbers.zeros is None:
        return numbers.scales.contiguous(), None
    n_rows = max(len(numbers.scales), len(numbers.zeros))
    return numbers.scales.expand(n_rows, -1).contiguous(), numbers.zeros.expand(n_rows, -1).contiguous()
