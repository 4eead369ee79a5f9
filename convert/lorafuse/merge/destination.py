"""What the loop makes tiles for, and what it leaves behind: files, measures, times."""

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Protocol

from lorafuse.arithmetic.measure import Measures
from lorafuse.planning.plan import Step


@dataclass
class Timing:
    """Seconds. `compute_cpu_s` is decode + update + cast over all workers, `stats_cpu_s` what the measures
    cost beside it."""

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
    """What the loop makes tiles for."""

    outcome: Outcome
    error: Exception | None  # of this destination alone; nothing more is made for it then

    def steps(self) -> Iterable[Step]:
        """Those that are to be made."""

    def write(self, tensor: str, offset: int, data: memoryview) -> None:
        """Bytes of a stored tensor, from its byte `offset` on. Weights come in their natural order."""

    def finish(self) -> None:
        """All steps are made."""

    def fail(self, error: Exception) -> None:
        """Give this destination up."""

    def close(self) -> None:
        """Nothing more comes, at the end or after an error."""
