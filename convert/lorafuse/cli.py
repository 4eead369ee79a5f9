"""The command line: options, progress, exit codes. The only file that prints or exits; everything else is `pipeline.convert`."""

import gc
import json
import os
import signal
import sys
from collections.abc import Callable
from typing import Any, NoReturn

import click

from lorafuse._version import __version__
from lorafuse.errors import LorafuseError, UsageError, listed, shown
from lorafuse.settings import DTYPE_CHOICES, Settings, parse_nbytes, parse_weighted

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


def weighted(ctx: click.Context, param: click.Parameter, values: tuple[str, ...]) -> list[tuple[str, float]]:
    """(path, weight) of each --adapter."""
    try:
        return [parse_weighted(value) for value in values]
    except UsageError as e:
        raise click.BadParameter(str(e), ctx, param) from None


class Terminated(BaseException):
    """SIGTERM, as an exception, so that staging is cleaned up."""


@click.group(context_settings=CONTEXT)
@click.version_option(__version__, prog_name="lorafuse")
def lorafuse() -> None:
    """Merge LoRA and QLoRA adapters into checkpoints without loading the model."""


@lorafuse.command(context_settings=CONTEXT)
@click.argument("ckpt")
@click.argument("adapter")
@click.argument("out_dir")
@click.option("--dtype", type=click.Choice(DTYPE_CHOICES), default="auto", show_default=True,
              help="dtype of the output's floating-point weights; auto keeps, per weight, the dtype it decodes to.")  # fmt: skip
@click.option("--max-shard-size", type=Size(), default="5GB", show_default=True,
              help="Largest output file, in decimal units; a larger tensor gets a file of its own.")  # fmt: skip
@click.option("--device", default="auto", show_default=True, metavar="auto|cpu|cuda[:N]",
              help="Where tiles are computed; auto is CUDA when torch sees it.")  # fmt: skip
@click.option("--memory-limit", type=Size(), default="100MB", show_default=True,
              help="Bound on what the process holds beyond `import torch`.")  # fmt: skip
@click.option("--adapter", "adapters", callback=weighted, multiple=True, metavar="PATH[:WEIGHT]",
              help="A further adapter, whose update times WEIGHT (or 1) is added; may be repeated, in any order.")  # fmt: skip
@click.option("--adapter-scale", type=float, default=1.0, show_default=True, help="Multiplies the update of ADAPTER.")
@click.option("--adapter-name", metavar="NAME", help="Which adapter of a directory that holds several, in sub-folders.")
@click.option("--overwrite", is_flag=True, help="Replace an existing OUT_DIR, once the new one is complete.")
@click.option("--dry-run", is_flag=True, help="Print the plan, write nothing.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object a line on stdout instead of text.")
@click.option("-q", "--quiet", is_flag=True, help="Nothing on stderr but errors.")
@click.option("-v", "--verbose", is_flag=True, help="Also what happens to each weight that changes.")
@click.version_option(__version__, prog_name="lorafuse")
def convert(
    ckpt: str, adapter: str, out_dir: str, *, as_json: bool, quiet: bool, verbose: bool, dry_run: bool, **options: Any
) -> None:
    """Merge ADAPTER into CKPT and write the result to OUT_DIR.

    CKPT is a safetensors checkpoint (bitsandbytes NF4, FP4, int8, or full precision), ADAPTER a PEFT or MLX-LM adapter;
    each a directory or a hub id org/name[@revision]. OUT_DIR gets full-precision shards that transformers, vLLM and others
    load, and lorafuse_receipt.json.
    """
    show = Show(as_json=as_json, quiet=quiet)
    with _exit_codes():
        checked = ("device", "adapter_scale", "adapter_name")
        Settings(**{name: options[name] for name in checked})  # refuses them, as click does the others
        gc.disable()  # what importing torch makes stays: looking for garbage in it only takes time
        from lorafuse.pipeline import convert as run  # imports torch: not before the options are known to be right

        gc.freeze()
        gc.enable()

        receipt = run(ckpt, adapter, out_dir, dry_run=dry_run, on_event=show, **options)
        show.close()
        if dry_run:
            if not as_json:
                click.echo(plan_text(receipt))
            return
        if verbose and not quiet:
            click.echo(weights_text(receipt), err=True)
        if not quiet:
            click.echo(summary_text(receipt, ckpt, [adapter, *(path for path, _ in options["adapters"])]), err=True)
        if not as_json:
            click.echo(os.fsencode(out_dir))  # a path is bytes, perhaps no UTF-8


