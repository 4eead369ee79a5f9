"""Where an interruption waits: while a file is handed to the thread that finishes it, and while OUT_DIR gets
its name.

Everywhere else the exception of a signal may come at any moment, since what is not in the journal does not
count. It comes in the main thread, and files are finished by others.
"""


class Hold:
    """A context, which may be nested, out of which `interrupt` raises."""

    def __init__(self) -> None:
        self._depth = 0
        self._waiting: BaseException | None = None

    def interrupt(self, error: BaseException) -> None:
        """Raise `error`: now, or when what must not be interrupted is done. For signal handlers."""
        if self._depth == 0:
            raise error
        self._waiting = error

    def forget(self) -> None:
        """What an interruption would have stopped is done."""
        self._waiting = None

    def __enter__(self) -> None:
        self._depth += 1

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        self._depth -= 1
        if self._depth == 0 and self._waiting is not None:
            waiting, self._waiting = self._waiting, None
            raise waiting


UNINTERRUPTED = Hold()
