"""`lorafuse verify`."""

import json
from typing import Any

import click

from lorafuse.cli.exits import exit_codes
from lorafuse.cli.options import CONTEXT, Size
from lorafuse.cli.show import Show
from lorafuse.cli.streams import tell
from lorafuse.errors import ResultError, shown, sized
from lorafuse.files.early_hashing import hashing_meanwhile
from lorafuse.files.uncollected import uncollected
from lorafuse.verification.relations import EXPLAINED, GOOD, what_is_wrong

N_WORST = 20
FIGURES = ("scale", "kept", "noise", "delta_rel", "fits")


@click.command(context_settings=CONTEXT)
@click.argument("out_dir")
@click.option(
    "--ckpt",
    help="The checkpoint that was merged into: make the merge again and compare every byte. auto is the base "
    "that the adapter's config names.",
)
@click.option(
    "--adapter",
    "adapters",
    multiple=True,
    help="The adapter that was merged; repeated when there were several.",
)
@click.option(
    "--sample",
    type=click.IntRange(min=1),
    default=None,
    metavar="N",
    help="Compare N weights instead of all.",
)
@click.option(
    "--device", default="auto", show_default=True, metavar="auto|cpu|cuda[:N]", help="As of the merge."
)
@click.option("--memory-limit", type=Size(), default="100MB", show_default=True, help="As of the merge.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object on stdout instead of text.")
@click.option("-q", "--quiet", is_flag=True, help="Nothing on stderr but errors.")
def verify(out_dir: str, *, as_json: bool, quiet: bool, sample: int | None, **options: Any) -> None:
    """Check a merged directory against its receipt.

    OUT_DIR is a directory or a hub id org/name[@revision]. Sizes and hashes of all files, headers, index and
    config are compared; with --ckpt and --adapter the merge is made again, and compared instead of written.
    Ends with 8 at the first difference. A directory that another tool made has no receipt: --ckpt and
    --adapter then show how each of its weights relates to the base and to base + update. OUT_DIR is not
    changed.

    \b
    Examples:
      lorafuse verify merged
      lorafuse verify merged --ckpt base-nf4 --adapter my-adapter
      lorafuse verify me/merged --ckpt auto --adapter org/tuned
    """
    show = Show("comparing", as_json=False, quiet=quiet)
    with exit_codes():
        with uncollected(), hashing_meanwhile(out_dir):  # what importing torch makes stays
            from lorafuse.verification.verify import verify as run

        try:
            checked = run(out_dir, sample=sample or 0, on_event=show, **options)
        finally:
            show.close()
        if as_json:
            tell(json.dumps({"event": "verified", "out_dir": out_dir, **checked}))
        else:
            tell(related_text(checked) if "related" in checked else verified_text(out_dir, checked))
        if wrong := what_is_wrong(checked.get("relations", {})):
            raise ResultError(f"{shown(out_dir)}: {wrong}")


def verified_text(out_dir: str, checked: dict[str, Any]) -> str:
    text = (
        f"{shown(out_dir)}: {checked['files']} files, {sized(checked['nbytes'])}, are what the receipt says."
    )
    return text + (f"\n{checked['weights']} weights are what the inputs make." if checked["weights"] else "")


def related_text(checked: dict[str, Any]) -> str:
    """How many weights are what, then the worst of those that should have changed."""
    width = max(14, *map(len, checked["relations"]))
    lines = [f"{n:6} {kind:{width}} {EXPLAINED[kind]}" for kind, n in checked["relations"].items()]
    updated = {
        name: facts
        for name, facts in checked["related"].items()
        if facts["relation"] not in GOOD or "kept" in facts
    }
    for name, facts in list(updated.items())[:N_WORST]:
        figures = [f"{k} {facts[k]:.3g}" for k in FIGURES if facts.get(k) is not None]
        doubt = ["likely, not certain"] if facts["sure"] == "likely" else []
        words = [f"{facts['relation']:{width}} {shown(name)}", *figures, *doubt]
        lines.append("  ".join(words))
    if len(updated) > N_WORST:
        lines.append(f"and {len(updated) - N_WORST} more; --json lists them.")
    return "\n".join(lines)
