"""A device that is the CPU, and late: what it is to copy to the host is there when somebody waits, and what
it copies from the host must stay as it was until somebody has waited. So a run shows that it never uses a
buffer of the host too early.

It has torch look at every operation of the workers: none may wait for the device, and what is held at once is
counted.
"""

import threading
import weakref
from contextlib import contextmanager
from dataclasses import dataclass, field

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lorafuse.arithmetic import lanes
from lorafuse.arithmetic.devices import Choice

DEVICE = torch.device("cpu", 0)
# Operations that give the host a number, or whose result has a size that the host must know.
WAITING = {
    "_local_scalar_dense", "nonzero", "masked_select", "is_nonzero", "item", "_unique2", "equal",
}  # fmt: skip
NOT_YET = 0xAB
COUNTS = ("changed", "clipped")


class TooEarlyError(AssertionError):
    """Somebody did not wait."""


@dataclass
class Copy:
    """A copy that the device has not done: `kept` is what it copies. `inward`: to the device."""

    host: torch.Tensor
    kept: torch.Tensor
    inward: bool


class Chosen(Choice):
    device = DEVICE


@dataclass
class LateDevice:
    """What happened on the lanes of a run. `fails_at`: the number of the wait that reports an error of the
    device; `meeting`: lanes of workers wait there for each other, once."""

    n_waits: int = 0
    n_copies: int = 0
    fails_at: int | None = None
    waiting: list[str] = field(default_factory=list)  # operations that would wait
    in_flight: set[int] = field(default_factory=set)  # lanes with something queued
    most_in_flight: int = 0
    nbytes: int = 0
    most_nbytes: int = 0
    pinned_nbytes: int = 0
    meeting: threading.Barrier | None = None
    lock: threading.RLock = field(default_factory=threading.RLock)

    def lane_of(self, device: torch.device) -> "LateLane | None":
        return LateLane(self) if device == DEVICE else None

    def installed(self, monkeypatch) -> None:
        """Runs compute here from now on, as they would on CUDA."""
        monkeypatch.setattr(lanes, "lane_of", self.lane_of)
        for module in ("pipeline", "batching.batch", "verification.verify"):
            monkeypatch.setattr(f"lorafuse.{module}.choose_device", lambda name, work: Chosen("cuda"))


class LateLane:
    def __init__(self, device: LateDevice) -> None:
        self._device, self._late = device, list[Copy]()
        self._watch: Watch | None = None
        self._met = False

    def bind(self) -> None:
        self._watch = Watch(self._device)
        self._watch.__enter__()

    @property
    def bound(self) -> bool:
        return self._watch is not None

    def pinned(self, nbytes: int) -> torch.Tensor:
        with unwatched():
            self._device.pinned_nbytes += nbytes
            return torch.full((nbytes,), NOT_YET, dtype=torch.uint8, device="cpu")

    def copy_in(self, host: torch.Tensor) -> torch.Tensor:
        with unwatched():
            self._queue(Copy(host, host.clone(), inward=True))
        return host.clone()

    def copy_out(self, values: torch.Tensor, host: torch.Tensor) -> None:
        with unwatched():
            self._queue(Copy(host, values.clone(), inward=False))
            host.view(torch.uint8).fill_(NOT_YET)

    def _queue(self, copy: Copy) -> None:
        device = self._device
        self._late.append(copy)
        with device.lock:
            device.n_copies += 1
            if self.bound:
                device.in_flight.add(id(self))
            device.most_in_flight = max(device.most_in_flight, len(device.in_flight))

    def mark(self) -> "LateMark":
        return LateMark(self, len(self._late))

    def catch_up(self, n: int) -> None:
        device = self._device
        with device.lock:
            device.n_waits += 1
            if device.n_waits == device.fails_at:
                raise RuntimeError("the device is lost")
        if device.meeting and self.bound and self._late and not self._met:
            self._met = True
            device.meeting.wait(20)
        with unwatched():
            for copy in self._late[:n]:
                if not copy.inward:
                    copy.host.copy_(copy.kept)
                elif not torch.equal(as_bytes(copy.host), as_bytes(copy.kept)):
                    raise TooEarlyError("a buffer of the host was filled anew before it was copied")
        # Marks count from the beginning: what is done leaves a place behind.
        self._late[:n] = [DONE] * n
        with device.lock:
            device.in_flight.discard(id(self))


NOTHING = torch.empty(0, dtype=torch.uint8, device="cpu")
DONE = Copy(NOTHING, NOTHING, inward=False)


@dataclass
class LateMark:
    lane: LateLane
    n: int

    def synchronize(self) -> None:
        self.lane.catch_up(self.n)


def as_bytes(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().view(-1).view(torch.uint8)


@contextmanager
def unwatched():
    with torch.inference_mode(), torch._C._DisableTorchDispatch():
        yield


class Watch(TorchDispatchMode):
    """Notes the operations of a thread, and how much they hold."""

    def __init__(self, device: LateDevice) -> None:
        super().__init__()
        self._device, self._seen = device, weakref.WeakSet()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        device = self._device
        if func.overloadpacket.__name__ in WAITING:
            device.waiting.append(str(func))
        made = func(*args, **(kwargs or {}))
        before = {storage_of(leaf) for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)}
        for leaf in tree_leaves(made):
            if isinstance(leaf, torch.Tensor) and storage_of(leaf) not in before:
                self._held(leaf)
        return made

    def _held(self, tensor: torch.Tensor) -> None:
        """Counts the memory of a tensor until no tensor is left that has it: the least that the device would
        hold."""
        storage, device = tensor.untyped_storage(), self._device
        nbytes = storage.nbytes()
        with device.lock:
            device.nbytes += nbytes
            device.most_nbytes = max(device.most_nbytes, device.nbytes)
        weakref.finalize(storage, self._freed, nbytes)

    def _freed(self, nbytes: int) -> None:
        with self._device.lock:
            self._device.nbytes -= nbytes


def storage_of(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def same_figures(there, here):
    """Numbers of elements are the same; norms and their ratios to a millionth of what they are made from."""
    for name, entry in here["tensors"].items():
        found = there["tensors"][name]
        assert found.keys() == entry.keys()
        for key, value in entry.items():
            if isinstance(value, float) and key not in COUNTS:
                assert found[key] == pytest.approx(value, rel=1e-6, abs=1e-6), (name, key)
            else:
                assert found[key] == value, (name, key)
