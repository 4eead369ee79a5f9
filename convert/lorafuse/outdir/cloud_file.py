"""A file of a result on its way into an object store: a multipart upload, which shows nowhere before it is
complete. A file of less than a part is one object at once."""

from threading import Lock

from lorafuse.errors import StorageError, shown
from lorafuse.files.cloud_store import CloudPlace
from lorafuse.outdir.cloud_parts import Parts, named, part_nbytes_of


class CloudOutFile:
    """An OutFile. Who writes waits until the store has taken the parts before. Raises StorageError for what
    the store says."""

    def __init__(self, place: CloudPlace, file: str, nbytes: int) -> None:
        self.name = place / file
        self._lock = Lock()
        part_nbytes = part_nbytes_of(nbytes)
        self._writer = place.writer(file, part_nbytes)
        self._parts = Parts(nbytes, part_nbytes, self._writer.write)

    def write(self, offset: int, data: bytes | memoryview) -> None:
        with self._lock:
            try:
                self._parts.write(offset, data)
            except OSError as e:
                raise named(e) from e

    def read(self, offset: int, nbytes: int) -> bytes:
        return self._parts.read(offset, nbytes)

    def passed(self, end: int) -> None:
        self._parts.passed(end)

    def finish(self, nbytes: int) -> None:
        with self._lock:
            if not self._parts.is_complete:
                raise StorageError(f"{shown(self.name)}: bytes are missing, the plan has {nbytes}.")
            self._writer.finish()
            self._parts.close()

    def close(self) -> None:
        with self._lock:
            self._parts.close()
            self._writer.close()
