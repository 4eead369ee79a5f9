"""The kinds of places that results are written to, by the scheme of their names."""

from importlib import import_module
from typing import cast

from lorafuse.errors import UsageError, shown
from lorafuse.files.cloud_url import SCHEMES
from lorafuse.files.names import scheme_of, without_secrets
from lorafuse.outdir import local
from lorafuse.outdir.apart import refuse_nameless
from lorafuse.outdir.out_dir import OutDirKind, SharedKind

# Scheme, as in memory://name → kind, or the name of its module, which is imported when it is asked for; none
# is a directory of this machine.
OUT_DIRS: dict[str, OutDirKind | str] = {"": local, **dict.fromkeys(SCHEMES, "lorafuse.outdir.cloud")}


def kind_of(out_dir: str) -> OutDirKind:
    """Raises UsageError for an empty name and for a scheme that is not known."""
    refuse_nameless(out_dir)
    scheme = scheme_of(out_dir)
    kind = OUT_DIRS.get(scheme)
    if kind is None:
        raise UsageError(
            f"{shown(without_secrets(out_dir))}: results cannot be written to {shown(scheme)}://."
        )
    if isinstance(kind, str):
        return cast(OutDirKind, import_module(kind))
    return kind


def shared_kind_of(out_dir: str) -> SharedKind:
    """The same where several workers may make one result. Raises UsageError for other kinds of places."""
    kind = kind_of(out_dir)
    if isinstance(kind, SharedKind):
        return kind
    raise UsageError(
        f"{shown(out_dir)}: workers cannot make parts of one result in {shown(scheme_of(out_dir))}://. Give "
        "a directory that all workers share, or let one run make it all."
    )
