"""`lorafuse inspect`."""

import json
from collections.abc import Iterable, Iterator
from typing import Any

import click

from lorafuse.cli.exits import exit_codes
from lorafuse.cli.options import CONTEXT
from lorafuse.errors import listed, shown, sized
from lorafuse.inspection import inspect as run
from lorafuse.receipt.in_words import percent, too_little_text

Facts = dict[str, Any]
Lines = Iterator[tuple[str, str]]  # label, text
MANY = 10  # names that are listed in a line


@click.command(context_settings=CONTEXT)
@click.argument("path")
@click.option("--top", type=click.IntRange(min=0), default=20, show_default=True, metavar="N",
              help="Of a merged directory, how many of its weights to list, worst first.")  # fmt: skip
@click.option(
    "--json", "as_json", is_flag=True, help="One JSON object on stdout instead of text, with all weights."
)
def inspect(path: str, *, top: int, as_json: bool) -> None:
    """Say what PATH is: a checkpoint, an adapter, or the result of a merge.

    PATH is a directory or a hub id org/name[@revision]. Of a checkpoint on the hub only the config and the
    headers of its files are fetched, of an adapter its files. Of a merged directory the receipt is shown:
    what was merged into what, and for each weight how much of the update was kept.

    \b
    Examples:
      lorafuse inspect my-adapter
      lorafuse inspect merged --top 3
      lorafuse inspect org/name --json
    """
    with exit_codes():
        facts = run(path)
        click.echo(json.dumps(facts) if as_json else inspect_text(facts, top))


def inspect_text(facts: Facts, top: int) -> str:
    """What `lorafuse.inspect` returned, for people; of the weights of a merged directory the first `top`."""
    if facts["kind"] == "adapters":
        head = [
            f"adapters: {shown(facts['path'])}",
            *(f"  {'problem':13} {text}" for _, text in _notes("problem", facts["problems"])),
        ]
        return "\n\n".join(["\n".join(head), *(inspect_text(adapter, top) for adapter in facts["adapters"])])
    lines = {"checkpoint": _checkpoint, "adapter": _adapter, "merged": _merged}[facts["kind"]](facts)
    text = "\n".join(
        [
            f"{facts['kind']}: {shown(facts['path'])}",
            *(f"  {label:13} {text}".rstrip() for label, text in lines),
        ]
    )
    return "\n".join([text, *_table(facts["weights"], top)]) if facts["kind"] == "merged" else text


def _checkpoint(facts: Facts) -> Lines:
    yield from _model(facts)
    yield "size", _size(facts, _in_files(facts))
    for row in facts["storage"]:
        scheme = "dense" if row["quantized"] is None else row["scheme"]
        dtype = f", {row['dtype']}" if row["dtype"] else ""
        yield "weights", f"{row['n_weights']} {shown(scheme)}{dtype}: {_size(row)}"
    if any(row["quantized"] for row in facts["storage"]):
        yield from _names("dense", _dense_modules(facts["storage"]))
    if facts["auto_dtypes"]:
        yield "--dtype auto", "writes " + _counts(facts["auto_dtypes"])
    yield from _notes("problem", facts["problems"])


def _dense_modules(storage: list[Facts]) -> list[str]:
    """The kinds of modules that are dense, each with the number of its weights."""
    dense = (row["modules"] for row in storage if not row["quantized"])
    return [f"{n:,} {kind.partition('*.')[2] or kind}" for modules in dense for kind, n in modules.items()]


def _model(facts: Facts) -> Lines:
    architectures = facts["architectures"]
    names = listed(architectures) if isinstance(architectures, list) else ""
    kind = shown(facts["model_type"] or "no model_type in config.json") + (f" ({names})" if names else "")
    vocabulary = f", vocabulary {facts['vocab_size']}" if facts.get("vocab_size") else ""
    tied = "" if facts.get("tied") is None else f", embeddings {'' if facts['tied'] else 'not '}tied"
    yield "model", kind + vocabulary + tied


