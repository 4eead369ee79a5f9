"""The command line: the only package that prints or exits. Everything else is `pipeline.convert`."""

import gc
from collections.abc import Callable

import click

from lorafuse.cli.cmd_batch import batch
from lorafuse.cli.cmd_clean import clean
from lorafuse.cli.cmd_completion import completion
from lorafuse.cli.cmd_convert import convert
from lorafuse.cli.cmd_env import env
from lorafuse.cli.cmd_inspect import inspect
from lorafuse.cli.cmd_report import report
from lorafuse.cli.cmd_verify import verify
from lorafuse.cli.exits import INTERRUPTED, leave
from lorafuse.cli.options import CONTEXT, version_option
from lorafuse.cli.streams import make_usable

__all__ = [
    "batch",
    "clean",
    "completion",
    "convert",
    "env",
    "inspect",
    "lorafuse",
    "main",
    "main_convert",
    "report",
    "verify",
]


@click.group(context_settings=CONTEXT)
@version_option
def lorafuse() -> None:
    """Merge LoRA and QLoRA adapters into checkpoints without loading the model."""


lorafuse.add_command(convert)
lorafuse.add_command(batch)
lorafuse.add_command(inspect)
lorafuse.add_command(report)
lorafuse.add_command(verify)
lorafuse.add_command(clean)
lorafuse.add_command(env)
lorafuse.add_command(completion)


def _entry(command: click.Command, name: str) -> Callable[[], None]:
    def main() -> None:
        make_usable()
        try:
            command.main(prog_name=name)
        except SystemExit as e:
            if e.code in INTERRUPTED:
                leave(e.code)
            raise
        finally:
            gc.freeze()  # the process ends: what is left needs no search for garbage

    return main


main = _entry(lorafuse, "lorafuse")
main_convert = _entry(convert, "lorafuse-convert")
