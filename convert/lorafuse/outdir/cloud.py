"""Object stores as a kind of place for results: checked, opened, cleaned up after."""

from collections.abc import Iterable, Sequence
from contextlib import suppress

from lorafuse.errors import HeldError, OutDirError, shown
from lorafuse.events import OnEvent
from lorafuse.files.cloud_folder import CLIENT_NBYTES, CloudFolder
from lorafuse.files.cloud_store import CloudPlace
from lorafuse.files.folder import Folder
from lorafuse.outdir.cloud_lock import CloudLock
from lorafuse.outdir.cloud_out_dir import CloudOutDir, hidden_of, leftovers, refuse_filled
from lorafuse.outdir.cloud_parts import held_nbytes_of
from lorafuse.outdir.journal import Attempt

N_OPEN = 2  # files of one result


def check_out_dir(out_dir: str, inputs: Iterable[Folder], *, overwrite: bool) -> None:
    """Raises OutDirError unless a result may be written; see OutDirKind."""
    out = CloudPlace.at(out_dir)
    for address in (folder.address for folder in inputs):
        if f"{out}/".startswith(f"{address}/") or f"{address}/".startswith(f"{out}/"):
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


def held_nbytes(sizes: Sequence[int], ckpt: Folder) -> int:
    """See OutDirKind."""
    client = 0 if isinstance(ckpt, CloudFolder) or not sizes else CLIENT_NBYTES
    return N_OPEN * sum(map(held_nbytes_of, sizes)) + client


def clean_up(out_dir: str) -> None:
    """Remove what a run left that was killed when its result had its name already."""
    out = CloudPlace.at(out_dir)
    hidden = hidden_of(out)
    if hidden.is_there():
        lock = CloudLock(hidden, str(out), "clean")
        with suppress(HeldError):
            lock.acquire()
            try:
                leftovers(out, hidden)
            finally:
                lock.release()


def left_nbytes(out_dirs: Iterable[str]) -> int:
    """What runs for these that were cut off left, and the next ones use or remove."""
    places = [hidden_of(CloudPlace.at(out_dir)) for out_dir in out_dirs]
    return sum(meta.nbytes for place in places for meta in place.everything())


def space_of(out_root: str) -> None:
    """Nobody can tell."""