def _adapter(facts: Facts) -> Lines:
    task = f" for {shown(facts['task_type'])}" if facts["task_type"] else ""
    yield "type", f"{shown(facts['type'])} of {facts['format']}{task}"
    if facts["base_model"]:
        yield "trained on", shown(facts["base_model"])
    yield "size", f"{_plural(facts['n_tensors'], 'tensor')}, {_size(facts)} {_counts(facts['dtypes'])}"
    for row in facts["scales"]:
        yield "rank, scale", f"{row['rank']}, {row['scale']:g} ({_plural(row['n_updates'], 'update')})"
    if not facts["scales"] and facts["n_updates"]:
        yield "updates", str(facts["n_updates"])
    yield from _names("targets", facts["target_modules"])
    yield from _names("saves whole", facts["modules_to_save"])
    yield from _names("replaces", facts["replaced"])
    yield from _names("also in", facts["beside"])
    settings = [f"{shown(name)} {shown(_plain(value))}" for name, value in facts["config"].items()]
    yield from _names("config", settings)
    yield from _names("sub-folders", facts["sub_folders"])
    yield from _notes("ignored", (f"{key}: {reason}" for key, reason in facts["ignored"].items()))
    yield from _notes("warning", facts["warnings"])
    yield from _notes("problem", facts["problems"])


def _merged(facts: Facts) -> Lines:
    yield from _model(facts)
    tool = facts["tool"]
    versions = [f"{part} {shown(tool[part])}" for part in ("torch", "python") if part in tool]
    yield "made by", f"{shown(tool.get('name'))} {shown(tool.get('version'))} ({', '.join(versions)})"
    yield "checkpoint", f"{shown(facts['checkpoint'])} ({shown(facts['base_semantics'])})"
    for adapter in facts["adapters"]:
        weight = "" if adapter["weight"] is None else f", weight {shown(adapter['weight'])}"
        yield "adapter", f"{shown(adapter['path'])}{weight}"
    yield from _names(
        "settings", [f"{shown(name)} {shown(_plain(value))}" for name, value in facts["settings"].items()]
    )
    yield "size", f"{_size(facts)} {_counts(facts['dtypes'])}{_in_files(facts)}"
    sizes = facts["sizes"]
    if sizes["nbytes"] < sizes["dense_nbytes"]:
        share = sizes["nbytes"] / sizes["dense_nbytes"]
        yield "stored", f"{sizes['bits_per_weight']:.2f} bits a weight, {share:.0%} of the dense result"
    yield "weights", ", ".join(f"{n} {shown(action)}" for action, n in sorted(facts["actions"].items()))
    yield from _notes("ignored", (f"{key}: {reason}" for key, reason in facts["ignored"].items()))
    update = facts["update"]
    if update["kept"] is not None:
        least = percent(update["least"])
        yield (
            "update",
            f"{percent(update['kept'])} kept in all, {least} where it is least; noise {update['noise']:.3g}",
        )
    yield from _notes("warning", too_little_text(update))


def _table(weights: list[Facts], top: int) -> list[str]:
    """The first weights with their figures, and how many more there are."""
    figures = ("kept", "noise", "delta_rel", "changed")
    lines = ["", "  ".join(f"{figure:>9}" for figure in figures) + "  weight"] if weights[:top] else []
    for weight in weights[:top]:
        cells = ["-" if weight[figure] is None else f"{weight[figure]:.4g}" for figure in figures]
        lines.append("  ".join(f"{cell:>9}" for cell in cells) + f"  {shown(weight['name'])}")
    rest = len(weights) - len(weights[:top])
    return [*lines, f"and {rest} more"] if lines and rest else lines


def _size(facts: Facts, more: str = "") -> str:
    return f"{facts['n_parameters']:,} parameters, {sized(facts['nbytes'])}{more}"


def _in_files(facts: Facts) -> str:
    return f" in {_plural(len(facts['files']), 'file')}"


def _plural(n: int, what: str) -> str:
    return f"{n} {what}" + ("s" if n != 1 else "")


def _counts(counts: dict[str, int]) -> str:
    """A name that stands alone, or each with its number."""
    if len(counts) == 1:
        return shown(next(iter(counts)))
    return ", ".join(f"{shown(name)} ({n})" for name, n in counts.items())


def _plain(value: object) -> object:
    """A value of a config: words as they are, anything else as JSON."""
    return value if isinstance(value, str) else json.dumps(value)


def _names(label: str, names: object) -> Lines:
    """A line for a list of names, or for one (a regular expression)."""
    if names:
        yield label, listed(names if isinstance(names, list) else [_plain(names)], MANY)


def _notes(label: str, notes: Iterable[str]) -> Lines:
    yield from ((label, shown(note, 1000)) for note in notes)
