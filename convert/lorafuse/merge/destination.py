"""What the loop makes tiles for, and what it leaves behind: files, measures, times."""

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Protocol

from lorafuse.arithmetic.measure import Measures
from lorafuse.planning.plan import Step


@dataclass
class Timing:
    """Seconds. `compute_cpu_s` is decode + update + cast over all workers, with the measures that are taken
    in the same pass; `stats_cpu_s` what the other measures cost; `read_s` and `write_s` are sums over
    threads, of reading, and of writing, hashing and syncing."""

    compute_cpu_s: float = 0.0
    stats_cpu_s: float = 0.0
    read_s: float = 0.0
    write_s: float = 0.0

    def add(self, other: "Timing") -> None:
        for name in self.__dataclass_fields__:
            setattr(self, name, getattr(self, name) + getattr(other, name))


@dataclass
class Written:
    """One finished output file."""

    file: str
    nbytes: int
    sha256: str


@dataclass
class Outcome:
    """What the loop did."""

    written: list[Written] = field(default_factory=list)
    measures: dict[str, Measures] = field(default_factory=dict)  # of merged weights
    timing: Timing = field(default_factory=Timing)


class Destination(Protocol):
    """What the loop makes tiles for. The calling thread calls everything but `write`, and all that is told
    or added up is so in an order that does not depend on threads."""

    outcome: Outcome
    error: Exception | None  # of this destination alone; nothing more is made for it then

    def steps(self) -> Iterable[Step]:
        """Those that are to be made."""

    def is_open(self, step: Step) -> bool:
        """Whether tiles of a step may come at once; else all tiles before are accounted for first, and `open`
        is called."""

    def open(self, step: Step) -> None:
        """The tiles of a step are going to come."""

    def write(self, tensor: str, offset: int, data: memoryview) -> None:
        """Bytes of a stored tensor, from its byte `offset` on. Any thread may call it, in any order; `data`
        is valid until it returns."""

    def wrote(self, tensor: str, nbytes: int) -> None:
        """So many bytes of a stored tensor are written, of one tile. Weights come in their natural order, and
        so do the tiles of each."""

    def finish(self) -> None:
        """All steps are made."""

    def fail(self, error: Exception) -> None:
        """Give this destination up."""

    def close(self) -> None:
        """Nothing more comes, at the end or after an error, and nobody writes any more."""
