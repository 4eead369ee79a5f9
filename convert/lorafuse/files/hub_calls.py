"""Calls of the hub's library: over HTTP, without bars of its own, under lorafuse's name, tried again where
that may help, and with errors that say what happened."""

import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from inspect import signature
from threading import Lock
from typing import Any, TypeVar

from lorafuse._version import __version__
from lorafuse.errors import LorafuseError, StorageError, shown

T = TypeVar("T")
AGENT: dict[str, Any] = {"library_name": "lorafuse", "library_version": __version__}
OFFLINE = ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE")
WAITS_S = (1, 2, 4, 8)  # before a call is made again
PASSING = (408, 429, 500, 502, 503, 504)  # answers that may be others a little later
# What the library reads of its settings with each call. The buffers of xet take gigabytes.
FRUGAL: dict[str, Any] = {"HF_HUB_DISABLE_XET": True, "DOWNLOAD_CHUNK_SIZE": 1 << 20}
LOG_IN = "log in with `hf auth login`"


class Stopped(Exception):  # noqa: N818 (nothing is wrong)
    """What is fetched is not wanted any more."""


@contextmanager
def asking(
    repo: str, revision: str | None, kind: type[LorafuseError], file: str | None = None
) -> Iterator[None]:
    """Turns what the hub's library raises into errors of `kind`, or StorageError, that name the repository,
    or a `file` of one that is known. What the library prints itself is silenced: whoever listens gets events.
    """
    with _QUIET:
        try:
            yield
        except (LorafuseError, Stopped):
            raise
        except Exception as e:
            # Everything, since the HTTP library behind the hub changes, and only some have errors that are
            # OSErrors.
            raise _explained(e, repo, revision, kind, file) from None


class _Quiet:
    """The hub's library without bars and warnings, over HTTP and in small pieces, while any thread is in this
    context."""

    def __init__(self) -> None:
        self._lock, self._n_inside = Lock(), 0
        self._had_bars, self._verbosity = True, 0
        self._constants: dict[str, Any] = {}

    def __enter__(self) -> None:
        # Imported here: it costs as much as the rest of the start-up, and most runs have local inputs.
        from huggingface_hub import constants, utils

        with self._lock:
            self._n_inside += 1
            if self._n_inside == 1:
                self._had_bars = not utils.are_progress_bars_disabled()
                self._verbosity = utils.logging.get_verbosity()
                utils.disable_progress_bars()
                utils.logging.set_verbosity(utils.logging.CRITICAL)
                known = vars(constants)
                self._constants = {name: known[name] for name in FRUGAL if name in known}
                _set_constants({name: FRUGAL[name] for name in self._constants})

    def __exit__(self, *_: object) -> None:
        from huggingface_hub import utils

        with self._lock:
            self._n_inside -= 1
            if self._n_inside == 0:
                _set_constants(self._constants)
                utils.logging.set_verbosity(self._verbosity)
                if self._had_bars:
                    utils.enable_progress_bars()


def _set_constants(values: dict[str, Any]) -> None:
    """Those of the hub's library, unless xet is wanted by name."""
    from huggingface_hub import constants

    for name, value in values.items():
        if name != "HF_HUB_DISABLE_XET" or "HF_XET_HIGH_PERFORMANCE" not in os.environ:
            setattr(constants, name, value)


_QUIET = _Quiet()


def retried(call: Callable[[], T]) -> T:
    """What `call` returns, which is made again after an error that may pass."""
    for wait_s in WAITS_S:
        try:
            return call()
        except Exception as e:
            if not _may_pass(e):
                raise
        time.sleep(wait_s)
    return call()


def watched(on_nbytes: Callable[[int], None]) -> dict[str, Any]:
    """The options of `hf_hub_download` that let a function hear of each piece, where the library has them."""
    from huggingface_hub import hf_hub_download

    class Bar:
        """What the library takes for a progress bar."""

        def __init__(self, *_: object, **__: object) -> None:
            self.n = self.total = 0

        def __enter__(self) -> "Bar":
            return self

        def __exit__(self, *_: object) -> None: ...

        def update(self, n: float | None = 1) -> None:
            on_nbytes(int(n or 0))

        def __getattr__(self, _: str) -> Callable[..., None]:
            return lambda *_, **__: None

    return {"tqdm_class": Bar} if "tqdm_class" in signature(hf_hub_download).parameters else {}


