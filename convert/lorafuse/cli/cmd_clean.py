"""`lorafuse clean`: remove what a run that was cut off left."""

import click

from lorafuse.cli.exits import exit_codes
from lorafuse.cli.options import CONTEXT, version_option
from lorafuse.cli.streams import say
from lorafuse.errors import shown, sized
from lorafuse.files.local_folder import as_typed
from lorafuse.outdir.apart import refuse_nameless


@click.command(context_settings=CONTEXT)
@click.argument("out_dir")
@click.option("--dry-run", is_flag=True, help="Say what there is, remove nothing.")
@version_option
def clean(out_dir: str, *, dry_run: bool) -> None:
    """Remove what runs for OUT_DIR that were cut off left for the next.

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
        nbytes = cleaning.left_nbytes(name)
        if not nbytes:
            say(f"{shown(name)}: nothing is left of earlier runs.")
            return
        if not dry_run:
            cleaning.clean(name)
        say(f"{shown(name)}: {sized(nbytes)} of earlier runs {'are left' if dry_run else 'are removed'}.")
