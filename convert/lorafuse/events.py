"""What a run says while it goes on."""

from collections.abc import Callable
from typing import Any

OnEvent = Callable[[dict[str, Any]], None]


def ignore(event: dict[str, Any]) -> None:
    """The sink of those who do not listen."""
