"""Where a result in an object store is made, and how it gets its name: its files are copied to their place,
config.json and then the receipt last.

It is made below `.NAME.lorafuse/`, beside its place; parts of it, by several workers, each below
`.NAME.lorafuse/part-IofN/`, with a lock and runs of its own. The functions raise what the store raises.
"""

import re
from contextlib import suppress

from lorafuse.errors import OutDirError, shown
from lorafuse.files.cloud_store import CloudPlace, Meta
from lorafuse.files.names import RECEIPT
from lorafuse.outdir.cloud_lock import LOCK, clocks_in
from lorafuse.outdir.cloud_runs import MOVING, PART, Run, runs_in
from lorafuse.outdir.commit import LAST
from lorafuse.outdir.out_dir import Part

_PART = re.compile(PART + r"([0-9]+of[0-9]+)")


def hidden_of(out: CloudPlace, part: Part | None = None) -> CloudPlace:
    """Where a result is made, or a `part` of it: beside its place, or in it where that is a whole bucket."""
    home, _, name = out.prefix.rstrip("/").rpartition("/")
    above = CloudPlace(out.store, out.root, f"{home}/" if home else "")
    whole = above.below(f".{name}.lorafuse" if name else ".lorafuse")
    return whole.below(f"{PART}{part}") if part else whole


def parts_of(out: CloudPlace) -> list[Part]:
    """The parts of a result that workers have begun."""
    names = hidden_of(out).list_here()[1]
    return sorted(Part.named(match[1]) for name in names if (match := _PART.fullmatch(name)))


def files_at(out: CloudPlace) -> list[Meta]:
    """What lies where a result is to be."""
    hidden = hidden_of(out).prefix.removeprefix(out.prefix)
    return [meta for meta in out.everything() if not meta.name.startswith(hidden)]


def refuse_filled(out: CloudPlace, overwrite: bool) -> None:
    """Raises OutDirError."""
    if not overwrite and files_at(out):
        raise OutDirError(
            f"{shown(out)}: exists and is not empty; --overwrite replaces it once the new one is complete."
        )


def leftovers(out: CloudPlace) -> list[Run]:
    """What runs that were cut off left, those that made parts too, without what is only to be cleaned up."""
    parts = [run for part in parts_of(out) for run in leftovers_of_part(out, part)]
    left = leftovers_of_part(out, None)
    committed = next((run for run in left if is_complete(out, run)), None)
    if committed:
        for run in (*parts, *(run for run in left if run is not committed), committed):
            run.discard()
        remove_locks_of_parts(out)
        return []
    for run in left:
        take_back(out, run)
    return [*left, *parts]


def leftovers_of_part(out: CloudPlace, part: Part | None) -> list[Run]:
    """What runs for one part left, or those of the whole."""
    place = hidden_of(out, part)
    place.delete(clocks_in(place))
    return runs_in(place)


def remove_locks_of_parts(out: CloudPlace) -> None:
    """Those of workers that are no more, for the run that holds the lock of the whole."""
    for part in parts_of(out):
        hidden_of(out, part).delete([LOCK])


def commit_is_cut_off(out: CloudPlace) -> bool:
    """Whether a run began to give the result its name, and the next one has to."""
    return any(run.moved and not is_complete(out, run) for run in runs_in(hidden_of(out)))


def is_complete(out: CloudPlace, run: Run) -> bool:
    """Whether a commit got as far as its last file, and only has to be cleaned up after."""
    if run.moved is None:
        return False
    with suppress(FileNotFoundError):
        return out.head(RECEIPT).modified >= run.moved
    return False


def take_back(out: CloudPlace, run: Run) -> None:
    """Undo what a commit that was cut off began: its files lie where they were made too. What was there
    before is older than the commit, by the store's clock."""
    if run.moved:
        names = {*run.moving}
        copied = [meta.name for meta in files_at(out) if meta.name in names and meta.modified >= run.moved]
        out.delete(sorted(copied, key=lambda name: name not in LAST))
        run.place.delete([MOVING])
