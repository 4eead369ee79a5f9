"""The checks of an adapter's tensors: their shapes fit each other and the weight, their positions lie in it;
else AdapterError names them."""

import math

import torch

from lorafuse.adapters.reading.directory import AdapterDir
from lorafuse.adapters.reading.keys import check_float
from lorafuse.errors import AdapterError, listed, shown
from lorafuse.files.tensors import FLOATS
from lorafuse.patches.factor import pieces
from lorafuse.patches.target import Target

INTEGERS = ("U8", "I8", "I16", "I32", "I64")
_ANOTHER_BASE = "; is the adapter for another base?"
# The dimensions of a tensor, each a size or a name for one.
Dims = tuple[int | str, ...]


def shape_of(adapter: AdapterDir, key: str) -> tuple[int, ...]:
    return adapter.store.tensors[key].spec.shape


def check_shapes(
    adapter: AdapterDir, *expected: tuple[str, Dims], integers: tuple[str, ...] = (), hint: str = ""
) -> dict[str, int]:
    """The size of each name in the dimensions that the keys are expected to have; a name has the same size
    wherever it stands, at least 1. Raises AdapterError for another shape, and for another dtype than floats,
    or integers in those of `integers`."""
    sizes: dict[str, int] = {}
    origin: dict[str, str] = {}  # name → the key that gave it its size
    for key, dims in expected:
        check_integer(adapter, key) if key in integers else check_float(adapter, key)
        shape, known = shape_of(adapter, key), dict(sizes)
        for dim, n in zip(dims, shape, strict=False):
            if isinstance(dim, str) and n > 0:
                known.setdefault(dim, n)
        if shape != _resolved(dims, known):
            sources = dict.fromkeys(origin[dim] for dim in dims if isinstance(dim, str) and dim in origin)
            why = f" from {' and '.join(map(shown, sources))}" if sources else ""
            raise unexpected(adapter, key, f"{_listed(_resolved(dims, sizes))}{why}{hint}")
        origin |= dict.fromkeys(known.keys() - sizes.keys(), key)
        sizes = known
    return sizes


def _resolved(dims: Dims, sizes: dict[str, int]) -> Dims:
    return tuple(sizes.get(dim, dim) if isinstance(dim, str) else dim for dim in dims)


def check_shape(adapter: AdapterDir, key: str, expected: tuple[int, ...], why: str) -> None:
    """A float tensor of that very shape, which may be empty; `why` says what the shape follows from."""
    check_float(adapter, key)
    if shape_of(adapter, key) != expected:
        raise unexpected(adapter, key, f"{_listed(expected)} {why}")


def _listed(dims: Dims) -> str:
    return f"[{', '.join(map(str, dims))}]"


def check_integer(adapter: AdapterDir, key: str) -> None:
    dtype = adapter.store.tensors[key].spec.dtype
    if dtype not in INTEGERS:
        raise AdapterError(
            f"{adapter.file}: {shown(key)} has the dtype {dtype}; expected one of {listed(INTEGERS)}."
        )


def check_positions(
    adapter: AdapterDir,
    key: str,
    limit: int,
    of: str,
    *,
    start: int = 0,
    stop: int | None = None,
    in_base: bool = False,
) -> None:
    """Elements [start, stop) of a tensor are positions in [0, limit), `of` says of what; they are read in
    pieces."""
    for _, positions in pieces(adapter.store, key, start, stop):
        least, most = positions.min().item(), positions.max().item()
        if not 0 <= least <= most < limit:  # nor is NaN a position
            wrong, end = most if least >= 0 else least, _ANOTHER_BASE if in_base else "."
            raise AdapterError(
                f"{adapter.file}: {shown(key)} has the position {wrong}, outside of the {limit} {of}{end}",
                misfit=in_base,
            )


