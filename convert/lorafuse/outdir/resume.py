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
    if _other_settings(was, now) and not _changed(was, now):
        raise OutDirError(
            f"{shown(out_dir)}: a run that was cut off has finished {len(record.finished)} files with other "
            f"settings: {difference(was, now)}. Give its command again to finish it, or --restart to discard "
            "that work."
        )
    warn(
        f"{shown(out_dir)}: a run that was cut off is not resumed, since {difference(was, now)}; starting "
        "over."
    )
    return False


def difference(was: Attempt, now: Attempt) -> str:
    """Why one attempt does not go on from the other, in words."""
    if changed := _changed(was, now):
        return f"{listed(changed)} changed"
    words = (
        f"{name} was {shown(was.command.get(name))}, is {shown(now.command.get(name))}"
        for name in _other_settings(was, now)
    )
    return "; ".join(words) or "another version of lorafuse or torch began it"


def _changed(was: Attempt, now: Attempt) -> list[str]:
    """The inputs of both whose contents differ."""
    return [name for name in was.inputs if name in now.inputs and was.inputs[name] != now.inputs[name]]


def _other_settings(was: Attempt, now: Attempt) -> list[str]:
    return [name for name in now.command | was.command if was.command.get(name) != now.command.get(name)]


def leaves_work(error: BaseException | None) -> bool:
    """Whether what is finished is kept when a run ends with this error: after an I/O error or an interruption
    the same command goes on, after any other error it would end the same way."""
    return isinstance(error, OSError | StorageError) or not (error is None or isinstance(error, Exception))
