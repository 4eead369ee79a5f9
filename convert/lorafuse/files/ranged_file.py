"""A file on the hub that is read in ranges, for headers and small tensors: a plan needs no weight."""

from threading import Lock
from typing import Any

from lorafuse.errors import StorageError, shown
from lorafuse.files.folder import Buffer, FileFacts
from lorafuse.files.hub_calls import AGENT, asking, retried
from lorafuse.files.hub_repo import HubRepo

HEADER_NBYTES = 1 << 17  # holds most headers, and is fetched faster than two shorter ranges
FOLLOWING_NBYTES = 1 << 22  # where one range follows another
TIMEOUT_S = 10


class RangedFile:
    """An OpenFile that asks the hub for ranges. The last one is kept."""

    def __init__(self, repo: HubRepo, path: str, label: str, facts: FileFacts) -> None:
        self.facts = facts
        self._repo, self._path, self._label = repo, path, label
        self._start, self._block, self._lock = 0, b"", Lock()

    def read_into(self, start: int, buffer: Buffer) -> int:
        view = memoryview(buffer).cast("B")
        n_wanted = min(len(view), self.facts.nbytes - start)
        if n_wanted <= 0:
            return 0
        with self._lock:
            if not self._start <= start < self._start + len(self._block):
                follows = bool(self._block) and start == self._start + len(self._block)
                nbytes = max(
                    HEADER_NBYTES, FOLLOWING_NBYTES if follows else 0, min(n_wanted, FOLLOWING_NBYTES)
                )
                self._block = self._range(start, min(start + nbytes, self.facts.nbytes))
                self._start = start
            at = start - self._start
            data = self._block[at : at + n_wanted]
        view[: len(data)] = data
        return len(data)

    def _range(self, start: int, stop: int) -> bytes:
        """Bytes [start, stop). Raises `kind` of the repository, StorageError."""
        with asking(self._repo.repo, self._repo.commit, self._repo.kind, self._label):
            response = retried(lambda: _ranged(self._repo, self._path, start, stop))
        data: bytes = response.content
        if response.status_code == 200:  # a server that knows no ranges sends all of it
            data = data[start:stop]
        if len(data) != stop - start:
            raise StorageError(
                f"{shown(self._label)}: the hub sent {len(data)} bytes where {stop - start} were asked for; "
                "try again later."
            )
        return data

    def will_need(self, start: int, nbytes: int) -> None:
        """Nothing is asked ahead."""

    def close(self) -> None:
        self._block = b""


def _ranged(repo: HubRepo, path: str, start: int, stop: int) -> Any:
    """The response to a request for bytes [start, stop)."""
    from huggingface_hub import hf_hub_url
    from huggingface_hub.utils import build_hf_headers, get_session, hf_raise_for_status

    # What is compressed has other ranges.
    headers = build_hf_headers(**AGENT) | {
        "Range": f"bytes={start}-{stop - 1}",
        "Accept-Encoding": "identity",
    }
    url = hf_hub_url(repo.repo, path, revision=repo.commit)
    response = get_session().get(url, headers=headers, timeout=TIMEOUT_S)
    hf_raise_for_status(response)
    return response
