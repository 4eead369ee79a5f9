"""A base that is fetched ahead of the merge: what is said while the merge waits."""

import threading
from collections.abc import Callable

import pytest

from lorafuse.inputs import fetching
from lorafuse.planning.fetches import Fetch, Fetches


def test_how_far_a_download_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fetching, "SAID_S", 0.01)
    waited, said = threading.Event(), list[object]()

    def fetch(file: str, on_nbytes: Callable[[int], None]) -> None:
        on_nbytes(3)
        on_nbytes(4)
        assert waited.wait(5)

    def say_waiting(file: str, nbytes: int) -> None:
        said.append((file, nbytes))
        waited.set()

    plan = Fetches((Fetch("a.safetensors", 0),))
    fetcher = fetching._Fetcher(plan, fetch, lambda file: None, said.append, say_waiting)
    fetcher.start()
    fetcher.wait(0)
    assert said[0] in {("a.safetensors", 3), ("a.safetensors", 7)} and said[-1] == "a.safetensors"
