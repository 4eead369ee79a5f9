"""Object stores as a kind of place for results: checked, opened, cleaned up after."""

from collections.abc import Collection, Iterable, Sequence
from contextlib import suppress

from lorafuse.errors import HeldError, OutDirError, shown
from lorafuse.events import OnEvent
from lorafuse.files.cloud_folder import CLIENT_NBYTES, CloudFolder
from lorafuse.files.cloud_store import CloudPlace
from lorafuse.files.folder import Folder
from lorafuse.outdir.cloud_commit import hidden_of, leftovers, refuse_filled
from lorafuse.outdir.cloud_left import left_at
from lorafuse.outdir.cloud_out_dir import CloudOutDir, run_lock
from lorafuse.outdir.cloud_parts import held_nbytes_of
from lorafuse.outdir.cloud_runs import runs_in
from lorafuse.outdir.journal import Attempt
from lorafuse.outdir.out_dir import Left, Part

N_OPEN = 2  # files of one result


def check_out_dir(out_dir: str, inputs: Iterable[Folder], *, overwrite: bool) -> None:
    """Raises OutDirError unless a result may be written; see OutDirKind."""
    out = CloudPlace.at(out_dir)
    for address in (folder.address for folder in inputs):
        if f"{out.address}/".startswith(f"{address}/") or f"{address}/".startswith(f"{out.address}/"):
            raise OutDirError(
                f"{shown(out)}: is, contains or lies inside the input {shown(address)}; choose another place."
            )
    if not hidden_of(out).is_there():  # else it is seen later what a run that was cut off got done
        refuse_filled(out, overwrite)


def open_out_dir(
    out_dir: str,
    plan_id: str,
    attempt: Attempt | None = None,
    *,
    overwrite: bool = False,
    restart: bool = False,
    on_event: OnEvent = lambda event: None,
) -> CloudOutDir:
    """See OutDirKind."""
    return CloudOutDir(
        CloudPlace.at(out_dir), attempt, overwrite=overwrite, restart=restart, on_event=on_event
    )


def open_part(
    out_dir: str,
    plan_id: str,
    attempt: Attempt,
    part: Part,
    *,
    overwrite: bool = False,
    restart: bool = False,
    on_event: OnEvent = lambda event: None,
) -> CloudOutDir:
    """Where a worker makes the files of a part. See SharedKind."""
    return CloudOutDir(
        CloudPlace.at(out_dir), attempt, part=part, overwrite=overwrite, restart=restart, on_event=on_event
    )


def open_whole(
    out_dir: str,
    plan_id: str,
    attempt: Attempt,
    files: Collection[str],
    *,
    overwrite: bool = False,
    on_event: OnEvent = lambda event: None,
) -> CloudOutDir:
    """A result whose `files` workers have made. See SharedKind."""
    return CloudOutDir(CloudPlace.at(out_dir), attempt, overwrite=overwrite, on_event=on_event, wanted=files)


def has_parts(out_dir: str) -> bool:
    """A store is the same for all who see it."""
    return True


def files_of_whole(out_dir: str, attempt: Attempt) -> set[str]:
    """The files that an equal run of the whole has made. It takes none from the parts: what a worker has made
    stays in its place until the result has its name."""
    runs = runs_in(hidden_of(CloudPlace.at(out_dir)))
    own = [run for run in runs if run.record.attempt == attempt]
    return {shard.written.file for run in own for shard in run.finished()}


def held_nbytes(sizes: Sequence[int], ckpt: Folder) -> int:
    """See OutDirKind."""
    client = 0 if isinstance(ckpt, CloudFolder) or not sizes else CLIENT_NBYTES
    return N_OPEN * sum(map(held_nbytes_of, sizes)) + client


def clean_up(out_dir: str) -> None:
    """Remove what a run left that was killed when its result had its name already."""
    out = CloudPlace.at(out_dir)
    if hidden_of(out).is_there():
        lock = run_lock(out, "clean")
        with suppress(HeldError):
            lock.acquire()
            try:
                leftovers(out)
            finally:
                lock.release()


def left_nbytes(out_dirs: Iterable[str]) -> int:
    """What runs for these that were cut off left, and the next ones use or remove."""
    places = [hidden_of(CloudPlace.at(out_dir)) for out_dir in out_dirs]
    return sum(meta.nbytes for place in places for meta in place.everything())


def left(out_dir: str) -> list[Left]:
    """The same, piece by piece."""
    return list(left_at(CloudPlace.at(out_dir)))


def space_of(out_root: str) -> None:
    """Nobody can tell."""
