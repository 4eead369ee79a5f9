"""URLs of object stores, as `s3://bucket/folder`: which schemes there are, and what such a URL may hold."""

from collections.abc import Mapping
from typing import NamedTuple

from lorafuse.errors import UsageError, shown
from lorafuse.files.names import scheme_of, without_secrets

S3 = ("s3", "s3a")
AZURE = ("az", "adl", "azure", "abfs", "abfss")
# Of several schemes of a store, the one that a place is called by: inputs and results are told apart by name.
_CALLED = {"s3a": "s3", "adl": "az", "azure": "az"}
# `memory` lasts as long as the process.
SCHEMES = (*S3, "gs", *AZURE, "memory")
CONTAINER_AT_ACCOUNT = ("abfs", "abfss")  # abfss://container@account.dfs.core.windows.net/folder
_ACCOUNTS = ("AZURE_STORAGE_ACCOUNT_NAME", "AZURE_ACCOUNT_NAME")


class CloudUrl(NamedTuple):
    """`root` is the URL of a bucket, `prefix` the path in it: its characters as they are, none is escaped."""

    root: str
    prefix: str

    def __str__(self) -> str:
        return f"{self.root}/{self.prefix}" if self.prefix else self.root


def cloud_url(name: str) -> CloudUrl:
    """The parts of a URL. Raises UsageError for one that holds credentials, or that names no bucket."""
    typed = scheme_of(name)
    host, _, path = name.removeprefix(f"{typed}://").partition("/")
    user, at, _ = host.rpartition("@")
    scheme = _called(typed, has_account=bool(at))
    if "?" in name or "#" in name or (at and (scheme not in CONTAINER_AT_ACCOUNT or ":" in user)):
        raise UsageError(
            f"{shown(without_secrets(name))}: the URL of an object store may hold no user, query or "
            "fragment; credentials are found where the cloud's own tools find them."
        )
    path = path.strip("/")
    if scheme == "memory":
        host, path = "", "/".join(filter(None, (host, path)))
    elif not host:
        raise UsageError(f"{shown(name)}: names no bucket.")
    if path and not {"", ".", ".."}.isdisjoint(path.split("/")):
        raise UsageError(f"{shown(name)}: has an empty part, '.' or '..' in its path.")
    return CloudUrl(f"{scheme}://{host}", path)


def _called(scheme: str, *, has_account: bool) -> str:
    if scheme in CONTAINER_AT_ACCOUNT:
        return "abfss" if has_account else "az"
    return _CALLED.get(scheme, scheme)


def with_account(root: str, environ: Mapping[str, str]) -> str:
    """The URL of a container of Azure with the account that the environment names; another `root` as it
    is."""
    account = next((environ[name] for name in _ACCOUNTS if environ.get(name)), None)
    if account and root.startswith("az://"):
        return f"abfss://{root.removeprefix('az://')}@{account}.dfs.core.windows.net"
    return root
