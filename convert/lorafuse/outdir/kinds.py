"""The kinds of places that results are written to, by the scheme of their names."""

from lorafuse.errors import UsageError, shown
from lorafuse.files.names import scheme_of
from lorafuse.outdir import local
from lorafuse.outdir.apart import refuse_nameless
from lorafuse.outdir.out_dir import OutDirKind, SharedKind

# Scheme, as in memory://name → kind; none is a directory of this machine.
OUT_DIRS: dict[str, OutDirKind] = {"": local}
# The same for those in which several workers may make one result.
SHARED_OUT_DIRS: dict[str, SharedKind] = {"": local}


def kind_of(out_dir: str) -> OutDirKind:
    """Raises UsageError for an empty name and for a scheme that is not known."""
    refuse_nameless(out_dir)
    scheme = scheme_of(out_dir)
    kind = OUT_DIRS.get(scheme)
    if kind is None:
        raise UsageError(f"{shown(out_dir)}: results cannot be written to {shown(scheme)}://.")
    return kind


def shared_kind_of(out_dir: str) -> SharedKind:
    """Raises UsageError for a kind of place in which one run alone makes a result."""
    kind_of(out_dir)
    scheme = scheme_of(out_dir)
    kind = SHARED_OUT_DIRS.get(scheme)
    if kind is None:
        raise UsageError(
            f"{shown(out_dir)}: the files of one result cannot be divided between workers in "
            f"{shown(scheme)}://; give a directory that all workers share, or leave out --index, --of, "
            "--commit and --engine."
        )
    return kind
