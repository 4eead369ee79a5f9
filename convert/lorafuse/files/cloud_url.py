"""URLs of object stores, as `s3://bucket/folder`: which schemes there are, and what such a URL may hold."""

from typing import NamedTuple

from lorafuse.errors import UsageError, shown
from lorafuse.files.names import scheme_of

S3 = ("s3", "s3a")
AZURE = ("az", "adl", "azure", "abfs", "abfss")
# `memory` lasts as long as the process.
SCHEMES = (*S3, "gs", *AZURE, "memory")
CONTAINER_AT_ACCOUNT = ("abfs", "abfss")  # abfss://container@account.dfs.core.windows.net/folder


class CloudUrl(NamedTuple):
    """`root` is the URL of a bucket, `prefix` the path in it: its characters as they are, none is escaped."""

    root: str
    prefix: str

    def __str__(self) -> str:
        return f"{self.root}/{self.prefix}" if self.prefix else self.root


def cloud_url(name: str) -> CloudUrl:
    """The parts of a URL. Raises UsageError for one that holds credentials, or that names no bucket."""
    scheme = scheme_of(name)
    host, _, path = name.removeprefix(f"{scheme}://").partition("/")
    user, at, account = host.rpartition("@")
    if "?" in name or "#" in name or (at and (scheme not in CONTAINER_AT_ACCOUNT or ":" in user)):
        plain = f"{scheme}://{account}/{path}".partition("?")[0].partition("#")[0]
        raise UsageError(
            f"{shown(plain)}: the URL of an object store may hold no user, query or fragment; credentials "
            "are found where the cloud's own tools find them."
        )
    path = path.strip("/")
    if scheme == "memory":
        host, path = "", "/".join(filter(None, (host, path)))
    elif not host:
        raise UsageError(f"{shown(name)}: names no bucket.")
    if path and not {"", ".", ".."}.isdisjoint(path.split("/")):
        raise UsageError(f"{shown(name)}: has an empty part, '.' or '..' in its path.")
    return CloudUrl(f"{scheme}://{host}", path)
