"""What runs for one result have left in an object store, each below a name of its own, `.NAME.lorafuse/RUN/`.

`attempt` says what the run does, `done/FILE` that a file is complete, with its hash and its ETag, `moving`
that a commit has begun; `out/` has the files. Runs that make a part are below `part-IofN/`.
"""

import json
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import datetime

from lorafuse.files.cloud_store import CloudPlace, Meta
from lorafuse.outdir.cloud_lock import LOCK
from lorafuse.outdir.journal import Attempt, FinishedShard, Record, line_of, record_of

ATTEMPT, DONE, MOVING, OUT = "attempt", "done", "moving", "out"
PART = "part-"


@dataclass
class Run:
    """One run: its place, what it says, the ETags of its finished files, all of its objects, what its commit
    moves, and when that began."""

    place: CloudPlace
    record: Record
    e_tags: dict[str, str] = field(default_factory=dict)
    objects: list[Meta] = field(default_factory=list)
    moving: list[str] = field(default_factory=list)
    moved: datetime | None = None

    @property
    def out(self) -> CloudPlace:
        return self.place.below(OUT)

    @property
    def nbytes(self) -> int:
        return sum(meta.nbytes for meta in self.objects)

    def finished(self) -> Iterator[FinishedShard]:
        """The files that lie there as they were finished."""
        there = {meta.name: meta for meta in self.objects}
        for file, shard in self.record.finished.items():
            meta = there.get(f"{OUT}/{file}")
            same = meta and _bare(meta.e_tag) == _bare(self.e_tags.get(file, ""))
            if meta and same and meta.nbytes == shard.written.nbytes:
                yield shard

    def discard(self) -> None:
        """Remove it. What says that the rest counts goes first, what says that a commit has begun last."""
        order = (ATTEMPT, DONE, OUT, MOVING)
        names = [meta.name for meta in self.objects]
        rank = {name: order.index(name.partition("/")[0]) for name in names if _is_own(name)}
        self.place.delete(sorted(rank, key=lambda name: (rank[name], name)))


def _bare(e_tag: str) -> str:
    """An ETag without quotes, which Azure leaves out where it lists objects."""
    return e_tag.strip('"')


def _is_own(name: str) -> bool:
    return name.partition("/")[0] in (ATTEMPT, DONE, OUT, MOVING)


def runs_in(hidden: CloudPlace) -> list[Run]:
    """All runs, by their names, but those that make a part."""
    objects: dict[str, list[Meta]] = {}
    for meta in hidden.everything():
        run, slash, name = meta.name.partition("/")
        if slash and run != LOCK and not run.startswith(PART):
            objects.setdefault(run, []).append(meta._replace(name=name))
    return [_read(hidden.below(run), objects[run]) for run in sorted(objects)]


def read_run(place: CloudPlace) -> Run:
    """A run as it is now."""
    return _read(place, list(place.everything()))


def _read(place: CloudPlace, objects: list[Meta]) -> Run:
    names = {meta.name: meta for meta in objects}
    lines, e_tags = [], {}
    if ATTEMPT in names:
        lines += _lines(place, ATTEMPT)
    for name in [name for name in names if name.startswith(f"{DONE}/")]:
        line, *e_tag = _lines(place, name)
        with suppress(ValueError):
            e_tags[name.removeprefix(f"{DONE}/")] = str(json.loads(e_tag[0])) if e_tag else ""
            lines.append(line)
    run = Run(place, record_of(lines), e_tags, objects)
    if MOVING in names:
        run.moving, run.moved = json.loads(_lines(place, MOVING)[0] or b"[]"), names[MOVING].modified
    return run


def _lines(place: CloudPlace, name: str) -> list[bytes]:
    with suppress(FileNotFoundError):  # another run is at work
        return place.get(name)[0].splitlines(keepends=True) or [b""]
    return [b""]


def put_attempt(place: CloudPlace, attempt: Attempt) -> None:
    place.put(ATTEMPT, line_of(attempt))


def put_done(place: CloudPlace, shard: FinishedShard, e_tag: str) -> None:
    """A file is complete: its object is there."""
    place.put(f"{DONE}/{shard.written.file}", line_of(shard) + json.dumps(e_tag).encode())


def put_moving(place: CloudPlace, names: Iterable[str]) -> None:
    """A commit begins."""
    place.put(MOVING, json.dumps([*names]).encode())
