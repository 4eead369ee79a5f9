"""`lorafuse convert`, which is also `lorafuse-convert`."""

import gc
import os
from typing import Any

import click

from lorafuse._version import __version__
from lorafuse.cli.exits import exit_codes
from lorafuse.cli.options import CONTEXT, Size, weighted
from lorafuse.cli.show import Show, plan_text, summary_text, weights_text
from lorafuse.settings import BASE_QUANT_CHOICES, DTYPE_CHOICES, Settings, base_quant_of


@click.command(context_settings=CONTEXT)
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
@click.option("--base-quant", type=click.Choice(BASE_QUANT_CHOICES), default="none", show_default=True,
              help="Treat a full-precision CKPT as training saw it: quantized, and dequantized, as bitsandbytes does.")  # fmt: skip
@click.option("--double-quant/--no-double-quant", default=True, show_default=True,
              help="Whether training quantized the scales of nf4 and fp4 as well.")  # fmt: skip
@click.option("--quant-blocksize", type=int, default=64, show_default=True, help="Elements to a scale of nf4 and fp4.")
@click.option("--quant-skip", multiple=True, metavar="NAME",
              help="Modules that training did not quantize, instead of those that transformers skips; repeatable.")  # fmt: skip
@click.option("--quant-experts", is_flag=True,
              help="Training quantized the experts of a mixture too: transformers 4 did, 5 does not.")  # fmt: skip
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
    with exit_codes():
        checked = ("device", "adapter_scale", "adapter_name")
        Settings(**{name: options[name] for name in checked})  # refuses them, as click does the others
        base_quant_of(
            options["base_quant"],
            double_quant=options["double_quant"],
            blocksize=options["quant_blocksize"],
            skip=options["quant_skip"],
            experts=options["quant_experts"],
        )
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
