"""A side file is copied as it is, or refused: never a pointer or a link in its place."""

from contextlib import closing

from lorafuse.errors import CheckpointError, StorageError, shown
from lorafuse.files.folder import Folder, read_fully
from lorafuse.files.safetensors_file import LFS_HINT, LFS_MAGIC, FormatError

MAX_NBYTES = 1_000_000_000


def check_side_file(folder: Folder, name: str) -> int:
    """Its size in bytes. Raises CheckpointError for a git-LFS pointer, a link that leads nowhere or out of
    the folder, and what is no regular file; StorageError for a file that cannot be read."""
    label = folder / name
    try:
        with closing(folder.open(name, inside=True)) as file:
            if read_fully(file, 0, len(LFS_MAGIC)) == LFS_MAGIC:
                raise CheckpointError(f"{shown(label)}: {LFS_HINT}")
            return file.facts.nbytes
    except FileNotFoundError:
        raise CheckpointError(
            f"{shown(label)}: is a link to a file that is not there; replace it by the file, or remove it."
        ) from None
    except FormatError as e:
        raise CheckpointError(str(e)) from None
    except OSError as e:
        raise StorageError(f"{shown(label)}: cannot be read: {e.strerror}.") from None


def refuse_large(folder: Folder, name: str, nbytes: int) -> None:
    """Raises CheckpointError."""
    if nbytes > MAX_NBYTES:
        raise CheckpointError(f"{folder / name}: has {nbytes} bytes, too many for a file of its kind.")
