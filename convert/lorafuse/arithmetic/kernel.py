"""The compiled kernel, an optional part: which there is, and whether it is used.

`kernel.c` is a shared library beside this file where a C compiler was there when lorafuse was installed. It
does what the torch code of this room does, in fewer passes and to the same bit. LORAFUSE_KERNEL says whether:
`auto` (the default) where there is one, `on` or not at all, `off`. Importing this does not import torch.
"""

import ctypes
import os
from functools import cache
from importlib.util import find_spec

from lorafuse.errors import UsageError

SWITCH = "LORAFUSE_KERNEL"
INTERFACE = 6  # of kernel.c: a library of another one is none
LEVELS = ("baseline", "avx2", "avx512")

_SCALES = (*(ctypes.c_void_p,) * 4, *(ctypes.c_int64,) * 3, ctypes.c_float)  # arguments
_E4M3 = (*(ctypes.c_void_p,) * 2, ctypes.c_int64, ctypes.c_int32)


class Kernel:
    """A loaded library, and the level of the processor that it works at."""

    def __init__(self, library: ctypes.CDLL, level: int) -> None:
        self._library, self.level = library, level
        self.round_tile, self.decode = library.lorafuse_round, library.lorafuse_decode
        self.round_tile.restype, self.decode.restype = ctypes.c_int64, ctypes.c_int32
        self.measure = library.lorafuse_measure
        self.measure.restype = ctypes.c_int32
        self.unpack = library.lorafuse_unpack
        self.unpack.restype = None
        self.units, self.vectors = library.lorafuse_units, library.lorafuse_vectors
        self.units.restype, self.vectors.restype = ctypes.c_int32, ctypes.c_int32
        self.rows = library.lorafuse_rows
        self.rows.restype = ctypes.c_int32
        self.e4m3 = library.lorafuse_e4m3
        self.e4m3.restype, self.e4m3.argtypes = None, _E4M3
        self.scales = library.lorafuse_scales
        self.scales.restype, self.scales.argtypes = None, _SCALES

    def at(self, level: int) -> "Kernel":
        """The same at another level that the processor has."""
        return Kernel(self._library, level)

    def __str__(self) -> str:
        return LEVELS[self.level]


@cache
def load(path: str) -> Kernel | None:
    """The kernel of a library, at the best level of this processor; None where it is of another interface, or
    cannot be loaded."""
    try:
        library = ctypes.CDLL(path)
        if library.lorafuse_interface() != INTERFACE:
            return None
        return Kernel(library, library.lorafuse_level())
    except (OSError, AttributeError):
        return None


@cache
def installed() -> Kernel | None:
    """The kernel that was built when lorafuse was installed."""
    spec = find_spec("lorafuse.arithmetic._kernel")
    return load(spec.origin) if spec and spec.origin else None


def chosen() -> Kernel | None:
    """The kernel to be used on the CPU; None where torch does all. Raises UsageError where LORAFUSE_KERNEL is
    no word that it knows, or asks for a kernel that there is not."""
    wish = os.environ.get(SWITCH) or "auto"
    if wish not in ("off", "on", "auto"):
        raise UsageError(f"{SWITCH} is {wish!r}; it can be off, on or auto.")
    kernel = None if wish == "off" else installed()
    if wish == "on" and kernel is None:
        raise UsageError(
            f"{SWITCH} is on, but lorafuse was installed without its compiled kernel; install it again where "
            "there is a C compiler, or choose auto."
        )
    return kernel


def described() -> str:
    """The level of the kernel that is used, or `none`. Raises UsageError as `chosen` does."""
    return str(chosen() or "none")
