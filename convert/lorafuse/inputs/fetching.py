"""The weights of a base on the hub, fetched ahead of the merge, in a thread beside it.

Without `stream` the files go into the hub's own cache and stay there. With it they go into a folder of the
result that is in the making, two at a time, and are removed behind the merge.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from threading import Condition, Thread
from typing import TYPE_CHECKING

from lorafuse.errors import StorageError, shown
from lorafuse.events import OnEvent
from lorafuse.files.checkpoint import Checkpoint
from lorafuse.files.hub_calls import Stopped
from lorafuse.files.hub_folder import HubFolder
from lorafuse.files.local_folder import LocalFolder
from lorafuse.merge.feed import EVERYTHING_HERE, Feed
from lorafuse.planning.fetches import Drop, Fetch, Fetches, all_kept, few_kept
from lorafuse.planning.shared_weights import SharedWeight, SharedWeights

if TYPE_CHECKING:
    from lorafuse.planning.plan import Step

STOP_S = 30  # a download hears of a stop with its next bytes
SAID_S = 1.0  # between two words of how far a download is, while the merge waits for it


def fetch_shards(base: Checkpoint) -> None:
    """Fetch what is not on this machine into the hub's cache. Raises CheckpointError, StorageError."""
    if isinstance(base.folder, HubFolder):
        for shard in base.shards:
            if not base.folder.is_here(shard.name):
                base.folder.fetch(shard.name)
                shard.close()  # it was read from afar


def streamed_nbytes(base: Checkpoint) -> int:
    """About what is held at once of a base that is streamed: two of the files that are not here."""
    if not isinstance(base.folder, HubFolder):
        return 0
    far = (shard.nbytes for shard in base.shards if not base.folder.is_here(shard.name))
    return sum(sorted(far)[-2:])


class Fetching:
    """What a pass fetches of its base. `scratch`: where files go that do not stay; None for the cache."""

    def __init__(
        self,
        base: Checkpoint,
        outputs: Sequence["Sequence[Step]"],
        scratch: LocalFolder | None,
        on_event: OnEvent,
    ) -> None:
        self._base, self._scratch, self._on_event = base, scratch, on_event
        self._shards = {shard.name: shard for shard in base.shards}
        self._folder = base.folder if isinstance(base.folder, HubFolder) else None
        self.plan = self._planned(outputs) if self._folder else Fetches()

    def _planned(self, outputs: Sequence["Sequence[Step]"]) -> Fetches:
        assert self._folder
        far = {name for name in self._shards if not self._folder.is_here(name)}
        sets: dict[frozenset[str], frozenset[str]] = {}  # thousands of weights share a few
        needs = []
        for weight in SharedWeights(outputs):
            files = frozenset(self._files_of(weight)) & far
            needs.append(sets.setdefault(files, files))
        sizes = {name: shard.nbytes for name, shard in self._shards.items()}
        return few_kept(needs, sizes) if self._scratch else all_kept(needs, sizes)

    def _files_of(self, weight: SharedWeight) -> Iterator[str]:
        """The files that a weight is made from: those of its sources. What else it may read is fetched when
        it is opened, and stays until the end."""
        if weight.sources.store is self._base:
            for name in weight.sources.names:
                yield self._base.shards[self._base.tensors[name].file].name

    @property
    def nbytes_beside(self) -> int:
        """What is held at once in the place of the result."""
        return self.plan.held_nbytes if self._scratch else 0

    def refuse_full_cache(self) -> None:
        """Raises StorageError where the hub's cache has no room for what is fetched."""
        if self._folder is None or self._scratch or not self.plan.nbytes:
            return
        free = self._folder.free_nbytes_in_cache()
        if self.plan.nbytes > free:
            raise StorageError(
                f"{shown(self._folder)}: {self.plan.nbytes} bytes are to be fetched into the hub's cache and "
                f"{free} are free there; --stream keeps two files at a time, beside the result."
            )

    @contextmanager
    def feed(self) -> Iterator[Feed]:
        """What the merge waits for. Leaving it stops what is under way."""
        if self._folder:
            self._folder.merge_begins(self._scratch, self._first())
            for shard in self._shards.values():
                shard.close()  # it was read in ranges
        if not self.plan.actions:
            yield EVERYTHING_HERE
            return
        fetcher = _Fetcher(self.plan, self._fetch, self._drop, self._say, self._say_waiting)
        fetcher.start()
        try:
            yield fetcher
        finally:
            fetcher.stop()

    def close(self) -> None:
        """What comes later is planned from headers again: nothing that was streamed is here any more."""
        if self._folder:
            for shard in self._shards.values():
                shard.close()
            self._folder.merge_ends()

    def _fetch(self, name: str, on_nbytes: Callable[[int], None]) -> None:
        assert self._folder
        self._folder.fetch(name, self._scratch, on_nbytes)
        self._shards[name].close()  # it was read from afar

    def _say(self, name: str) -> None:
        self._on_event({"event": "fetched", "file": name, "nbytes": self._shards[name].nbytes})

    def _say_waiting(self, name: str, nbytes: int) -> None:
        of = self._shards[name].nbytes
        self._on_event({"event": "fetching", "file": name, "nbytes": min(nbytes, of), "of_nbytes": of})

    def _drop(self, name: str) -> None:
        assert self._folder and self._scratch
        self._shards[name].close()
        self._folder.forget(name)

    def _first(self) -> set[str]:
        """The files that are fetched before one is dropped."""
        first: set[str] = set()
        for action in self.plan.actions:
            if isinstance(action, Drop):
                break
            first.add(action.file)
        return first


