"""How tiles pass over a device: pinned copy in, compute, pinned copy out.

Each worker has a lane, and on it one tile at a time. What is queued on a lane is done in order, beside what
is queued on the others: while one tile is computed, others are copied in and out, read and written. The host
waits for a tile once, before its bytes are written.
"""

from typing import Protocol

import torch

# All that lorafuse allocates on a device, CUDA's own context apart.
DEVICE_NBYTES = 512_000_000
# More lanes would wait for each other: one process starts the operations of all.
MOST_LANES = 8
LANES_PER_WORKER = 2  # a lane's thread waits while its tile is computed
# Of a lane, beside its tile: what cuBLAS takes for each stream (32 MiB on Hopper, 8 before), and measuring.
WORKSPACE_NBYTES = 32 << 20
MEASURED_NUMEL = 1 << 19  # elements at once
MEASURED_NBYTES_PER_ELEMENT = 20


class Mark(Protocol):
    """A place in what is queued on a lane, as torch.cuda.Event is."""

    def synchronize(self) -> None:
        """Returns when all that was queued before it is done. Raises what went wrong."""


class Lane(Protocol):
    """A queue of a device, and memory of the host that the device copies from and into by itself."""

    def bind(self) -> None:
        """What the calling thread computes on the device is queued here from now on. A lane that no thread is
        bound to is the device's default queue."""

    def pinned(self, nbytes: int) -> torch.Tensor:
        """uint8 [nbytes] on the host, uninitialised."""

    def copy_in(self, host: torch.Tensor) -> torch.Tensor:
        """Queues a copy to the device, and returns it. A pinned `host` is read later, others at once."""

    def copy_out(self, values: torch.Tensor, host: torch.Tensor) -> None:
        """Queues a copy into `host`, which is pinned."""

    def mark(self) -> Mark:
        """A mark behind all that is queued so far."""


class CudaLane:
    """A stream of CUDA: that of the calling thread."""

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def bind(self) -> None:
        torch.cuda.set_stream(torch.cuda.Stream(self._device))  # type: ignore[no-untyped-call]

    def pinned(self, nbytes: int) -> torch.Tensor:
        return torch.empty(nbytes, dtype=torch.uint8, device="cpu", pin_memory=True)

    def copy_in(self, host: torch.Tensor) -> torch.Tensor:
        return host.to(self._device, non_blocking=True)

    def copy_out(self, values: torch.Tensor, host: torch.Tensor) -> None:
        host.copy_(values, non_blocking=True)

    def mark(self) -> Mark:
        event = torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call]  # others get the core meanwhile
        event.record(torch.cuda.current_stream(self._device))
        return event


def lane_of(device: torch.device) -> Lane | None:
    """A lane of a device; None of the CPU, which needs none."""
    return None if device.type == "cpu" else CudaLane(device)


def is_host(device: torch.device) -> bool:
    """Whether tiles are computed on the CPU."""
    return lane_of(device) is None


def lane_nbytes(tile_nbytes: int) -> int:
    """What a lane takes on the device, with a tile that takes so much."""
    return WORKSPACE_NBYTES + MEASURED_NUMEL * MEASURED_NBYTES_PER_ELEMENT + tile_nbytes


def n_lanes(n_workers: int, tile_nbytes: int, held_nbytes: int) -> int:
    """How many tiles may be on the device at once, beside what is held there; 0 where not even one fits."""
    fit = (DEVICE_NBYTES - held_nbytes) // lane_nbytes(tile_nbytes)
    return max(min(LANES_PER_WORKER * n_workers, MOST_LANES, fit), 0)


class Staging:
    """The pinned buffers of a lane, by name, made once and grown when a larger one is asked for. A buffer is
    given out again when what was copied from it is there, and not before."""

    def __init__(self, lane: Lane) -> None:
        self._lane = lane
        self._buffers: dict[str, torch.Tensor] = {}
        self._copied: dict[int, Mark | None] = {}  # address of a buffer → behind the last copy from it

    def get(self, name: str, nbytes: int) -> torch.Tensor:
        """uint8 [nbytes]; the buffer of the last call with that name is no longer valid."""
        buffer = self._buffers.get(name)
        if buffer is not None and (mark := self._copied[buffer.data_ptr()]):
            mark.synchronize()
            self._copied[buffer.data_ptr()] = None
        if buffer is None or buffer.numel() < nbytes:
            if buffer is not None:
                del self._copied[buffer.data_ptr()]
            buffer = self._buffers[name] = self._lane.pinned(max(nbytes, 1))
            self._copied[buffer.data_ptr()] = None
        return buffer[:nbytes]

    def copy_in(self, host: torch.Tensor) -> torch.Tensor:
        """A copy on the device, of a buffer or of another tensor of the host."""
        there, address = self._lane.copy_in(host), host.untyped_storage().data_ptr()
        if address in self._copied:
            self._copied[address] = self._lane.mark()
        return there

    def settle(self) -> None:
        """Returns when all that is queued on the lane is done: what was copied out of the device is there.
        Raises what went wrong on the device."""
        self._lane.mark().synchronize()
        self._copied = dict.fromkeys(self._copied)
