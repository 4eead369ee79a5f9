"""`lorafuse verify`."""

import json
from typing import Any

import click

from lorafuse.cli.exits import exit_codes
from lorafuse.cli.options import CONTEXT, Size
from lorafuse.cli.show import Show
from lorafuse.errors import shown


@click.command(context_settings=CONTEXT)
@click.argument("out_dir")
@click.option("--ckpt", help="The checkpoint that was merged into: make the merge again and compare every byte.")
@click.option("--adapter", "adapters", multiple=True, help="The adapter that was merged; repeated when there were several.")
@click.option("--sample", type=click.IntRange(min=1), default=None, metavar="N", help="Compare N weights instead of all.")
@click.option("--device", default="auto", show_default=True, metavar="auto|cpu|cuda[:N]", help="As of the merge.")
@click.option("--memory-limit", type=Size(), default="100MB", show_default=True, help="As of the merge.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object on stdout instead of text.")
@click.option("-q", "--quiet", is_flag=True, help="Nothing on stderr but errors.")
def verify(out_dir: str, *, as_json: bool, quiet: bool, sample: int | None, **options: Any) -> None:
    """Check a merged directory against its receipt.

    Sizes and hashes of all files, headers, index and config; with --ckpt and --adapter the merge is made again, and compared
    instead of written. Ends with 8 at the first difference. OUT_DIR is not changed.
    """
    show = Show(as_json=False, quiet=quiet)
    with exit_codes():
        from lorafuse.audit import verify as run  # imports torch

        checked = run(out_dir, sample=sample or 0, on_event=show, **options)
        show.close()
        if as_json:
            click.echo(json.dumps({"event": "verified", "out_dir": out_dir, **checked}))
            return
        click.echo(f"{shown(out_dir)}: {checked['files']} files, {checked['nbytes'] / 1e6:,.1f} MB, are what the receipt says.")
        if checked["weights"]:
            click.echo(f"{checked['weights']} weights are what the inputs make.")
