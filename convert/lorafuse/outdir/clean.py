"""Removing what runs that were cut off left for the next."""

from lorafuse.events import OnEvent, ignore
from lorafuse.outdir.kinds import kind_of
from lorafuse.outdir.out_dir import Left


def left(out_dir: str) -> list[Left]:
    """What lies there for the next run of the same command. Raises UsageError, StorageError."""
    return kind_of(out_dir).left(out_dir)


def clean(out_dir: str, on_event: OnEvent = ignore) -> None:
    """Remove it: what a run does that goes on from nothing, and makes nothing. A result that is there stays.
    Raises HeldError while a run is at work, OutDirError, StorageError."""
    with kind_of(out_dir).open_out_dir(out_dir, "", overwrite=True, restart=True, on_event=on_event):
        pass
