"""Options that commands share, and kinds of options."""

from collections.abc import Callable
from typing import Any, TypeVar

import click
from click.core import ParameterSource

from lorafuse._version import __version__
from lorafuse.arithmetic import kernel
from lorafuse.errors import UsageError
from lorafuse.settings import (
    BASE_QUANT_CHOICES,
    DTYPE_CHOICES,
    FORMAT_CHOICES,
    ROUNDING_CHOICES,
    Push,
    dtype_named,
    parse_nbytes,
    parse_weighted,
)
from lorafuse.trained_base.options import BASE_OPTIONS, chosen_quants, refuse_beside_file

F = TypeVar("F", bound=Callable[..., Any])
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


def _say_version(ctx: click.Context, _: click.Parameter, wanted: bool) -> None:
    if wanted and not ctx.resilient_parsing:
        try:
            click.echo(f"lorafuse, version {__version__}\ncompiled kernel: {kernel.described()}")
        except UsageError as e:
            raise click.UsageError(str(e)) from None
        ctx.exit()


version_option = click.option(
    "--version", is_flag=True, expose_value=False, is_eager=True, callback=_say_version,
    help="Show the version and exit.",
)  # fmt: skip


_DTYPES = click.Choice(DTYPE_CHOICES)


class DType(click.ParamType[str]):
    """One of DTYPE_CHOICES, or a short name of it."""

    name = f"[{'|'.join(DTYPE_CHOICES)}]"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        return str(_DTYPES.convert(dtype_named(value), param, ctx))


def given(*names: str) -> list[str]:
    """The options, of parameters of these names, that stand in the command line, whatever their values."""
    context = click.get_current_context()
    typed = [name for name in names if context.get_parameter_source(name) is ParameterSource.COMMANDLINE]
    return [f"--{name.replace('_', '-')}" for name in typed]


def weighted(ctx: click.Context, param: click.Parameter, values: tuple[str, ...]) -> list[tuple[str, float]]:
    """(path, weight) of each --adapter."""
    try:
        return [parse_weighted(value) for value in values]
    except UsageError as e:
        raise click.BadParameter(str(e), ctx, param) from None


def _all(*options: Callable[[F], F]) -> Callable[[F], F]:
    """Several options as one decorator, in the order of the help."""

    def decorate(command: F) -> F:
        for option in reversed(options):
            command = option(command)
        return command

    return decorate


# What decides the bytes that are written, and what it costs.
output_options = _all(
    click.option("--dtype", type=DType(), metavar=DType.name, default="auto", show_default=True,
                 help="dtype of the output's floating-point weights; auto keeps, per weight, the dtype it "
                      "decodes to. bf16, fp16 and fp32 are known too."),
    click.option("--format", type=click.Choice(FORMAT_CHOICES), default="dense", show_default=True,
                 help="How weights are stored: in full precision (dense); all as the base stores them, what "
                      "changes rounded without bias onto the base's own grid (base); the same, but value "
                      "projections that change in full precision (light); all that changes in full "
                      "precision and the rest as the base stores it (mixed); a base in full precision "
                      "quantized as bitsandbytes does on loading (nf4, fp4, int8); or all linear layers "
                      "anew as compressed-tensors does, for vLLM: FP8 with a scale for each row, 8-bit "
                      "integers in groups of 32, 4-bit in groups of 128 or 32."),
    click.option("--keep-dense", multiple=True, metavar="PATTERN",
                 help="Changed weights of modules of this name stay in full precision in a --format of "
                      "quantized weights, '*.down_proj' for example; with fp8, w8a16 and w4a16 also "
                      "unchanged ones, and what vLLM joins with them; repeatable."),
    click.option("--rounding", type=click.Choice(ROUNDING_CHOICES), default=None,
                 help="How a quantized format rounds what changes; if not given, unbiased where the weight "
                      "sat on the grid."),
    click.option("--max-shard-size", type=Size(), default="5GB", show_default=True,
                 help="Largest output file, in decimal units; a larger tensor gets a file of its own."),
    click.option("--device", default="auto", show_default=True, metavar="auto|cpu|cuda[:N]",
                 help="Where tiles are computed; auto is a GPU where that is faster."),
    click.option("--memory-limit", type=Size(), default="100MB", show_default=True,
                 help="Bound on what the process holds beyond `import torch`."),
)  # fmt: skip
# Who does the work.
engine_options = _all(
    click.option("--engine", type=click.Choice(["local", "ray"]), default="local", show_default=True,
                 help="Who does the work: this process, or processes that Ray starts, on this machine or in "
                      "a cluster; pip install 'lorafuse[ray]'."),
    click.option("--address", metavar="ADDRESS",
                 help="The cluster of --engine ray: HOST:PORT, or auto for that of this machine. Default: "
                      "RAY_ADDRESS, else Ray is started here."),
)  # fmt: skip
# What is printed, and whether anything is written.
run_options = _all(
    click.option("--dry-run", is_flag=True, help="Print the plan, write nothing."),
    click.option("--json", "as_json", is_flag=True, help="One JSON object a line on stdout instead of text."),
    click.option("-q", "--quiet", is_flag=True, help="Nothing on stderr but errors."),
)
# How training quantized the base.
base_options = _all(
    click.option("--base-quant", type=click.Choice(BASE_QUANT_CHOICES), default="none", show_default=True,
                 help="Treat a full-precision CKPT as training saw it: quantized, and dequantized, as "
                      "bitsandbytes does."),
    click.option("--double-quant/--no-double-quant", default=True, show_default=True,
                 help="Whether the scales of nf4 and fp4 are quantized as well, by training or by --format."),
    click.option("--quant-blocksize", type=int, default=64, show_default=True,
                 help="Elements to a scale of nf4 and fp4."),
    click.option("--quant-skip", multiple=True, metavar="NAME",
                 help="Modules that are not quantized, by training or by --format, instead of those that "
                      "transformers skips; repeatable."),
    click.option("--quant-experts", is_flag=True,
                 help="Training quantized the experts of a mixture too: transformers 4 did, 5 does not."),
    click.option("--base-quant-from", metavar="FILE",
                 help="Take --base-quant and its details from a config.json, BitsAndBytesConfig, training "
                      "config of axolotl, LLaMA-Factory or TRL, or README.md."),
)  # fmt: skip


def push_option(options: dict[str, Any]) -> Push | None:
    """--push-to-hub and its details, which are taken out of the options. Raises UsageError."""
    names = ("private", "revision", "create_pr")
    details = {name: options.pop(name) for name in names if name in options}
    repo = options["push_to_hub"]
    if repo is None and (without := given(*details)):
        raise UsageError(f"{without[0]} goes with --push-to-hub REPO.")
    return None if repo is None else Push(repo, **details)


def check_base_options(options: dict[str, Any]) -> None:
    """Refuse base_options that say nothing or contradict each other, before torch is imported. Raises
    UsageError."""
    if options["base_quant_from"] is not None:
        refuse_beside_file(given("base_quant", "double_quant", "quant_skip"))
    chosen_quants(options["format"], **{name: options[name] for name in BASE_OPTIONS})
