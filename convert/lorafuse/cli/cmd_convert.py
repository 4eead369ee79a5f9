"""`lorafuse convert`, which is also `lorafuse-convert`."""

import gc
import os
from typing import Any

import click

from lorafuse.cli.exits import exit_codes
from lorafuse.cli.options import (
    CONTEXT,
    base_options,
    check_base_options,
    engine_options,
    output_options,
    push_option,
    run_options,
    version_option,
    weighted,
)
from lorafuse.cli.show import Show, summary_text, weights_text
from lorafuse.cli.streams import say, tell
from lorafuse.files.early_hashing import hashing_meanwhile
from lorafuse.files.hub import as_named
from lorafuse.files.seen import refuse_passing
from lorafuse.files.uncollected import uncollected
from lorafuse.outdir.apart import refuse_nameless
from lorafuse.settings import THE_BASE, Settings

WHEN_INTERRUPTED = "OUT_DIR is as it was, and the same command goes on from what is finished"


@click.command(context_settings=CONTEXT)
@click.argument("ckpt")
@click.argument("adapter")
@click.argument("out_dir")
@output_options
@click.option("--adapter", "adapters", callback=weighted, multiple=True, metavar="PATH[:WEIGHT]",
              help="A further adapter, whose update times WEIGHT (or 1) is added; may be repeated, in any "
                   "order.")  # fmt: skip
@click.option(
    "--adapter-scale", type=float, default=1.0, show_default=True, help="Multiplies the update of ADAPTER."
)
@click.option(
    "--adapter-name", metavar="NAME", help="Which adapter of a directory that holds several, in sub-folders."
)
@base_options
@click.option(
    "--allow-nonfinite",
    is_flag=True,
    help="Keep values of the base that are not finite, instead of refusing them.",
)
@click.option("--overwrite", is_flag=True, help="Replace an existing OUT_DIR, once the new one is complete.")
@click.option("--restart", is_flag=True, help="Discard what an earlier run that was cut off has finished.")
@click.option("--stream", is_flag=True,
              help="Fetch a CKPT on the hub file by file ahead of the merge, and remove each file behind it: "
                   "the disk holds the result and two files.")  # fmt: skip
@click.option("--push-to-hub", metavar="REPO",
              help="Upload the result to a repository on the hub while it is made, with one commit at the "
                   "end; with --stream no weights stay here, and OUT_DIR is not made.")  # fmt: skip
@click.option("--private", is_flag=True, help="Make that repository a private one.")
@click.option("--revision", metavar="BRANCH", help="The branch of that repository.")
@click.option("--create-pr", is_flag=True, help="Open a pull request there instead.")
@click.option("--index", type=int, metavar="I",
              help="Make only part I (from 0) of the files of weights, with --of; other workers make the "
                   "others, and --commit gives the result its name.")  # fmt: skip
@click.option("--of", type=int, metavar="N", help="Into how many parts the files of weights are divided.")
@click.option("--commit", is_flag=True,
              help="Complete the result whose parts the workers have made.")  # fmt: skip
@engine_options
@click.option("--card", is_flag=True, help="Write a model card, README.md; --push-to-hub does.")
@run_options
@click.option("-v", "--verbose", is_flag=True, help="Also what happens to each weight that changes.")
@version_option
def convert(
    ckpt: str,
    adapter: str,
    out_dir: str,
    *,
    as_json: bool,
    quiet: bool,
    verbose: bool,
    dry_run: bool,
    **options: Any,
) -> None:
    """Merge ADAPTER into CKPT and write the result to OUT_DIR.

    CKPT is a checkpoint in full precision or a quantized one (bitsandbytes NF4, FP4, int8; FP8, GPTQ, AWQ,
    MXFP4, MLX and others), ADAPTER a PEFT or MLX-LM adapter; each a directory, a hub id
    org/name[/folder][@revision] or its URL. CKPT may be auto, the base that the adapter's config names.
    All three may lie in an object store: s3://, gs://, az://. OUT_DIR gets safetensors files that
    transformers, vLLM and others load, and lorafuse_receipt.json.

    \b
    Examples:
      lorafuse-convert base-nf4 my-adapter merged
      lorafuse-convert base-nf4 my-adapter merged --format light
      lorafuse-convert base-16bit my-adapter merged --base-quant nf4
      lorafuse-convert auto org/tuned merged --stream --push-to-hub me/merged
    """
    show = Show("merging", as_json=as_json, quiet=quiet, dry_run=dry_run, verbose=verbose)
    with exit_codes(WHEN_INTERRUPTED, as_json=as_json):
        _check(out_dir, options)
        with uncollected(), hashing_meanwhile("" if dry_run or options["index"] is not None else ckpt):
            from lorafuse.pipeline import convert as run

            gc.freeze()

        try:
            receipt = run(ckpt, adapter, out_dir, dry_run=dry_run, on_event=show, **options)
        finally:
            show.close()
        if dry_run or options["index"] is not None:
            return
        if verbose and not quiet:
            say(weights_text(receipt))
        if not quiet:
            base = receipt["inputs"][0]["path"].rpartition("/")[0] if ckpt in THE_BASE else ckpt
            names = [adapter, *(path for path, _ in options["adapters"])]
            say(summary_text(receipt, as_named(base), [as_named(name) for name in names]))
        if show.url and not quiet:
            say(f"Pushed: {show.url}")
        if not as_json:  # a path is bytes, perhaps no UTF-8
            tell(os.fsencode(out_dir) if show.kept_here else show.url)


def _check(out_dir: str, options: dict[str, Any]) -> None:
    """Refuses what click does not, before torch is imported, and makes one option of those of
    --push-to-hub. Raises UsageError."""
    refuse_nameless(out_dir)
    refuse_passing(out_dir)
    Settings(**{name: options[name] for name in ("device", "adapter_scale", "adapter_name")})
    check_base_options(options)
    options["push_to_hub"] = push_option(options)
