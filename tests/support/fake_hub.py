"""What stands for the hub: its errors, and which files it would send."""

import fnmatch
from typing import Any


def hub_error(kind: type[Exception], message: str = "the hub's own words") -> Exception:
    """An error of the hub without the response that it is normally made from."""
    error = kind.__new__(kind)
    error.args = (message,)
    return error


def wanted(options: dict[str, Any], file: str) -> bool:
    """Whether snapshot_download fetches a file, by its documented patterns, where * matches a slash too."""
    allowed = any(fnmatch.fnmatchcase(file, pattern) for pattern in options["allow_patterns"])
    return allowed and not any(
        fnmatch.fnmatchcase(file, pattern) for pattern in options.get("ignore_patterns") or []
    )
