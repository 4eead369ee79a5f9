"""Whether a run goes on from what another one has left, and whether it leaves something to go on from."""

from collections.abc import Callable

from lorafuse.errors import OutDirError, StorageError, listed, shown
from lorafuse.outdir.journal import Attempt, Record


def goes_on(
    out_dir: str, record: Record, attempt: Attempt | None, *, restart: bool, warn: Callable[[str], None]
) -> bool:
    """Whether this attempt goes on from that record; if not, what is left may be removed. Raises OutDirError
    when the other run had other settings, which somebody may want back."""
    was, now = record.attempt, attempt
    if was is None or now is None or restart or not record.finished:
        return False
    if was == now:
        return True
    changed = [name for name in was.inputs if name in now.inputs and was.inputs[name] != now.inputs[name]]
    names = [name for name in now.command | was.command if was.command.get(name) != now.command.get(name)]
    if names and not changed:
        differences = "; ".join(
            f"{name} was {shown(was.command.get(name))}, is {shown(now.command.get(name))}" for name in names
        )
        raise OutDirError(
            f"{shown(out_dir)}: a run that was cut off has finished {len(record.finished)} files with other "
            f"settings: {differences}. Give its command again to finish it, or --restart to discard that "
            "work."
        )
    why = f"{listed(changed)} changed" if changed else "another version of lorafuse or torch began it"
    warn(f"{shown(out_dir)}: a run that was cut off is not resumed, since {why}; starting over.")
    return False


def leaves_work(error: BaseException | None) -> bool:
    """Whether what is finished is kept when a run ends with this error: after an I/O error or an interruption
    the same command goes on, after any other error it would end the same way."""
    return isinstance(error, OSError | StorageError) or not (error is None or isinstance(error, Exception))
