"""The commands that make a result again and verify it, from its receipt."""

import shlex
from collections.abc import Iterator, Mapping
from typing import Any

from lorafuse.receipt.fields import Receipt
from lorafuse.receipt.read import merged_inputs
from lorafuse.settings import Settings

DEFAULTS = Settings()
JOINT = " \\\n    "  # between the lines of a command


def convert_command(receipt: Receipt) -> str:
    """What makes the same result in a directory `merged`."""
    first, *others = merged_inputs(receipt, "adapter") or [{"path": "ADAPTER", "weight": None}]
    further = [("--adapter", _weighted(adapter)) for adapter in others]
    command = ["lorafuse-convert", _base(receipt), str(first["path"]), "merged"]
    return JOINT.join(shlex.join(words) for words in (command, *_options(receipt["settings"]), *further))


def verify_command(receipt: Receipt, out_dir: str) -> str:
    """What makes the merge again and compares every byte."""
    adapters = [("--adapter", str(adapter["path"])) for adapter in merged_inputs(receipt, "adapter")]
    command = ["lorafuse", "verify", out_dir]
    return JOINT.join(map(shlex.join, (command, ("--ckpt", _base(receipt)), *adapters)))


def left_out(receipt: Receipt) -> str | None:
    """What no option says, but `--base-quant-from`."""
    quant = receipt["settings"].get("base_quant")
    told = [
        name for name in ("skip_version", "stacked_experts") if isinstance(quant, dict) and quant.get(name)
    ]
    return "Give --base-quant-from the file that says how training quantized the base." if told else None


def _base(receipt: Receipt) -> str:
    return next((str(entry["path"]) for entry in merged_inputs(receipt, "checkpoint")), "CKPT")


def _weighted(adapter: Mapping[str, Any]) -> str:
    return (
        str(adapter["path"]) if adapter["weight"] in (None, 1) else f"{adapter['path']}:{adapter['weight']}"
    )


def _options(settings: Mapping[str, Any]) -> Iterator[tuple[str, ...]]:
    """The options that are not the defaults."""
    plain = {
        "dtype": DEFAULTS.dtype,
        "max_shard_size": DEFAULTS.max_shard_nbytes,
        "adapter_scale": DEFAULTS.adapter_scale,
        "format": DEFAULTS.format,
        "rounding": DEFAULTS.rounding,
    }
    for name, default in plain.items():
        if settings.get(name, default) != default:
            yield f"--{name.replace('_', '-')}", str(settings[name])
    yield from (("--keep-dense", str(pattern)) for pattern in _listed(settings.get("keep_dense")))
    for name in ("base_quant", "quantization"):
        quant = settings.get(name)
        if isinstance(quant, dict):
            yield from _quantization(quant, is_base=name == "base_quant")


def _quantization(quant: Mapping[str, Any], *, is_base: bool) -> Iterator[tuple[str, ...]]:
    if is_base:
        yield "--base-quant", str(quant.get("kind"))
    if quant.get("double_quant") is False:
        yield ("--no-double-quant",)
    if quant.get("blocksize", 64) != 64:
        yield "--quant-blocksize", str(quant["blocksize"])
    yield from (("--quant-skip", str(name)) for name in _listed(quant.get("skip")))
    if quant.get("experts"):
        yield ("--quant-experts",)


def _listed(value: object) -> list[Any]:
    return value if isinstance(value, list) else []
