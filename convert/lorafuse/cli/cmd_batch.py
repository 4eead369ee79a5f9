"""`lorafuse batch`: many adapters, one pass over the base."""

import gc
import os
from typing import Any

import click

from lorafuse.batching.jobs import checked_share
from lorafuse.batching.jobs_afar import listed_jobs
from lorafuse.batching.pushes import pushes_of
from lorafuse.cli.exits import exit_codes
from lorafuse.cli.options import (
    CONTEXT,
    base_options,
    check_base_options,
    engine_options,
    output_options,
    push_option,
    run_options,
    version_option,
)
from lorafuse.cli.show_batch import ShowBatch
from lorafuse.errors import BatchError
from lorafuse.files.early_hashing import hashing_meanwhile
from lorafuse.files.local_folder import as_typed
from lorafuse.files.seen import refuse_passing
from lorafuse.files.sharing import SHARE_CHOICES
from lorafuse.files.uncollected import uncollected
from lorafuse.outdir.apart import refuse_nameless
from lorafuse.settings import Settings


@click.command(context_settings=CONTEXT)
@click.argument("ckpt")
@click.argument("jobs")
@click.argument("out_root")
@output_options
@click.option("--adapter-scale", type=float, default=1.0, show_default=True,
              help="Multiplies the update of every adapter for which JOBS gives no scale.")  # fmt: skip
@base_options
@click.option("--share", type=click.Choice(SHARE_CHOICES), default="auto", show_default=True,
              help="How results share files that no adapter changes; auto takes the first of these that "
                   "works. Hard-linked files are read-only.")  # fmt: skip
@click.option("--index", type=int, metavar="I",
              help="Do share I (from 0) of the jobs; with --of. Default: the task of a Slurm array or of a "
                   "Kubernetes Indexed Job, if this is one, else all.")  # fmt: skip
@click.option("--of", type=int, metavar="N", help="Into how many shares the jobs are divided.")
@engine_options
@click.option(
    "--allow-nonfinite",
    is_flag=True,
    help="Keep values of the base that are not finite, instead of refusing them.",
)
@click.option("--overwrite", is_flag=True,
              help="Replace results that are there but not what this call makes, once the new ones are "
                   "complete.")  # fmt: skip
@click.option("--stream", is_flag=True,
              help="Fetch a CKPT on the hub file by file ahead of each pass, and remove each file behind it: "
                   "the disk holds the results and two files.")  # fmt: skip
@click.option(
    "--push-to-hub",
    metavar="me/{name}",
    help="Upload each result to a repository on the hub, too, in whose name {name} is the job's.",
)
@click.option("--private", is_flag=True, help="Make these repositories private ones.")
@click.option("--revision", metavar="BRANCH", help="The branch of these repositories.")
@click.option(
    "--restart", is_flag=True, help="Discard what earlier calls that were cut off have finished of a result."
)
@run_options
@click.option("-v", "--verbose", is_flag=True, help="Also which jobs share a pass.")
@version_option
def batch(
    ckpt: str,
    jobs: str,
    out_root: str,
    *,
    as_json: bool,
    quiet: bool,
    verbose: bool,
    dry_run: bool,
    **options: Any,
) -> None:
    """Merge many adapters into CKPT, each into a directory OUT_ROOT/NAME.

    JOBS is a directory whose sub-directories are adapters, or a JSONL file of {"adapter": PATH, "name"?:
    NAME, "scale"?, "dtype"?, "format"?, "repo"?}; relative paths start at the file. CKPT and adapters are
    directories or hub ids org/name[@revision]; CKPT may be auto, the base that all adapters name. All may be
    URLs s3://, gs://, az://. Each result is what `lorafuse convert` makes; the base is read and decoded once
    for many. One that is there already is skipped, and one that fails does not cost the others.

    \b
    Examples:
      lorafuse batch base-nf4 my-adapters merged-root
      lorafuse batch base-nf4 jobs.jsonl merged-root --dry-run
      lorafuse batch auto my-adapters merged-root --stream
    """
    spread = options["engine"] != "local" and not dry_run
    show = ShowBatch(as_json=as_json, quiet=quiet, verbose=verbose, spread=spread)
    with exit_codes("what is finished stays, and the same command goes on", as_json=as_json):
        refuse_nameless(out_root)
        refuse_passing(out_root)
        Settings(
            **{name: options[name] for name in ("device", "adapter_scale")}
        )  # refuses them, as click does the others
        check_base_options(options)
        if options["engine"] == "local":  # another one divides the jobs itself
            checked_share(options["index"], options["of"], os.environ)
        options["push_to_hub"] = push_option(options)
        pushes_of(listed_jobs(as_typed(jobs))[0], options["push_to_hub"])
        with uncollected(), hashing_meanwhile("" if dry_run or spread else ckpt):
            from lorafuse.batching.batch import batch as run

            gc.freeze()

        try:
            states = run(ckpt, jobs, out_root, dry_run=dry_run, on_event=show, **options)
        finally:
            show.close()
        n_failed = sum(state.state == "failed" for state in states)
        if n_failed:
            raise BatchError(failed_text(n_failed, len(states), dry_run=dry_run))


def failed_text(n_failed: int, of: int, *, dry_run: bool) -> str:
    """What became of all jobs, where some failed."""
    if dry_run:
        return f"{n_failed} of {of} jobs would fail; nothing was written."
    others = "the others are complete" if n_failed < of else "none is complete"
    return f"{n_failed} of {of} jobs failed; {others}."
