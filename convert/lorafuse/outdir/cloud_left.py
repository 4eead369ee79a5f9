"""What runs that were cut off have left in an object store, piece by piece."""

from collections.abc import Iterator
from datetime import UTC, datetime

from lorafuse.files.cloud_store import CloudPlace, Meta
from lorafuse.outdir.cloud_commit import hidden_of, parts_of
from lorafuse.outdir.cloud_lock import LOCK, NOBODY, holder_of
from lorafuse.outdir.cloud_runs import OUT, runs_in
from lorafuse.outdir.out_dir import Left


def left_at(out: CloudPlace) -> Iterator[Left]:
    """Of all runs for a result, and for parts of it."""
    hidden = hidden_of(out)
    finished = {
        f"{run.out.prefix}{shard.written.file}"
        for part in (None, *parts_of(out))
        for run in runs_in(hidden_of(out, part))
        for shard in run.finished()
    }
    now = datetime.now(UTC)
    for meta in hidden.everything():
        *_, folder, name = ("", *meta.name.split("/"))
        holder = ""
        if name == LOCK and folder != OUT:
            what, holder = "lock", _holder(hidden, meta)
        elif hidden.prefix + meta.name in finished:
            what = "finished"
        else:
            what = "unfinished" if f"/{OUT}/" in f"/{meta.name}" else "journal"
        yield Left(what, meta.name, meta.nbytes, max((now - meta.modified).total_seconds(), 0), holder)


def _holder(hidden: CloudPlace, meta: Meta) -> str:
    try:
        data = hidden.get(meta.name)[0]
    except FileNotFoundError:  # released meanwhile
        return "nobody"
    return "nobody" if data == NOBODY else holder_of(data)
