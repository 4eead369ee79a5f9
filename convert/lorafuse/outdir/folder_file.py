"""A complete file of a result, wherever the result lies."""

from collections.abc import Iterator
from pathlib import Path

from lorafuse.files.folder import FileHash, Folder, stream
from lorafuse.files.hashing import hash_file

READ_NBYTES = 1 << 20


class FolderFile:
    """A FinishedFile in a folder."""

    def __init__(self, folder: Folder, file: str) -> None:
        self.folder, self.file = folder, file
        self.local_path: Path | None = folder.local_path / file if folder.local_path else None

    def hash(self) -> FileHash:
        return hash_file(self.folder, self.file)

    def chunks(self) -> Iterator[bytes]:
        with stream(self.folder.open(self.file)) as f:
            while chunk := f.read(READ_NBYTES):
                yield chunk
