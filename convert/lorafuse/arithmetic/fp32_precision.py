"""The precision of fp32 matrix products, a setting of the process: exact, and as it was.

torch 2.9 has a setting for each backend, which inherits from the backend's, and this from a general one; what
is read is what holds. Beside them stands an older one for all, which cannot be read while it contradicts
them.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch

_GENERAL = ("generic", "all")
_BACKENDS = ("cuda", "mkldnn")
# Older setting → what it makes of the newer ones of both backends.
_OLDER = {"highest": ("ieee", "ieee"), "high": ("tf32", "tf32"), "medium": ("tf32", "bf16")}


class Products(NamedTuple):
    """What the settings were. `by_backend`: of each, "none" where it inherits; None in torch before 2.9."""

    older: str
    by_backend: tuple[str, ...] | None


def exact_products() -> Products:
    """Makes fp32 products exact. Returns what the settings were."""
    read, write = _newer("_get_fp32_precision_getter"), _newer("_set_fp32_precision_setter")
    if read is None or write is None:
        before = Products(torch.get_float32_matmul_precision(), None)
    else:
        by_backend = tuple(_own(read, write, backend) for backend in _BACKENDS)
        before = Products(_older(write), by_backend)
    torch.set_float32_matmul_precision("highest")
    return before


def restore_products(before: Products) -> None:
    torch.set_float32_matmul_precision(before.older)
    write = _newer("_set_fp32_precision_setter")
    if before.by_backend is not None and write is not None:
        for backend, precision in zip(_BACKENDS, before.by_backend, strict=True):
            write(backend, "matmul", precision)


def _newer(name: str) -> Callable[..., Any] | None:
    return getattr(torch._C, name, None)


def _older(write: Callable[..., Any]) -> str:
    """The older setting, for which the newer ones are changed."""
    for older, precisions in _OLDER.items():
        for backend, precision in zip(_BACKENDS, precisions, strict=True):
            write(backend, "matmul", precision)
        try:
            if torch.get_float32_matmul_precision() == older:
                return older
        except RuntimeError:  # it contradicts these
            continue
    return "highest"


def _own(read: Callable[..., Any], write: Callable[..., Any], backend: str) -> str:
    """A backend's own setting for products, "none" where it inherits."""
    products, of_backend = (backend, "matmul"), (backend, "all")

    def follows(setting: tuple[str, str], above: tuple[str, str], own_above: str) -> bool:
        before = read(*setting)
        write(*above, "ieee" if read(*above) == "tf32" else "tf32")
        changed = read(*setting) != before
        write(*above, own_above)
        return bool(changed)

    general = str(read(*_GENERAL))
    own = "none" if follows(of_backend, _GENERAL, general) else str(read(*of_backend))
    inherits = follows(products, _GENERAL, general) or follows(products, of_backend, own)
    return "none" if inherits else str(read(*products))
