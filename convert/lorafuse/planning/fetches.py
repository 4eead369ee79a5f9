"""In which order the files of a base are fetched from afar, and dropped again, so that few are held at once.

Weights are made in their natural order, and the files of a base hold them in another: the last file often
has the first weight (`lm_head`). What is decided here, for the whole run, is which file is fetched next, and
which has to go before it.
"""

from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import NamedTuple

MOST_TRAFFIC = 2.0  # bytes that are fetched, in all, over those of the files: with more, more files are held


class Fetch(NamedTuple):
    """Fetch a file. The weight of that number is the first that waits for it."""

    file: str
    weight: int


class Drop(NamedTuple):
    """Remove a file, once the weight of that number is made."""

    file: str
    weight: int


Action = Fetch | Drop


class Fetches(NamedTuple):
    """What is fetched and dropped, in order; `held_nbytes` is the most that is held at once, `nbytes` what is
    fetched in all."""

    actions: tuple[Action, ...] = ()
    held_nbytes: int = 0
    nbytes: int = 0


def all_kept(needs: Sequence[Collection[str]], sizes: Mapping[str, int]) -> Fetches:
    """Every file once, in the order in which weights need them. `needs`: the files of each weight that are
    not there yet; `sizes`: their bytes."""
    first: dict[str, int] = {}
    for weight, files in enumerate(needs):
        for file in sorted(files):
            first.setdefault(file, weight)
    nbytes = sum(sizes[file] for file in first)
    return Fetches(tuple(Fetch(file, weight) for file, weight in first.items()), nbytes, nbytes)


def few_kept(needs: Sequence[Collection[str]], sizes: Mapping[str, int], most: int = 2) -> Fetches:
    """The same with as few files held at once as `most`, or as one weight needs. A file that had to go is
    fetched again; where that is too much traffic, more are held."""
    whole = all_kept(needs, sizes)
    while True:
        actions = tuple(_with_at_most(most, needs))
        nbytes = sum(sizes[action.file] for action in actions if isinstance(action, Fetch))
        if nbytes <= MOST_TRAFFIC * whole.nbytes:
            return Fetches(actions, _most_held(actions, sizes), nbytes)
        most += 1


def _with_at_most(most: int, needs: Sequence[Collection[str]]) -> Iterator[Action]:
    uses: dict[str, list[int]] = {}  # the weights that a file is still needed for, the last one first
    for weight, files in reversed(list(enumerate(needs))):
        for file in files:
            uses.setdefault(file, []).append(weight)
    last: dict[str, int] = {}  # held file → the last weight that used it
    for weight, files in enumerate(needs):
        for file in sorted(files):
            if file not in last:
                while len(last) >= max(most, len(files)):
                    gone = max(
                        last.keys() - set(files), key=lambda held: (_next(uses[held]), -last[held], held)
                    )
                    yield Drop(gone, last.pop(gone))
                yield Fetch(file, weight)
            last[file] = weight
        for file in files:
            uses[file].pop()
    yield from (Drop(file, weight) for file, weight in sorted(last.items(), key=lambda item: item[1]))


def _next(uses: list[int]) -> float:
    """The next weight that needs a file; infinite where none does."""
    return uses[-1] if uses else float("inf")


def _most_held(actions: Sequence[Action], sizes: Mapping[str, int]) -> int:
    held = most = 0
    for action in actions:
        held += sizes[action.file] if isinstance(action, Fetch) else -sizes[action.file]
        most = max(most, held)
    return most