class _Fetcher:
    """Carries a plan out in a thread: fetches ahead, and drops behind."""

    def __init__(
        self,
        plan: Fetches,
        fetch: Callable[[str, Callable[[int], None]], None],
        drop: Callable[[str], None],
        say: Callable[[str], None],
        say_waiting: Callable[[str, int], None],
    ) -> None:
        self._thread = Thread(target=self._run, name="fetch", daemon=True)
        self._plan, self._fetch, self._drop, self._say = plan, fetch, drop, say
        self._say_waiting = say_waiting
        self._file, self._n_here = "", 0  # the file that is under way, and how many bytes of it came
        self._n_said = 0
        self._changed = Condition()
        self._n_done = 0  # actions
        self._last_made = -1
        self._stopped = False
        self._error: Exception | None = None
        # The number of actions that have to be done before a weight is ready.
        self._until = [
            (action.weight, n + 1) for n, action in enumerate(plan.actions) if isinstance(action, Fetch)
        ]

    def start(self) -> None:
        self._thread.start()

    def _run(self) -> None:
        try:
            for action in self._plan.actions:
                if isinstance(action, Drop):
                    self._wait_for_made(action.weight)
                    self._drop(action.file)
                else:
                    self._file, self._n_here = action.file, 0
                    self._fetch(action.file, self._came)
                with self._changed:
                    self._n_done += 1
                    self._changed.notify_all()
        except Stopped:
            return
        except Exception as e:  # told to whoever waits
            with self._changed:
                self._error = e
                self._changed.notify_all()

    def _wait_for_made(self, weight: int) -> None:
        with self._changed:
            self._changed.wait_for(lambda: self._stopped or self._last_made >= weight)
        self._go_on(0)

    def _go_on(self, _: int) -> None:
        if self._stopped:
            raise Stopped

    def _came(self, nbytes: int) -> None:
        self._n_here += nbytes
        self._go_on(nbytes)

    def is_ready(self, weight: int) -> bool:
        needed = max((n for first, n in self._until if first <= weight), default=0)
        return self._n_done >= needed

    def wait(self, weight: int) -> None:
        with self._changed:
            while not self._changed.wait_for(
                lambda: self._error is not None or self.is_ready(weight), timeout=SAID_S
            ):
                if self._n_here:
                    self._say_waiting(self._file, self._n_here)
        self._tell()
        if self._error is not None and not self.is_ready(weight):
            raise self._error

    def made(self, weight: int) -> None:
        with self._changed:
            self._last_made = max(self._last_made, weight)
            self._changed.notify_all()
        self._tell()

    def _tell(self) -> None:
        """What is fetched by now, said by the thread that merges."""
        done = self._plan.actions[self._n_said : self._n_done]
        self._n_said += len(done)
        for action in done:
            if isinstance(action, Fetch):
                self._say(action.file)

    def stop(self) -> None:
        """Nothing more is fetched."""
        with self._changed:
            self._stopped = True
            self._changed.notify_all()
        self._thread.join(STOP_S)
