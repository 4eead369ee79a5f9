"""Kinds of options that commands share."""

from typing import Any

import click
from click.core import ParameterSource

from lorafuse.errors import UsageError
from lorafuse.settings import parse_nbytes, parse_weighted

CONTEXT = {"help_option_names": ["-h", "--help"], "max_content_width": 100}


class Size(click.ParamType[str]):
    """A number of bytes with a decimal unit."""

    name = "size"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        try:
            parse_nbytes(value)
        except UsageError as e:
            self.fail(str(e), param, ctx)
        return str(value)


def given(*names: str) -> list[str]:
    """Those of the options that stand in the command line, whatever their values."""
    context = click.get_current_context()
    return [name for name in names if context.get_parameter_source(name) is ParameterSource.COMMANDLINE]


def weighted(ctx: click.Context, param: click.Parameter, values: tuple[str, ...]) -> list[tuple[str, float]]:
    """(path, weight) of each --adapter."""
    try:
        return [parse_weighted(value) for value in values]
    except UsageError as e:
        raise click.BadParameter(str(e), ctx, param) from None
