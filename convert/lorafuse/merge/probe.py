"""How fast tiles are made here: the loop makes a few of a plan, which are thrown away."""

import time
from collections.abc import Sequence
from contextlib import suppress
from threading import Lock

import torch

from lorafuse.errors import LorafuseError
from lorafuse.merge.destination import Outcome
from lorafuse.merge.loop import merge
from lorafuse.planning.plan import Plan, Step

SECONDS = 0.12  # of each of the two kinds of weights
MOST_WEIGHTS = 12  # that are looked at, spread over the model


class _EnoughError(Exception):
    """The probe has taken its time."""


class _Stopwatch:
    """A Destination that counts bytes and ends the loop after SECONDS."""

    def __init__(self, steps: Sequence[Step]) -> None:
        self.outcome = Outcome()
        self.error: Exception | None = None
        self._steps, self._began = steps, time.perf_counter()
        self._lock, self.nbytes, self.seconds = Lock(), 0, 0.0

    def steps(self) -> Sequence[Step]:
        return self._steps

    def is_open(self, step: Step) -> bool:
        return True

    def open(self, step: Step) -> None:
        """Nothing is opened."""

    def write(self, tensor: str, offset: int, data: memoryview) -> None:
        """Thrown away. The first piece counts, however long it took."""
        with self._lock:
            seconds = time.perf_counter() - self._began
            if self.nbytes and seconds > SECONDS:
                raise _EnoughError
            self.nbytes, self.seconds = self.nbytes + len(data), seconds

    def wrote(self, tensor: str, nbytes: int) -> None:
        """It is counted already."""

    def finish(self) -> None:
        """All of the few weights are made."""

    def fail(self, error: Exception) -> None:
        """What is wrong with a weight is for the merge to say."""
        raise _EnoughError

    def close(self) -> None:
        """Nothing is open."""


def tile_rates(plan: Plan, device: torch.device) -> dict[bool, float]:
    """Bytes of the result that are read, made and measured a second, of weights that an adapter has a say in
    (True) and of the others; a kind is missing of which there is no weight, or none that can be made."""
    rates = {}
    for changes in (True, False):
        steps = [step for step in plan.steps if step.changes == changes and step.nbytes]
        watch = _Stopwatch(steps[:: max(len(steps) // MOST_WEIGHTS, 1)])
        with suppress(_EnoughError, OSError, LorafuseError):
            merge([watch], plan.memory, device, allow_nonfinite=True)
        if watch.nbytes:
            rates[changes] = watch.nbytes / watch.seconds
    return rates
