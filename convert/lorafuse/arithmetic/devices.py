"""Which device computes: what a user names, or for `auto` the one that is faster for the work at hand.

The figures of the CPU are those of docs/benchmarks.md, rounded. Those of a GPU are assumed, not measured: no
GPU was at hand. `python -m bench.speed.gpu` measures them.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from lorafuse.arithmetic import kernel
from lorafuse.errors import UsageError

# Seconds of a core for an element: decode, update, round and measure, with the compiled kernel and without.
WITH_KERNEL_S, WITHOUT_KERNEL_S = 1.0e-9, 2.5e-9
PRODUCT_S = 0.022e-9  # of a core, for each rank of an update of low rank, beside that
# Assumed, of a GPU:
START_S = 3.0  # CUDA's context, and its kernels on their first call
COPY_NBYTES_PER_S = 12e9  # pinned memory, each way
TILE_S = 0.6e-3  # of the process, which starts some sixty operations for a tile, one at a time
THERE_S = 0.15e-9  # of the GPU, for an element


@dataclass(frozen=True)
class Work:
    """What a run computes: elements that are decoded, products of low rank (elements times rank), tiles, and
    the bytes that are stored before and after. `fits`: in what lorafuse takes of a GPU's memory."""

    n_elements: int
    n_products: int
    n_tiles: int
    in_nbytes: int
    out_nbytes: int
    n_workers: int
    fits: bool = True

    @property
    def on_cpu_s(self) -> float:
        """Seconds that it may take on the CPU."""
        of_element = WITH_KERNEL_S if kernel.chosen() else WITHOUT_KERNEL_S
        return (self.n_elements * of_element + self.n_products * PRODUCT_S) / self.n_workers

    @property
    def on_gpu_s(self) -> float:
        """Seconds that it may take on a GPU, by assumed figures: what goes on beside each other counts
        once."""
        copies = max(self.in_nbytes, self.out_nbytes) / COPY_NBYTES_PER_S
        return START_S + max(copies, self.n_tiles * TILE_S, self.n_elements * THERE_S)


@dataclass(frozen=True)
class Choice:
    """A device by name, and for `auto` why, where there was a choice."""

    name: str
    why: str | None = None

    @property
    def device(self) -> torch.device:
        # With its number: a device without is that of the thread, which may be another.
        return torch.device("cuda", 0) if self.name == "cuda" else torch.device(self.name)

    @property
    def said(self) -> str:
        """The name, and why."""
        return f"{self.name} ({self.why})" if self.why else self.name


def cuda_devices() -> list[str]:
    """The names of the GPUs that torch sees."""
    return [torch.cuda.get_device_name(number) for number in range(torch.cuda.device_count())]


def check_device(name: str) -> None:
    """Raises UsageError for a device that is not there, and on the CPU for a compiled kernel that is not."""
    device = torch.device("cpu" if name == "auto" else name)
    if device.type == "cpu":
        kernel.chosen()
    elif (device.index or 0) >= torch.cuda.device_count():
        raise UsageError(f"device {name}: torch sees {torch.cuda.device_count()} CUDA devices here.")


def choose_device(name: str, work_of: Callable[[], Work]) -> Choice:
    """The device of that name; for `auto`, the CPU unless a GPU is there, holds the work, and is faster.
    Raises UsageError as `check_device` does."""
    check_device(name)
    if name != "auto":
        return Choice(name)
    if not torch.cuda.is_available():
        return Choice("cpu")
    work = work_of()
    if not work.fits:
        return Choice("cpu", "a weight holds more than lorafuse takes of a GPU's memory")
    times = f"about {work.on_cpu_s:.1f} s of computing here, {work.on_gpu_s:.1f} s on the GPU with its start"
    return Choice("cuda" if work.on_gpu_s < work.on_cpu_s else "cpu", times)


def device_kind(name: str) -> str:
    """`cpu` or `cuda`, of a chosen device: their bytes may differ."""
    return torch.device(name).type