def _may_pass(error: Exception) -> bool:
    from huggingface_hub.errors import OfflineModeIsEnabled

    chain = list(_chain(error))
    if any(isinstance(e, OfflineModeIsEnabled) for e in chain):
        return False
    return any(_status(e) in PASSING or _is_of_transport(e) for e in chain)


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    """An error and what led to it."""
    n = 0
    while error is not None and n < 10:
        yield error
        error, n = error.__cause__ or error.__context__, n + 1


def _status(error: BaseException) -> int | None:
    status = getattr(getattr(error, "response", None), "status_code", None)
    return status if isinstance(status, int) else None


def _is_of_transport(error: BaseException) -> bool:
    """By the names of the classes: the library's HTTP library is another in each of its versions."""
    names = {cls.__name__ for cls in type(error).__mro__}
    return not names.isdisjoint({"TransportError", "ConnectionError", "Timeout"})


def one_line(text: object) -> str:
    """What a server or a library said, in one line."""
    return shown(" ".join(str(text).split()))


def _explained(
    error: Exception, repo: str, revision: str | None, kind: type[LorafuseError], file: str | None
) -> LorafuseError:
    from huggingface_hub import constants
    from huggingface_hub.errors import (
        GatedRepoError,
        HFValidationError,
        LocalEntryNotFoundError,
        OfflineModeIsEnabled,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    chain = list(_chain(error))
    statuses = [status for e in chain if (status := _status(e))]
    if isinstance(error, OSError) and error.errno and not statuses and not _is_of_transport(error):
        # A full disk, a cache that may not be written.
        where = f" to {shown(error.filename)}" if error.filename else ""
        return StorageError(f"{repo}: cannot be fetched{where}: {error.strerror}.")
    if any(isinstance(e, HFValidationError) for e in chain):
        return kind(f"{shown(repo)}: no such directory.")
    if any(isinstance(e, OfflineModeIsEnabled) for e in chain):
        variable = next((name for name in OFFLINE if os.environ.get(name)), OFFLINE[0])
        what = f"{shown(file)}: " if file else f"{repo}: no such directory, and it "
        return StorageError(f"{what}is not in the hub's cache; {variable} is set: unset it to ask the hub.")
    if any(isinstance(e, GatedRepoError) for e in chain):
        return kind(f"{repo}: is gated; ask for access at {constants.ENDPOINT}/{repo}, and {LOG_IN}.")
    if any(isinstance(e, RevisionNotFoundError) for e in chain):
        return kind(f"{repo}: has no revision {shown(revision)}.")
    if any(isinstance(e, RepositoryNotFoundError) for e in chain):
        hidden = f" that you may see; if it is private, {LOG_IN}" if 401 in statuses else ""
        return kind(f"{repo}: no such directory, and no such repository on the hub{hidden}.")
    if 401 in statuses:
        return kind(f"{repo}: the hub does not accept your token (401); {LOG_IN}.")
    if 403 in statuses:
        return kind(f"{repo}: the hub refuses access (403): {_server_message(chain)}.")
    passing = next((status for status in statuses if status in PASSING), None)
    if passing:
        return StorageError(f"{repo}: the hub answered {passing}, {len(WAITS_S) + 1} times; try again later.")
    unreachable = next((e for e in chain if _is_of_transport(e)), None)
    if unreachable is not None or any(isinstance(e, LocalEntryNotFoundError) for e in chain):
        reason = f": {one_line(unreachable)}" if unreachable is not None and str(unreachable) else ""
        what = f"{shown(file)}: " if file else f"{repo}: no such directory, and "
        return StorageError(f"{what}the hub at {constants.ENDPOINT} cannot be reached{reason}.")
    said = one_line(error).rstrip(".") or type(error).__name__
    return StorageError(f"{repo}: the hub's answer cannot be used: {said}.")


def _server_message(chain: list[BaseException]) -> str:
    said = next((text for e in chain if (text := getattr(e, "server_message", None))), None)
    return one_line(said).rstrip(".") if said else "it does not say why"
