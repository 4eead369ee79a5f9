"""What of the names that a user gave other processes see: workers on other machines must see the same."""

import os
from collections.abc import Iterable
from pathlib import Path

from lorafuse.errors import UsageError, shown
from lorafuse.files.folders import PASSING, is_passing
from lorafuse.files.names import scheme_of


def seen_here(names: Iterable[str]) -> tuple[str, ...]:
    """Those that are paths of this machine, not ids of a hub or URLs."""
    return tuple(name for name in names if not scheme_of(name) and os.path.exists(name))


def there_around(place: str) -> str:
    """The nearest directory that is there already; a URL as it is."""
    while not scheme_of(place) and not os.path.isdir(place):
        place = os.path.dirname(place) or os.curdir
    return place


def is_result_seen(out_dir: Path | str) -> bool:
    """Whether a result that is complete is on this machine's file system; a URL is seen by all."""
    return bool(scheme_of(str(out_dir))) or os.path.isdir(out_dir)


def refuse_passing(out_dir: str) -> None:
    """Raises UsageError for a result that would be gone with the command."""
    if is_passing(out_dir):
        raise UsageError(f"{shown(out_dir)}: is gone when this command ends; {PASSING}:// is for Python.")


def refuse_unshared(names: Iterable[str]) -> None:
    """Raises UsageError for what workers in other processes cannot see, wherever they are."""
    for name in names:
        if is_passing(name):
            raise UsageError(
                f"{shown(name)}: is in this process alone, and workers are others. Give a place that all see."
            )
