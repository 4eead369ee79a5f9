"""What the loop waits for where the base is not on this machine, and what it tells: weights by their number,
in the order in which they are made."""

from typing import Protocol


class Feed(Protocol):
    """Brings what weights are made from, ahead of the loop."""

    def is_ready(self, weight: int) -> bool:
        """Whether all that the weight is made from is here."""

    def wait(self, weight: int) -> None:
        """Returns when it is. All weights before have to be made, or nothing may come. Raises what went wrong
        with bringing it."""

    def made(self, weight: int) -> None:
        """This weight and all before it are made: what they were made from may go."""


class EverythingHere:
    """A base that lies on this machine."""

    def is_ready(self, weight: int) -> bool:
        return True

    def wait(self, weight: int) -> None:
        """There is nothing to wait for."""

    def made(self, weight: int) -> None:
        """Nothing goes."""


EVERYTHING_HERE = EverythingHere()
