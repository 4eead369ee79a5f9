"""What people see: progress and warnings, plans, summaries."""

import json
import sys
from typing import Any

from lorafuse.cli.streams import say, tell
from lorafuse.errors import listed, shown
from lorafuse.events import Event
from lorafuse.receipt.in_words import percent, too_little_text
from lorafuse.receipt.read import kept_in_sum, sizes_in_sum


class Show:
    """Shows events: JSON lines on stdout, or warnings and progress on stderr."""

    def __init__(self, *, as_json: bool, quiet: bool) -> None:
        self._as_json, self._quiet = as_json, quiet
        self._bar: Any = None
        self._n_shards = self._n_done = 0

    def __call__(self, event: Event) -> None:
        if self._as_json and event["event"] != "progress":
            tell(json.dumps(event))
        if self._quiet:
            return
        if event["event"] == "warning":
            say(f"Warning: {event['message']}")
        elif event["event"] == "plan":
            self._n_shards = len(event["shards"])
            self._open_bar(event["nbytes"])
        elif event["event"] == "resumed":
            self._n_done = event["n_shards"]
            say(f"Going on after {self._n_done} of {self._n_shards} files that an earlier run finished.")
            if self._bar is not None:
                self._bar.update(event["nbytes"])
        elif event["event"] == "progress" and self._bar is not None:
            self._bar.update(event["nbytes"])
        elif event["event"] == "shard" and self._bar is None:
            self._n_done += 1
            say(f"{event['file']}: {event['nbytes'] / 1e6:,.1f} MB ({self._n_done} of {self._n_shards})")

    def _open_bar(self, nbytes: int) -> None:
        if sys.stderr.isatty():
            from tqdm import tqdm

            self._bar = tqdm(total=nbytes, unit="B", unit_scale=True, dynamic_ncols=True)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()


def plan_text(plan: dict[str, Any]) -> str:
    """The plan of a dry run for people."""
    weights = ", ".join(f"{n} {action}" for action, n in sorted(plan["weights"].items()))
    lines = [f"{plan['nbytes'] / 1e6:,.1f} MB in {len(plan['shards'])} shards; weights: {weights}"]
    if len(plan["formats"]) > 1:
        sizes = (f"{word} {nbytes / 1e6:,.1f} MB" for word, nbytes in plan["formats"].items())
        lines.append(f"--format: {', '.join(sizes)}")
    lines += [f"  {s['file']}  {s['nbytes'] / 1e6:,.1f} MB  {s['n_weights']} weights" for s in plan["shards"]]
    lines += [f"decoded from {shown(scheme)}: {n:,} parameters" for scheme, n in plan["decoded"].items()]
    lines.append(
        f"adapter tensors: {plan['adapter_tensors']['used']} used, {len(plan['adapter_tensors']['ignored'])} "
        "ignored"
    )
    lines += [
        f"  ignored {shown(key)}: {shown(reason)}"
        for key, reason in plan["adapter_tensors"]["ignored"].items()
    ]
    if plan["held_whole"]:
        lines.append(
            f"held whole in memory, one after the other, for a decomposition: {listed(plan['held_whole'])}"
        )
    lines += [f"config.json: {name} = {json.dumps(value)}" for name, value in plan["config_changes"].items()]
    return "\n".join(lines)


def weights_text(receipt: dict[str, Any]) -> str:
    """A line for each weight that is not copied or decoded."""
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
    return "\n".join(lines)


def summary_text(receipt: dict[str, Any], ckpt: str, adapters: list[str]) -> str:
    """One line: what was merged into what, how much of the update was kept, and what it cost; and one more
    where a weight keeps too little."""
    n_merged = sum(entry["action"] == "merged" for entry in receipt["tensors"].values())
    update = kept_in_sum(receipt["tensors"])
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
        f"{nbytes / 1e6:,.1f} MB{light} in {receipt['timing']['wall_s']:.1f} s, peak "
        f"{receipt['peak_rss'] / 1e6:,.0f} MB."
    )
    return "\n".join([line, *too_little_text(update)])
