"""A result on its way to a repository on the hub: large files while others are made, then one commit."""

from collections import deque
from collections.abc import Mapping
from pathlib import Path
from threading import Condition, Thread
from typing import Any

from lorafuse.errors import OutDirError, StorageError
from lorafuse.files.folder import FileHash
from lorafuse.files.hub_calls import AGENT, asking, retried
from lorafuse.files.hub_repo import listed_files
from lorafuse.files.names import INDEX
from lorafuse.settings import Push

ADAPTER = "adapter_config.json"


class Upload:
    """Files go to the hub one after the other, in a thread; nothing shows there before the commit. `instead`:
    contents of files that are not what is in the result."""

    def __init__(self, push: Push) -> None:
        self.push, self.instead = push, dict[str, bytes]()
        self.url = ""
        self._additions: dict[str, Any] = {}
        self._waiting: deque[tuple[str, Any]] = deque()
        self._sent: list[str] = []
        self._n_pending = 0
        self._error: Exception | None = None
        self._stopped = False
        self._changed = Condition()
        self._thread = Thread(target=self._run, name="upload", daemon=True)

    def start(self) -> None:
        """Make the repository, or see that it may be written. Raises OutDirError for one that holds an
        adapter, or that is public though a private one is wanted; StorageError."""
        repo, revision = self.push.repo, self.push.revision
        with asking(repo, revision, StorageError):
            retried(lambda: self._api.create_repo(repo, private=self.push.private or None, exist_ok=True))
            if revision and not self.push.create_pr:
                retried(lambda: self._api.create_branch(repo, branch=revision, exist_ok=True))
            info = retried(lambda: self._api.model_info(repo, revision=revision))
        self._there = [file.rfilename for file in info.siblings or ()]
        if self.push.private and not info.private:
            raise OutDirError(f"{repo}: is public on the hub already, and --private is given.")
        if ADAPTER in self._there:
            raise OutDirError(
                f"{repo}: holds an adapter ({ADAPTER}), for which loaders would take the result; choose "
                "another repository."
            )
        self._thread.start()

    @property
    def _api(self) -> Any:
        from huggingface_hub import HfApi

        return HfApi(**AGENT)

    def _addition(self, file: str, path: Path | bytes, known: FileHash | None = None) -> Any:
        from huggingface_hub import CommitOperationAdd

        addition = CommitOperationAdd(file, path)
        if known:  # need not be hashed again
            addition.upload_info.sha256 = bytes.fromhex(known.sha256)
        return addition

    def send(self, file: str, path: Path, known: FileHash) -> None:
        """A complete file, to be uploaded soon."""
        addition = self._additions[file] = self._addition(file, path, known)
        with self._changed:
            self._waiting.append((file, addition))
            self._n_pending += 1
            self._changed.notify_all()

    def was_sent(self, file: str, known: FileHash) -> None:
        """A file that an earlier run uploaded, and that is not here any more."""
        addition = self._additions[file] = self._addition(file, b"", known)
        addition.upload_info.size = known.size
        addition._upload_mode, addition._should_ignore, addition._is_uploaded = "lfs", False, True

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._waiting or self._stopped)
                if self._stopped:
                    return
                file, addition = self._waiting.popleft()
            try:
                self._send(addition)
            except Exception as e:  # told to whoever waits
                self._error = e
            with self._changed:
                self._sent.append(file)
                self._n_pending -= 1
                self._changed.notify_all()

    def _send(self, addition: Any) -> None:
        repo, revision, create_pr = self.push.repo, self.push.revision, self.push.create_pr
        with asking(repo, revision, StorageError, f"{repo}/{addition.path_in_repo}"):
            # The library forgets the path afterwards.
            retried(
                lambda: self._api.preupload_lfs_files(
                    repo, [addition], revision=revision, create_pr=create_pr, num_threads=1
                )
            )

    def wait(self, most: int) -> list[str]:
        """Until at most so many files are on their way. Returns those that arrived since the last call.
        Raises StorageError for a file that did not."""
        with self._changed:
            self._changed.wait_for(lambda: self._error or self._n_pending <= most)
            if self._error:
                raise self._error
            sent, self._sent = self._sent, []
            return sent

    def commit(self, files: Mapping[str, Path | None], message: str) -> None:
        """Make them the repository's, with what was sent, in one commit; weights that it held and that are
        not among them go."""
        from huggingface_hub import CommitOperationDelete

        self.wait(0)
        for file, path in files.items():
            if file not in self._additions:
                content = self.instead.get(file, path)
                assert content is not None
                self._additions[file] = self._addition(file, content)
        stale = [file for file in self._there if _is_weights(file) and file not in self._additions]
        operations = [*self._additions.values(), *(CommitOperationDelete(file) for file in stale)]
        repo, revision, create_pr = self.push.repo, self.push.revision, self.push.create_pr
        with asking(repo, revision, StorageError):
            done = self._api.create_commit(
                repo, operations, commit_message=message, revision=revision, create_pr=create_pr
            )
        self.url = str(done.pr_url or done.commit_url)

    def stop(self) -> None:
        """Nothing more is sent."""
        with self._changed:
            self._stopped = True
            self._changed.notify_all()


def is_published(push: Push, weights: Mapping[str, str]) -> bool:
    """Whether the branch of the repository holds just these files of weights: name → sha256. Raises
    StorageError."""
    from huggingface_hub.errors import RepositoryNotFoundError, RevisionNotFoundError

    with asking(push.repo, push.revision, StorageError):
        try:
            files = retried(lambda: dict(listed_files(push.repo, push.revision)))
        except (RepositoryNotFoundError, RevisionNotFoundError):
            return False
    there = {name: entry.sha256 for name, entry in files.items() if _is_weights(name) and name != INDEX}
    return there == weights


def _is_weights(file: str) -> bool:
    return "/" not in file and (file.endswith(".safetensors") or file == INDEX)
