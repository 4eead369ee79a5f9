"""Torch's settings, which belong to the calling program: while lorafuse works they are torch's own, and
afterwards they are as they were.

Some are the thread's: default device, modes, autocast, the number of threads, the flushing of denormals. New
threads begin with torch's own. Others are the process's: default dtype, deterministic mode, the precision of
fp32 products. The first of several threads at work sets these, and the last one restores them.
"""

import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from threading import Event, RLock, Thread

import torch

from lorafuse.arithmetic.fp32_precision import exact_products, restore_products

_AUTOCAST_DEVICES = ("cpu", "cuda")


class _Process:
    """The settings of the process, and who is at work under ours."""

    def __init__(self) -> None:
        self.lock = RLock()
        self._inside: set[object] = set()
        self._before = ExitStack()

    def enter(self, who: object) -> None:
        with self.lock:
            is_first = not self._inside
            self._inside.add(who)
            if is_first:
                self._set()

    def leave(self, who: object) -> None:
        """Also for `who` was interrupted on the way in."""
        with self.lock:
            self._inside.discard(who)
            if not self._inside:
                self._before.pop_all().close()

    def _set(self) -> None:
        restore = self._before.callback
        restore(torch.set_default_dtype, torch.get_default_dtype())
        torch.set_default_dtype(torch.float32)
        if torch.are_deterministic_algorithms_enabled():  # the call imports torch's compiler: 70 MB
            warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
            restore(torch.use_deterministic_algorithms, True, warn_only=warn_only)
            torch.use_deterministic_algorithms(False)
        restore(restore_products, exact_products())


_PROCESS = _Process()


@contextmanager
def own_torch_state() -> Iterator[None]:
    """Torch's own settings and one thread per op, whatever the calling program chose; restored afterwards.
    May be nested, and entered by several threads at once; also a decorator."""
    who = object()
    try:
        _PROCESS.enter(who)
        with ExitStack() as before:
            _enter_thread(before)
            yield
    finally:
        _PROCESS.leave(who)


def _enter_thread(before: ExitStack) -> None:
    """Torch's own settings in the calling thread, until `before` is closed."""
    # A default device is a mode of functions.
    before.enter_context(torch._C.DisableTorchFunction())
    before.enter_context(torch._C._DisableTorchDispatch())
    for device in _AUTOCAST_DEVICES:
        before.callback(torch.set_autocast_enabled, device, torch.is_autocast_enabled(device))
        torch.set_autocast_enabled(device, False)
    before.callback(torch.set_flush_denormal, _flushes_denormals())
    torch.set_flush_denormal(False)
    before.callback(_set_n_threads, torch.get_num_threads())
    _set_n_threads(1)


def one_thread_here() -> None:
    """One thread per op in the calling thread, for the rest of its life."""
    _set_n_threads(1)


def _flushes_denormals() -> bool:
    """Asked of the processor without torch, whose first ops map 3 MB of its libraries."""
    return sys.float_info.min * 0.5 == 0


def _set_n_threads(n_threads: int) -> None:
    """The number of threads per op, in the calling thread alone."""
    with _PROCESS.lock:
        if torch.get_num_threads() != n_threads:
            with _kept_for_new_threads():
                torch.set_num_threads(n_threads)


@contextmanager
def _kept_for_new_threads() -> Iterator[None]:
    """`set_num_threads` is also for threads that ask for the first time, while a thread's own number stays: a
    new thread that asked before gives them back what it was told."""
    asked, is_set = Event(), Event()

    def keep() -> None:
        n_threads = torch.get_num_threads()
        asked.set()
        is_set.wait()
        torch.set_num_threads(n_threads)

    thread = Thread(target=keep)
    try:
        thread.start()
        asked.wait()
        yield
    finally:
        is_set.set()
        if thread.ident is not None:
            thread.join()
