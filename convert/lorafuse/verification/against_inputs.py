"""A merged directory against the merge of its inputs, made again and compared byte by byte instead of
written."""

import hashlib
from collections.abc import Iterable, Sequence
from threading import local
from typing import Any

import numpy as np
import torch

from lorafuse.errors import ResultError, listed, shown
from lorafuse.events import OnEvent
from lorafuse.files.checkpoint import Checkpoint
from lorafuse.merge.destination import Destination, Outcome
from lorafuse.merge.loop import merge
from lorafuse.planning.plan import Plan, Step


class Comparison:
    """A destination that compares what it gets with what a directory holds. The first difference is a
    ResultError."""

    def __init__(self, merged: Checkpoint, steps: Sequence[Step], on_event: OnEvent) -> None:
        self.outcome = Outcome()
        self.error: Exception | None = None
        self._merged, self._steps, self._on_event = merged, steps, on_event
        self._local = local()

    def steps(self) -> Iterable[Step]:
        return self._steps

    def is_open(self, step: Step) -> bool:
        return True

    def open(self, step: Step) -> None:
        """Nothing is to be opened."""

    def write(self, tensor: str, offset: int, data: memoryview) -> None:
        buffer = getattr(self._local, "buffer", b"")
        if len(buffer) < len(data):
            buffer = self._local.buffer = bytearray(len(data))
        stored = memoryview(buffer)[: len(data)]
        self._merged.read_into(tensor, offset, stored)
        if stored != data:
            raise ResultError(self._difference(tensor, offset, stored, data))

    def wrote(self, tensor: str, nbytes: int) -> None:
        self._on_event({"event": "progress", "nbytes": nbytes})

    def _difference(self, name: str, at: int, stored: memoryview, made: memoryview) -> str:
        spec = self._merged.tensors[name].spec
        dtype = getattr(torch, spec.torch_name)
        ours, theirs = (torch.frombuffer(bytearray(part), dtype=dtype) for part in (made, stored))
        differing = np.flatnonzero(_differs(made, stored, ours.element_size()))
        first = int(differing[0])
        index = (
            [int(i) for i in np.unravel_index(at // ours.element_size() + first, spec.shape)]
            if spec.shape
            else []
        )
        return (
            f"{shown(self._merged.folder)}: {shown(name)} differs from the merge of the inputs: element "
            f"{index} is {theirs[first].item()!r}, expected {ours[first].item()!r}; so are "
            f"{len(differing)} of {len(ours)} around it."
        )

    def finish(self) -> None:
        """Nothing is left to do."""

    def fail(self, error: Exception) -> None:
        self.error = self.error or error

    def close(self) -> None:
        """Nothing is open."""


def _differs(a: memoryview, b: memoryview, itemsize: int) -> Any:
    """bool [n]: which elements differ in a bit."""
    rows = (np.frombuffer(part, np.uint8).reshape(-1, itemsize) for part in (a, b))
    return np.any(next(rows) != next(rows), axis=1)


def check_merge(
    merged: Checkpoint, plan: Plan, n_sample: int, device: torch.device, on_event: OnEvent
) -> tuple[int, Outcome]:
    """Carry the plan out again and compare with `merged`: all weights, or `n_sample` of them, the same
    for the same plan. Returns how many, and what was measured. Raises ResultError at the first difference."""
    steps = list(plan.steps)
    if n_sample:
        by_hash = sorted(
            steps, key=lambda step: hashlib.sha256(f"{plan.plan_id} {step.name}".encode()).digest()
        )
        chosen = {step.name for step in by_hash[:n_sample]}
        steps = [step for step in steps if step.name in chosen]
    made = [tensor for step in steps for tensor in step.encoder.tensors]
    missing = [
        tensor.name
        for tensor in made
        if tensor.name not in merged.tensors or merged.tensors[tensor.name].spec != tensor.spec
    ]
    if missing:
        raise ResultError(
            f"{shown(merged.folder)}: {listed(missing)} should be there, with other shapes or dtypes than "
            "they have."
        )
    on_event({"event": "plan", "nbytes": sum(tensor.nbytes for tensor in made), "shards": []})
    comparison: Destination = Comparison(merged, steps, on_event)
    merge([comparison], plan.memory, device, allow_nonfinite=True)
    if comparison.error:
        raise comparison.error
    return len(steps), comparison.outcome
