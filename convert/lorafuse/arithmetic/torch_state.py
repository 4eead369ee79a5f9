"""What a merge needs of torch's settings, which belong to the calling program."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def one_thread() -> Iterator[None]:
    """One thread per op, and no reduced-precision matrix products, whatever the calling program chose;
    restored afterwards."""
    n_threads, precision = torch.get_num_threads(), torch.get_float32_matmul_precision()
    torch.set_num_threads(1)
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_num_threads(n_threads)
        torch.set_float32_matmul_precision(precision)


def one_thread_here() -> None:
    """One thread per op in the calling thread: OpenMP's number is each thread's own."""
    torch.set_num_threads(1)
