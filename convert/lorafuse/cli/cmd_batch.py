"""`lorafuse batch`: many adapters, one pass over the base."""

import gc
import json
import os
import sys
from pathlib import Path
from typing import Any

import click

from lorafuse.batching.jobs import checked_share, read_jobs
from lorafuse.cli.exits import exit_codes
from lorafuse.cli.options import (
    CONTEXT,
    base_options,
    check_base_options,
    output_options,
    run_options,
    version_option,
)
from lorafuse.cli.streams import say, tell
from lorafuse.errors import BatchError, shown
from lorafuse.events import Event, JobEvent, PassEvent, PlanEvent, ResumedEvent
from lorafuse.files.local_folder import as_typed
from lorafuse.files.sharing import SHARE_CHOICES
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
@click.option(
    "--allow-nonfinite",
    is_flag=True,
    help="Keep values of the base that are not finite, instead of refusing them.",
)
@click.option("--overwrite", is_flag=True,
              help="Replace results that are there but not what this call makes, once the new ones are "
                   "complete.")  # fmt: skip
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

    JOBS is a directory whose sub-directories are adapters, or a JSONL file of {"adapter": PATH, "name": NAME,
    "scale"?, "dtype"?, "format"?}; relative paths start at the file. CKPT and adapters are directories or hub
    ids org/name[@revision]. Each result is what `lorafuse convert` makes; the base is read and decoded once
    for many. One that is there already is skipped, and one that fails does not cost the others.
    """
    show = ShowBatch(as_json=as_json, quiet=quiet, verbose=verbose)
    with exit_codes("what is finished stays, and the same command goes on"):
        refuse_nameless(out_root)
        Settings(
            **{name: options[name] for name in ("device", "adapter_scale")}
        )  # refuses them, as click does the others
        check_base_options(options)
        checked_share(options["index"], options["of"], os.environ)
        read_jobs(Path(as_typed(jobs)))
        gc.disable()  # as for convert
        from lorafuse.batching.batch import batch as run

        gc.freeze()
        gc.enable()

        try:
            states = run(ckpt, jobs, out_root, dry_run=dry_run, on_event=show, **options)
        finally:
            show.close()
        n_failed = sum(state.state == "failed" for state in states)
        if n_failed:
            raise BatchError(f"{n_failed} of {len(states)} jobs failed; the others are complete.")


class ShowBatch:
    """Shows events: JSON lines, or finished results, one a line, on stdout; warnings, progress and the table
    of jobs on stderr."""

    def __init__(self, *, as_json: bool, quiet: bool, verbose: bool) -> None:
        self._as_json, self._quiet, self._verbose = as_json, quiet, verbose
        self._plans: dict[str, PlanEvent] = {}
        self._n_passes, self._noted = 0, False
        self._rows: list[tuple[str, str, str]] = []
        self._bar: Any = None

    def __call__(self, event: Event) -> None:
        if self._as_json and event["event"] != "progress":
            tell(json.dumps(event))
        if event["event"] == "warning" and not self._quiet:
            whose = f"{shown(event['job'])}: " if "job" in event else ""
            say(f"Warning: {whose}{event['message']}")
        elif event["event"] == "plan":
            self._plans[event["job"]] = event
            self._note(event)
        elif event["event"] == "pass":
            self._pass(event)
        elif event["event"] == "progress" and self._bar is not None:
            self._bar.update(event["nbytes"])
        elif event["event"] == "resumed":
            self._resumed(event)
        elif event["event"] == "job":
            self._job(event)

    def _note(self, event: PlanEvent) -> None:
        """The first of a batch: its adapters mostly come from one training."""
        if not self._quiet and not self._noted:
            for note in event.get("notes", [])[:1]:
                say(f"Note: {note}")
                self._noted = True

    def _pass(self, event: PassEvent) -> None:
        self._n_passes += 1
        names = event["jobs"]
        nbytes = sum(self._plans[name]["nbytes"] for name in names)
        if self._verbose and not self._quiet:
            say(
                f"Pass {self._n_passes}: {len(names)} jobs, {nbytes / 1e6:,.1f} MB: "
                f"{' '.join(map(shown, names))}"
            )
        if sys.stderr.isatty() and not self._quiet:
            from tqdm import tqdm

            self.close_bar()
            self._bar = tqdm(
                total=nbytes, unit="B", unit_scale=True, dynamic_ncols=True, desc=f"pass {self._n_passes}"
            )

    def _resumed(self, event: ResumedEvent) -> None:
        if not self._quiet:
            done = f"{event['n_shards']} of {len(self._plans[event['job']]['shards'])} files"
            say(f"{shown(event['job'])}: going on after {done} that an earlier call finished.")
        if self._bar is not None:
            self._bar.update(event["nbytes"])

    def _job(self, event: JobEvent) -> None:
        name, state = event["job"], event["state"]
        plan = self._plans.pop(name, None)
        if state == "planned" and plan:
            note = f"pass {self._n_passes}, {plan['nbytes'] / 1e6:,.1f} MB in {len(plan['shards'])} shards"
            if not self._as_json:
                tell(f"{shown(name)}: {note}")
        elif state == "failed":
            note = f"exit code {event['exit_code']}: {event['error']}"
            say(f"{shown(name)}: {event['error']}")
        else:
            note = f"{event['nbytes'] / 1e6:,.1f} MB" if state == "done" else "was there already"
            if not self._as_json:
                tell(os.fsencode(event["out_dir"]))
        self._rows.append((shown(name), state, note))

    def close_bar(self) -> None:
        if self._bar is not None:
            self._bar.close()
            self._bar = None

    def close(self) -> None:
        """The table of jobs."""
        self.close_bar()
        width = max((len(name) for name, _, _ in self._rows), default=0)
        if not self._quiet:
            for name, state, note in self._rows:
                say(f"{name:{width}}  {state:7}  {note}")
