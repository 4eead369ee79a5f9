"""`lorafuse report`."""

import os
from contextlib import suppress

import click

from lorafuse.cli.exits import exit_codes
from lorafuse.cli.options import CONTEXT
from lorafuse.cli.streams import tell
from lorafuse.errors import UsageError, shown
from lorafuse.files.names import REPORT, scheme_of, without_secrets

STDOUT = "-"


@click.command(context_settings=CONTEXT)
@click.argument("out_dir")
@click.option("-o", "--output", metavar="FILE.html",
              help=f"Where the page goes; - is stdout. Default: {REPORT} in OUT_DIR, of "
                   "a hub id in the current directory.")  # fmt: skip
def report(out_dir: str, output: str | None) -> None:
    """Write one HTML page about the result of a merge.

    What was merged into what, how much of the update each layer kept, the worst weights, sizes, hashes, and
    the commands that make and verify the result again. The page needs nothing beside itself: no network, no
    script. It is made from lorafuse_receipt.json; no weight is read. OUT_DIR is a directory or a hub id.

    \b
    Examples:
      lorafuse report merged
      lorafuse report merged -o merged.html
      lorafuse report org/name -o name.html
    """
    with exit_codes():
        from lorafuse.reporting import report as run  # which a merge does without

        file = _file(out_dir) if output is None else output
        if file != STDOUT and not file.endswith(".html"):
            raise UsageError(f"-o {shown(file)}: expected a name that ends with .html, or - for stdout.")
        if scheme_of(file):
            raise UsageError(f"-o {shown(without_secrets(file))}: expected a file of this machine.")
        page = run(out_dir)
        if file == STDOUT:
            click.echo(page, nl=False)
            return
        _write(file, page)
        tell(os.fsencode(file))


def _file(out_dir: str) -> str:
    """The page in OUT_DIR, where that is a directory of this machine, else in the current directory."""
    return os.path.join(out_dir, REPORT) if os.path.isdir(out_dir) else REPORT


def _write(file: str, page: str) -> None:
    """The page under its name once all of it is written. Raises OSError."""
    part = f"{file}.{os.getpid()}.part"
    try:
        with open(part, "x", encoding="utf-8") as f:
            f.write(page)
        os.replace(part, file)
    except BaseException:
        with suppress(OSError):
            os.unlink(part)
        raise