def refuse_placeholders(adapter: AdapterDir) -> None:
    """Raises AdapterError for tensors of shape [0], which stand for those that DeepSpeed ZeRO-3 has cut."""
    # OSF's singular values of a module that it does not train are none.
    tensors = (item for item in adapter.store.tensors.items() if not item[0].endswith(".S_low"))
    empty = [key for key, info in tensors if info.spec.shape == (0,)]
    if empty:
        raise AdapterError(
            f"{adapter.file}: {listed(empty, most=2)} of shape [0]: DeepSpeed ZeRO-3 saved placeholders in "
            "their place. Save the adapter with the parameters gathered "
            "(stage3_gather_16bit_weights_on_model_save), or make it from the training state with "
            "zero_to_fp32.py."
        )


def refuse_nonfinite(adapter: AdapterDir) -> None:
    """All tensors hold finite numbers. Reads the files, in pieces."""
    for key, info in adapter.store.tensors.items():
        n_broken = sum(map(_count_nonfinite, pieces(adapter.store, key))) if info.spec.dtype in FLOATS else 0
        if n_broken:
            raise AdapterError(
                f"{adapter.file}: {n_broken} of {info.spec.numel} values of {shown(key)} are not finite; "
                "training diverged, or the file is damaged."
            )


def _count_nonfinite(piece: tuple[int, torch.Tensor]) -> int:
    values = piece[1]
    # One sum rather than isfinite: a hundredth of the time. It can overflow itself, so that elements are
    # counted then.
    return 0 if math.isfinite(float(values.sum())) else int((~values.isfinite()).sum())


def unexpected(adapter: AdapterDir, key: str, expected: str) -> AdapterError:
    """The refusal of a tensor whose dtype or shape is not the type's."""
    return AdapterError(
        f"{adapter.file}: {shown(key)} is {adapter.store.tensors[key].spec}, expected {expected}."
    )


def not_one_update(adapter: AdapterDir, *keys: str) -> AdapterError:
    """The refusal of tensors whose shapes do not fit each other, or the type."""
    named = " and ".join(f"{shown(key)} is {adapter.store.tensors[key].spec}" for key in keys)
    kind = shown(adapter.config.get("peft_type"))
    wrong = "they do not make one update" if len(keys) > 1 else f"{kind} has no such shape"
    return AdapterError(f"{adapter.file}: {named}; {wrong}.")


def misfit(adapter: AdapterDir, target: Target, *keys: str, hint: str = "") -> AdapterError:
    """The refusal of tensors whose shapes are not those of the weight."""
    named = " and ".join(f"{shown(key)} {list(shape_of(adapter, key))}" for key in keys)
    verb = "does" if len(keys) == 1 else "do"
    where = f"{shown(target.name)} {list(target.spec.shape)}"
    return AdapterError(f"{adapter.file}: {named} {verb} not fit {where}{_ANOTHER_BASE}{hint}", misfit=True)


def refuse_conv1d(adapter: AdapterDir, key: str, target: Target) -> None:
    """PEFT has no such layer of this type, so which way round the tensors are meant is unknown."""
    if target.is_conv1d:
        kind = shown(adapter.config.get("peft_type"))
        raise AdapterError(
            f"{adapter.file}: {shown(key)} updates {shown(target.name)}, an HF Conv1D, which {kind} does not "
            "adapt."
        )


def is_transposed(
    adapter: AdapterDir,
    keys: tuple[str, ...],
    out_in: tuple[int, int],
    target: Target,
    *,
    kernels: bool = False,
) -> bool:
    """Whether the weight is stored as (in, out), as HF Conv1D does; decided by its shape and, when that is
    square, by the architecture, since the saved `fan_in_fan_out` is that of the last layer which PEFT
    touched. With `kernels`, the weight of a convolution is its matrix. Raises AdapterError, naming `keys`,
    when an update of `out_in` fits neither way."""
    shape = target.spec.shape
    matrix = (shape[0], target.spec.n_cols) if len(shape) == 2 or (kernels and len(shape) > 2) else None
    if out_in == matrix and not (out_in[0] == out_in[1] and target.is_conv1d):
        return False
    if out_in[::-1] == matrix and len(shape) == 2:
        return True
    raise misfit(adapter, target, *keys)


def n_cols_of(target: Target) -> int:
    """Columns of the weight as a matrix of its first dimension; 0 for a vector, which no matrix update
    fits."""
    return target.spec.n_cols if len(target.spec.shape) > 1 else 0
