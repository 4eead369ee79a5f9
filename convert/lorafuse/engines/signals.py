"""Signals while code of others runs that cannot be left by an exception at any moment."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager

ENDING = (signal.SIGINT, signal.SIGTERM)


@contextmanager
def signals_wait() -> Iterator[None]:
    """The handlers that this process has for SIGINT and SIGTERM are called at the end, whatever the code
    inside makes of such a signal; a second signal calls its handler at once. Signals without a handler of
    Python do what they do. Only the main thread can ask for this; elsewhere nothing is changed."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    handlers = {number: signal.getsignal(number) for number in ENDING}
    came: list[int] = []

    def note(number: int, frame: object) -> None:
        came.append(number)
        handler = handlers[signal.Signals(number)]
        if len(came) > 1 and callable(handler):
            handler(number, None)

    for number in ENDING:
        if callable(handlers[number]):
            signal.signal(number, note)
    try:
        yield
    finally:
        for number, handler in handlers.items():
            if handler is not None:  # else it was not installed by Python, and nothing here replaced it
                signal.signal(number, handler)
        first = handlers[signal.Signals(came[0])] if came else None
        if came and callable(first):
            first(came[0], None)
