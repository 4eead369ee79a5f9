"""`lorafuse clean`: remove what a run that was cut off left."""

import json
from dataclasses import asdict
from typing import TYPE_CHECKING

import click

from lorafuse.cli.exits import exit_codes
from lorafuse.cli.options import CONTEXT, version_option
from lorafuse.cli.streams import say, tell
from lorafuse.errors import shown, sized
from lorafuse.files.local_folder import as_typed
from lorafuse.outdir.apart import refuse_nameless

if TYPE_CHECKING:
    from lorafuse.outdir.out_dir import Left


@click.command(context_settings=CONTEXT)
@click.argument("out_dir")
@click.option("--dry-run", is_flag=True, help="Say what there is, remove nothing.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object on stdout instead of text.")
@version_option
def clean(out_dir: str, *, dry_run: bool, as_json: bool) -> None:
    """Remove what runs for OUT_DIR that were cut off left for the next, and say what it was: files of weights
    that are finished, files that are not, journals, and locks with their age and who has them.

    OUT_DIR is a directory or the URL of an object store. A result that is there stays. Needed only where the
    command that was cut off is not given again: that one goes on from what is left, and removes it.

    \b
    Examples:
      lorafuse clean merged
      lorafuse clean s3://models/merged --dry-run
    """
    with exit_codes("the rest is removed by the same command"):
        refuse_nameless(out_dir)
        from lorafuse.outdir import clean as cleaning

        name = as_typed(out_dir)
        left = cleaning.left(name)
        if left and not dry_run:
            cleaning.clean(name)
        if as_json:
            pieces = [asdict(piece) for piece in left]
            tell(json.dumps({"out_dir": name, "removed": not dry_run, "left": pieces}))
        else:
            say("\n".join([*map(_line, left), _in_sum(name, left, dry_run=dry_run)]))


def _line(piece: "Left") -> str:
    said = f"{ago(piece.age_s)}, {piece.holder}" if piece.holder else ago(piece.age_s)
    return f"  {piece.what:<10} {sized(piece.nbytes):>10}  {shown(piece.name)}  ({said})"


def _in_sum(name: str, left: list["Left"], *, dry_run: bool) -> str:
    if not left:
        return f"{shown(name)}: nothing is left of earlier runs."
    nbytes = sum(piece.nbytes for piece in left)
    return f"{shown(name)}: {sized(nbytes)} of earlier runs {'are left' if dry_run else 'are removed'}."


def ago(seconds: float) -> str:
    """A time in the past, in words."""
    units = (("day", 86400), ("hour", 3600), ("minute", 60), ("second", 1))
    unit, length = next((unit for unit in units if seconds >= unit[1]), units[-1])
    n = int(seconds // length)
    return f"{n} {unit}{'' if n == 1 else 's'} ago"
