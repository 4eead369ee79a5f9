"""A result that also goes to the hub: each file of weights while the next is made, the others at the end."""

from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Self

from lorafuse.arithmetic.measure import Measures
from lorafuse.files.folder import FileHash
from lorafuse.files.hub_upload import Upload
from lorafuse.files.local_folder import LocalFolder
from lorafuse.files.safetensors_writer import OutFile
from lorafuse.merge.destination import Written
from lorafuse.outdir.journal import FinishedShard
from lorafuse.outdir.out_dir import FinishedFile, OutDir, Space
from lorafuse.outdir.read_back import checked_shapes
from lorafuse.planning.plan import Plan

# Files of weights that are here at once where none stays: two are open, one waits, one is on its way.
N_HELD, N_PENDING = 4, 1

Shapes = tuple[int, dict[str, tuple[int, ...]]]


class PushedOutDir:
    """The same as `inner`, whose commit is the repository's too. Unless it `keeps` them, a file of weights is
    removed when it is on the hub, and nothing gets the result's name on this machine."""

    def __init__(self, inner: OutDir, upload: Upload, plan: Plan, message: str, *, keeps: bool) -> None:
        self.name, self.place = inner.name, inner.place
        self._inner, self._upload, self._plan, self._keeps = inner, upload, plan, keeps
        self._message = message
        self._shapes: dict[str, Shapes] = {}

    @property
    def finished(self) -> Mapping[str, FinishedShard]:
        return self._inner.finished

    def __enter__(self) -> Self:
        self._inner.__enter__()
        try:
            self._upload.start()
            for file, shard in self._inner.finished.items():
                if shard.elsewhere:
                    planned = next(planned for planned in self._plan.shards if planned.file == file)
                    shapes = {tensor.name: tensor.spec.shape for tensor in planned.tensors}
                    self._shapes[file] = (shard.written.nbytes, shapes)  # which were read before it went
                    self._upload.was_sent(file, _hash_of(shard.written))
                else:
                    self._send(shard.written)
        except BaseException as e:
            self.__exit__(type(e), e, None)
            raise
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        self._upload.stop()
        self._inner.__exit__(kind, error, trace)

    def create(self, file: str, nbytes: int) -> OutFile:
        self._settle(N_PENDING)
        return self._inner.create(file, nbytes)

    def _settle(self, most: int) -> None:
        """Until at most so many files are on their way; those that arrived are removed here."""
        for file in self._upload.wait(most):
            if not self._keeps:
                self._inner.give_away(file)

    def record(self, written: Written, measures: dict[str, Measures]) -> None:
        self._inner.record(written, measures)
        self._send(written)

    def _send(self, written: Written) -> None:
        if not self._keeps:
            planned = next(planned for planned in self._plan.shards if planned.file == written.file)
            self._shapes[written.file] = checked_shapes(planned, written, self._inner)
        self._upload.send(written.file, self._path(written.file), _hash_of(written))

    def _path(self, file: str) -> Path:
        path = self._inner.finished_file(file).local_path
        assert path is not None  # the command line refuses other kinds
        return path

    def shapes(self, file: str) -> Shapes:
        return self._shapes.get(file) or self._inner.shapes(file)

    def put(self, file: str, chunks: Iterable[bytes]) -> None:
        self._inner.put(file, chunks)

    def scratch(self) -> LocalFolder:
        return self._inner.scratch()

    def files(self) -> list[str]:
        return self._inner.files()

    def hash(self, file: str) -> FileHash:
        return self._inner.hash(file)

    def finished_file(self, file: str) -> FinishedFile:
        return self._inner.finished_file(file)

    def take(self, file: str, other: FinishedFile, how: str) -> None:
        self._inner.take(file, other, how)
        self._upload.send(file, self._path(file), self._inner.hash(file))

    def give_away(self, file: str) -> None:
        self._inner.give_away(file)

    def space(self) -> Space | None:
        """What is removed again needs no room."""
        space = self._inner.space()
        if self._keeps or space is None or space.free_nbytes is None:
            return space
        sizes = sorted(shard.nbytes for shard in self._plan.shards if shard.file not in self.finished)
        return replace(space, free_nbytes=space.free_nbytes + sum(sizes[:-N_HELD]))

    def commit(self) -> None:
        self._settle(0)
        self._upload.commit({file: self._path(file) for file in self.files()}, self._message)
        if self._keeps:
            self._inner.commit()


def _hash_of(written: Written) -> FileHash:
    return FileHash(written.nbytes, written.sha256)
