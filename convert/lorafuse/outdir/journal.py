"""What a run that was cut off has finished, and of what: a file of JSON lines that is synced after each.

The first line is the attempt, each further one a finished shard with its hash and the measures of its
weights, which the receipt needs. A line counts when it is whole; a shard without one does not exist.
"""

import json
import os
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from threading import Lock
from typing import Any

from lorafuse.arithmetic.measure import Measures
from lorafuse.merge.destination import Written

JOURNAL = "journal.jsonl"


@dataclass(frozen=True)
class Attempt:
    """What a run does, and with what. Two runs that are equal in all of it write the same bytes.

    `command`: what the user chose, by the names that messages use. `inputs`: what tells their contents apart,
    by path. `made_by`: versions. All hold what JSON can.
    """

    plan_id: str
    command: dict[str, Any]
    inputs: dict[str, Any]
    made_by: dict[str, Any]


@dataclass(frozen=True)
class FinishedShard:
    """A shard that is complete, and the measures of its merged weights. `elsewhere`: it is where it was
    wanted, and not here any more."""

    written: Written
    measures: dict[str, Measures]
    elsewhere: bool = False


@dataclass
class Record:
    """What a journal says; `attempt` is None when not even its first line is whole."""

    attempt: Attempt | None = None
    finished: dict[str, FinishedShard] = field(default_factory=dict)
    moving: list[str] = field(
        default_factory=list
    )  # names that are on their way into OUT_DIR, where that is a mount point


def line_of(fact: Attempt | FinishedShard | list[str]) -> bytes:
    """A journal's line: what a run does, a shard that is complete, or the names that are about to be moved
    into OUT_DIR."""
    if isinstance(fact, list):
        line: dict[str, Any] = {"moving": fact}
    else:
        line = {"attempt" if isinstance(fact, Attempt) else "finished": asdict(fact)}
    return json.dumps(line).encode("ascii") + b"\n"


class Journal:
    """A journal that is written, in the directory `folder`, which gets it whole: with everything that is
    finished already."""

    def __init__(self, folder: Path, attempt: Attempt, finished: Mapping[str, FinishedShard]) -> None:
        self._lock = Lock()  # files are finished by threads beside the one that gives them away
        new = folder / f"{JOURNAL}.new"
        self._fd = os.open(new, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o666)
        try:
            self._append(attempt)
            for shard in finished.values():
                self.finished(shard)
            os.rename(new, folder / JOURNAL)
            fsync_dir(folder)
        except BaseException:
            self.close()
            raise

    def finished(self, shard: FinishedShard) -> None:
        """A shard is complete, and so is its entry in the directory."""
        self._append(shard)

    def moving(self, names: list[str]) -> None:
        """These are about to be moved into OUT_DIR."""
        self._append(names)

    def _append(self, fact: Attempt | FinishedShard | list[str]) -> None:
        data = memoryview(line_of(fact))
        with self._lock:
            while data:
                data = data[os.write(self._fd, data) :]
            os.fsync(self._fd)

    def close(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


def read_journal(folder: Path) -> Record:
    """What the journal in a directory says; nothing where there is none."""
    with suppress(FileNotFoundError), open(folder / JOURNAL, "rb") as f:
        return record_of(f)
    return Record()


def record_of(lines: Iterable[bytes]) -> Record:
    """What the lines of a journal say, up to the first line that is not whole."""
    record = Record()
    with suppress(ValueError, TypeError, KeyError, RecursionError):
        for line in lines:
            _read_line(json.loads(line) if line.endswith(b"\n") else None, record)
    return record


def _read_line(line: Any, record: Record) -> None:
    if "attempt" in line:
        record.attempt = Attempt(**line["attempt"])
    elif "finished" in line:
        written = Written(**line["finished"]["written"])
        if os.path.basename(written.file) != written.file:
            raise ValueError(written.file)
        measures = {name: Measures(**sums) for name, sums in line["finished"]["measures"].items()}
        elsewhere = bool(line["finished"].get("elsewhere", False))
        record.finished[written.file] = FinishedShard(written, measures, elsewhere)
    else:
        record.moving = [os.path.basename(name) for name in line["moving"]]


def fsync_dir(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
