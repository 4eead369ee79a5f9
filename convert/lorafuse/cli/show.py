"""What people see: progress and warnings, plans, summaries."""

import json
from typing import Any, cast

import click

from lorafuse.cli.plan_text import plan_text
from lorafuse.cli.progress import Progress, lasting
from lorafuse.cli.streams import styled
from lorafuse.errors import listed, shown, sized
from lorafuse.events import Event, PartEvent, PlanEvent, WorkersEvent
from lorafuse.receipt.in_words import ACTIONS, percent, too_little_text
from lorafuse.receipt.read import kept_in_sum, sizes_in_sum

FIGURES = "kept: the share of the update that is stored, 1 is all; noise: what rounding added, relative to it"


class Show:
    """Shows events: JSON lines or the plan of a dry run on stdout, warnings and progress on stderr."""

    def __init__(
        self, label: str, *, as_json: bool, quiet: bool, dry_run: bool = False, verbose: bool = False
    ) -> None:
        self._label, self._as_json, self._quiet = label, as_json, quiet
        self._dry_run, self._verbose = dry_run, verbose
        self._progress = Progress(quiet=quiet)
        self._n_shards = self._n_done = 0
        self.url, self.kept_here = "", True

    def __call__(self, event: Event) -> None:
        if self._as_json and event["event"] not in ("progress", "fetching"):
            self._progress.tell(json.dumps(event))
        if event["event"] == "part":
            self._say(part_text(event))
        elif event["event"] == "workers":
            self._say(workers_text(event))
        elif event["event"] == "done":
            self.url, self.kept_here = event.get("url", ""), event.get("kept_here", True)
        elif event["event"] == "plan":
            self._plan(event)
        elif event["event"] == "resumed":
            self._n_done = event["n_shards"]
            self._say(
                f"Going on after {self._n_done} of {self._n_shards} files that an earlier run finished."
            )
            self._progress.skip(event["nbytes"])
        elif event["event"] == "progress":
            self._progress.advance(event["nbytes"])
        elif event["event"] == "warning":
            self._say(warning_text(event["message"]))
        elif event["event"] == "fetching":
            self._progress.wait(event["file"], event["nbytes"], event["of_nbytes"])
        elif event["event"] == "fetched" and not self._progress.is_bar:
            self._say(f"Fetched {event['file']}: {sized(event['nbytes'])}")
        elif event["event"] == "shard":
            self._n_done += 1
            if not self._progress.is_bar:
                size = sized(event["nbytes"])
                self._say(f"{event['file']}: {size} ({self._n_done} of {self._n_shards})")

    def _plan(self, event: PlanEvent) -> None:
        for note in event.get("notes", []):
            self._say(f"Note: {note}")
        self._n_shards = len(event["shards"])
        if not self._dry_run:
            self._progress.begin(self._label, event["nbytes"])
        elif not self._as_json:  # what was asked for: an error, if it cannot be printed
            click.echo(plan_text(cast(dict[str, Any], event), verbose=self._verbose))

    def _say(self, text: str) -> None:
        if not self._quiet:
            self._progress.say(text)

    def close(self) -> None:
        """Nothing more comes, at the end or after an error."""
        self._progress.end()


def part_text(event: PartEvent) -> str:
    """What a worker has made, and what comes after it."""
    n = event["n_shards"]
    return (
        f"Part {event['index']} of {event['of']}: {n} file{'' if n == 1 else 's'} of weights, "
        f"{sized(event['nbytes'])} in {event['wall_s']:.1f} s, peak {sized(event['peak_rss'])}. When all "
        "parts are made, the same command with --commit gives the result its name."
    )


def workers_text(event: WorkersEvent) -> str:
    """A table of what each machine did."""
    rows = [("worker", "tasks", "written", "busy")]
    for worker in event["workers"]:
        sizes = (sized(worker["nbytes"]), lasting(worker["busy_s"]))
        rows.append((shown(worker["host"]), f"{worker['n_tasks']:,}", *sizes))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
        "  ".join(cell.ljust(width) if i == 0 else cell.rjust(width) for i, (cell, width) in enumerate(cells))
        for cells in (zip(row, widths, strict=True) for row in rows)
    ]
    if n := event["n_again"]:
        lines.append(f"{n} {'task was' if n == 1 else 'tasks were'} begun again, since a process had ended.")
    return "\n".join(lines)


def warning_text(message: str) -> str:
    return f"{styled('Warning:', 'yellow')} {message}"


def weights_text(receipt: dict[str, Any]) -> str:
    """A line for each weight that is not copied or decoded, and what the words mean."""
    lines = []
    for name, entry in receipt["tensors"].items():
        if entry["action"] in ("merged", "replaced", "added"):
            figures = [
                f"{k} {entry[k]:.4g}"
                for k in ("rank", "scale", "delta_rel", "kept", "noise", "changed", "clipped")
                if entry.get(k) is not None
            ]
            if "updates" in entry:
                figures.insert(0, f"updates {len(entry['updates'])}")
            lines.append(f"{entry['action']:8} {shown(name)}  {'  '.join(figures)}")
    words = sorted({entry["action"] for entry in receipt["tensors"].values()} & ACTIONS.keys())
    lines.append("; ".join(f"{word}: {ACTIONS[word]}" for word in words) + f"; {FIGURES}.")
    return "\n".join(lines)


def summary_text(receipt: dict[str, Any], ckpt: str, adapters: list[str]) -> str:
    """One line: what was merged into what, how much of the update was kept, and what it cost; and one more
    where a weight keeps too little."""
    n_merged = sum(entry["action"] == "merged" for entry in receipt["tensors"].values())
    update = kept_in_sum(receipt["tensors"], receipt["settings"])
    share = (
        ""
        if update["least"] is None
        else f", {percent(update['least'])} of the update kept where it is least"
    )
    nbytes = sum(output["size"] for output in receipt["outputs"])
    sizes = sizes_in_sum(receipt["tensors"])
    light = ""
    if sizes["nbytes"] < sizes["dense_nbytes"]:
        of_dense = sizes["nbytes"] / sizes["dense_nbytes"]
        light = f", {of_dense:.0%} of the dense result, {sizes['bits_per_weight']:.1f} bits a weight,"
    line = (
        f"Merged {listed(adapters)} into {shown(ckpt)} ({shown(receipt['base_semantics'])}): "
        f"{n_merged} of {len(receipt['tensors'])} weights updated{share}; "
        f"{sized(nbytes)}{light} in {receipt['timing']['wall_s']:.1f} s, peak "
        f"{sized(receipt['peak_rss'])}."
    )
    return "\n".join([line, *too_little_text(update)])