class Show:
    """Shows events: JSON lines on stdout, or warnings and progress on stderr."""

    def __init__(self, *, as_json: bool, quiet: bool) -> None:
        self._as_json, self._quiet = as_json, quiet
        self._bar: Any = None
        self._n_shards = self._n_done = 0

    def __call__(self, event: dict[str, Any]) -> None:
        kind = event["event"]
        if self._as_json and kind != "progress":
            click.echo(json.dumps(event))
        if self._quiet:
            return
        if kind == "warning":
            click.echo(f"Warning: {event['message']}", err=True)
        elif kind == "plan":
            self._n_shards = len(event["shards"])
            self._open_bar(event["nbytes"])
        elif kind == "progress" and self._bar is not None:
            self._bar.update(event["nbytes"])
        elif kind == "shard" and self._bar is None:
            self._n_done += 1
            click.echo(f"{event['file']}: {event['nbytes'] / 1e6:,.1f} MB ({self._n_done} of {self._n_shards})", err=True)

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
    lines += [f"  {s['file']}  {s['nbytes'] / 1e6:,.1f} MB  {s['n_weights']} weights" for s in plan["shards"]]
    lines.append(f"adapter tensors: {plan['adapter_tensors']['used']} used, {len(plan['adapter_tensors']['ignored'])} ignored")
    lines += [f"  ignored {shown(key)}: {shown(reason)}" for key, reason in plan["adapter_tensors"]["ignored"].items()]
    if plan["held_whole"]:
        lines.append(f"held whole in memory, one after the other, for a decomposition: {listed(plan['held_whole'])}")
    lines += [f"config.json: {name} = {json.dumps(value)}" for name, value in plan["config_changes"].items()]
    return "\n".join(lines)


def weights_text(receipt: dict[str, Any]) -> str:
    """A line for each weight that is not copied or decoded."""
    lines = []
    for name, entry in receipt["tensors"].items():
        if entry["action"] in ("merged", "replaced", "added"):
            figures = [
                f"{k} {entry[k]:.4g}"
                for k in ("rank", "scale", "delta_rel", "kept", "noise", "changed")
                if entry.get(k) is not None
            ]
            if "updates" in entry:
                figures.insert(0, f"updates {len(entry['updates'])}")
            lines.append(f"{entry['action']:8} {shown(name)}  {'  '.join(figures)}")
    return "\n".join(lines)


def summary_text(receipt: dict[str, Any], ckpt: str, adapters: list[str]) -> str:
    """One line: what was merged into what, how much of the update was kept, and what it cost."""
    merged = [entry for entry in receipt["tensors"].values() if entry["action"] == "merged"]
    kept = [entry["kept"] for entry in merged if entry.get("kept") is not None]
    share = f", {min(kept):.1%} of the update kept where it is least" if kept else ""
    nbytes = sum(output["size"] for output in receipt["outputs"])
    return (
        f"Merged {listed(adapters)} into {shown(ckpt)}: {len(merged)} of {len(receipt['tensors'])} weights updated{share}; "
        f"{nbytes / 1e6:,.1f} MB in {receipt['timing']['wall_s']:.1f} s, peak {receipt['peak_rss'] / 1e6:,.0f} MB."
    )


class _exit_codes:  # noqa: N801 (reads as a statement)
    """Turns exceptions into the contract's exit codes and one line on stderr. Anything unforeseen keeps its traceback."""

    def __enter__(self) -> None:
        signal.signal(signal.SIGTERM, _terminate)

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: object) -> None:
        if isinstance(error, LorafuseError):
            _fail(str(error), error.exit_code)
        if isinstance(error, KeyboardInterrupt | Terminated):
            _fail("interrupted; OUT_DIR is as it was.", 130 if isinstance(error, KeyboardInterrupt) else 143)
        if isinstance(error, OSError) and error.errno is not None:
            _fail(f"{shown(error.filename or 'the output')}: {error.strerror}.", 5)


def _terminate(*_: object) -> NoReturn:
    raise Terminated


def _fail(message: str, code: int) -> NoReturn:
    click.echo(f"Error: {message}", err=True)
    sys.exit(code)


def _entry(command: click.Command, name: str) -> Callable[[], None]:
    return lambda: command.main(prog_name=name)


main = _entry(lorafuse, "lorafuse")
main_convert = _entry(convert, "lorafuse-convert")

if __name__ == "__main__":
    main()
