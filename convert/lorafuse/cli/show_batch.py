"""What people see of a batch: a line for each job, and the sum."""

import json
import os
from collections import Counter
from typing import Any, cast

import click

from lorafuse.cli.plan_text import changes_text, disk_text, inputs_text, n_changed_text, time_text
from lorafuse.cli.progress import Progress, lasting
from lorafuse.cli.show import warning_text, workers_text
from lorafuse.cli.streams import styled
from lorafuse.errors import shown, sized
from lorafuse.events import Event, JobEvent, PassEvent, PlanEvent, ResumedEvent, TotalEvent
from lorafuse.receipt.in_words import percent, too_little_text

COLOURS = {"done": "green", "failed": "red", "skipped": "cyan"}


class ShowBatch:
    """Shows events: JSON lines, or finished results and plans, one a line, on stdout; warnings, progress and
    what became of each job on stderr."""

    def __init__(self, *, as_json: bool, quiet: bool, verbose: bool, spread: bool = False) -> None:
        self._as_json, self._quiet, self._verbose = as_json, quiet, verbose
        self._spread = spread  # passes run beside each other, and are one task
        self._plans: dict[str, PlanEvent] = {}
        self._n_passes, self._noted, self._n_planned = 0, False, 0
        self._progress = Progress(quiet=quiet)

    def __call__(self, event: Event) -> None:
        if self._as_json and event["event"] not in ("progress", "fetching"):
            self._progress.tell(json.dumps(event))
        if event["event"] == "warning":
            self._warn(event["message"], event.get("job"))
        elif event["event"] == "plan":
            self._plans[event["job"]] = event
            self._note(event)
        elif event["event"] == "pass":
            self._pass(event)
        elif event["event"] == "progress":
            self._progress.advance(event["nbytes"])
        elif event["event"] == "fetching":
            self._progress.wait(event["file"], event["nbytes"], event["of_nbytes"])
        elif event["event"] == "fetched" and not self._progress.is_bar:
            self._say(f"Fetched {event['file']}: {sized(event['nbytes'])}")
        elif event["event"] == "resumed":
            self._resumed(event)
        elif event["event"] == "job":
            self._job(event)
        elif event["event"] == "workers":
            self._say(workers_text(event))
        elif event["event"] == "total":
            self._total(event)

    def _note(self, event: PlanEvent) -> None:
        """The first of a batch: its adapters mostly come from one training."""
        if not self._noted:
            for note in event.get("notes", [])[:1]:
                self._say(f"Note: {note}")
                self._noted = True

    def _pass(self, event: PassEvent) -> None:
        self._n_passes += 1
        names = event["jobs"]
        if self._verbose:
            jobs = f"{len(names)} jobs, {sized(event['nbytes'])}: {' '.join(map(shown, names))}"
            self._say(f"Pass {self._n_passes}: {jobs}")
        if "disk" not in self._plans[names[0]]:  # no dry run
            if self._spread:
                self._progress.grow("merging", event["nbytes"])
            else:
                self._progress.begin(f"pass {self._n_passes}", event["nbytes"])

    def _resumed(self, event: ResumedEvent) -> None:
        done = f"{event['n_shards']} of {len(self._plans[event['job']]['shards'])} files"
        self._say(f"{shown(event['job'])}: going on after {done} that an earlier call finished.")
        self._progress.skip(event["nbytes"])

    def _job(self, event: JobEvent) -> None:
        name, state = event["job"], event["state"]
        plan = self._plans.pop(name, None)
        if state == "planned" and plan:
            if not self._as_json:
                self._tell_planned(name, cast(dict[str, Any], plan))
        elif state == "failed":  # with --quiet too
            told = f"failed with exit code {event['exit_code']}: {event['error']}"
            self._progress.say(f"{shown(name)}: {_coloured(told, state)}")
        elif state == "skipped":
            self._say(f"{shown(name)}: {_coloured('skipped, its result is there already', state)}")
        else:
            self._done(event)
        if state in ("done", "skipped") and not self._as_json:
            self._progress.tell(os.fsencode(event["out_dir"]))

    def _tell_planned(self, name: str, plan: dict[str, Any]) -> None:
        """A job of a dry run, in a line; before the first, the base of all."""
        if not self._n_planned:
            self._progress.tell(f"base: {dict(inputs_text(plan))['base']}")
        self._n_planned += 1
        changes = changes_text(plan) if self._verbose else n_changed_text(plan)
        parts = [f"changes {changes}", f"writes {sized(plan['nbytes'])}", f"disk {disk_text(plan['disk'])}"]
        parts += [time_text(plan["estimate"], brief=True), f"pass {self._n_passes}"]
        parts += [f"to {plan['push_to_hub']}"] if "push_to_hub" in plan else []
        self._progress.tell(f"{shown(name)}: {'; '.join(parts)}")

    def _done(self, event: JobEvent) -> None:
        update = event["update"]
        kept = (
            f", {percent(update['kept'])} of the update kept, {percent(update['least'])} where it is least"
            if update["kept"] is not None
            else ""
        )
        told = f"done{kept}; {sized(event['nbytes'])} in {event['wall_s']:.1f} s"
        if "url" in event:
            told += f"; pushed: {event['url']}"
        self._say(f"{shown(event['job'])}: {_coloured(told, 'done')}")
        for line in too_little_text(update):
            self._warn(line, event["job"])

    def _total(self, event: TotalEvent) -> None:
        states = event["states"]
        told = ", ".join(f"{n:,} {state}" for state, n in sorted(Counter(states).items()))
        self._progress.end()
        if "disk" in event:
            parts = [told, f"writes {sized(event['nbytes'])}", f"disk {disk_text(dict(event['disk']))}"]
            line = "; ".join([*parts, time_text(event["estimate"], brief=True)])
            if not self._as_json:
                click.echo(f"In all: {line}")
        else:
            made = f"; {sized(event['nbytes'])} in {lasting(event['wall_s'])}" if event["nbytes"] else ""
            self._say(f"In all: {told}{made}.")

    def _warn(self, message: str, job: str | None) -> None:
        self._say(warning_text(f"{shown(job)}: {message}" if job else message))

    def _say(self, text: str) -> None:
        if not self._quiet:
            self._progress.say(text)

    def close(self) -> None:
        """Nothing more comes, at the end or after an error."""
        self._progress.end()


def _coloured(text: str, state: str) -> str:
    """The first word stands out."""
    word, rest = text[: len(state)], text[len(state) :]
    return styled(word, COLOURS[state]) + rest
