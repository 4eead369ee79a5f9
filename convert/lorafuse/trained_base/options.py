"""How training quantized the base: what the options say, or the file that they name."""

from collections.abc import Iterable, Sequence
from dataclasses import replace
from os import PathLike
from typing import Any, TypedDict

from lorafuse.errors import UsageError
from lorafuse.settings import AUTO, QUANTIZING_FORMATS, BaseQuant
from lorafuse.trained_base.trainer_configs import read_base_quant

# As every command and function has them.
BASE_OPTIONS = (
    "base_quant",
    "double_quant",
    "quant_blocksize",
    "quant_skip",
    "quant_experts",
    "base_quant_from",
)


def chosen_base_quant(
    *,
    base_quant: str = "none",
    double_quant: bool = True,
    quant_blocksize: int = 64,
    quant_skip: Sequence[str] = (),
    quant_experts: bool = False,
    base_quant_from: str | PathLike[str] | None = None,
) -> BaseQuant | None:
    """How training quantized the base, by the file `base_quant_from` or by options; None where it did not.
    The block size and whether experts were quantized stand in no file, so these options hold beside one.
    Raises UsageError."""
    if base_quant_from is None:
        details: dict[str, Any] = {
            "double_quant": double_quant,
            "blocksize": quant_blocksize,
            "experts": quant_experts,
        }
        return _by_options(base_quant, skip=quant_skip, **details)
    said = {
        "--base-quant": base_quant != "none",
        "--no-double-quant": not double_quant,
        "--quant-skip": bool(quant_skip),
    }
    refuse_beside_file(name for name, given in said.items() if given)
    return replace(
        read_base_quant(base_quant_from),
        blocksize=quant_blocksize,
        experts=quant_experts,
    )


class ChosenQuants(TypedDict):
    """How training quantized the base, and, where it did not and the format does, how this run quantizes: the
    same options say it."""

    base_quant: BaseQuant | None
    quant_anew: BaseQuant | None


def chosen_quants(
    format: str,
    *,
    base_quant: str = "none",
    base_quant_from: str | PathLike[str] | None = None,
    **details: Any,
) -> ChosenQuants:
    """What the options of a conversion say. Raises UsageError."""
    if format in QUANTIZING_FORMATS and base_quant == "none" and base_quant_from is None:
        return {"base_quant": None, "quant_anew": chosen_base_quant(base_quant=format, **details)}
    of_base = chosen_base_quant(base_quant=base_quant, base_quant_from=base_quant_from, **details)
    return {"base_quant": of_base, "quant_anew": None}


def refuse_beside_file(options: Iterable[str], file: str = "--base-quant-from") -> None:
    """Raises UsageError for options that say what the file says."""
    for name in options:
        raise UsageError(f"{file} and {name} both say how the base was quantized; give one of the two.")


def _by_options(
    kind: str, *, double_quant: bool, blocksize: int, skip: Sequence[str], experts: bool
) -> BaseQuant | None:
    """What the options of a conversion ask for; None for "none". Raises UsageError for details without a
    kind."""
    if kind == AUTO:
        said = {"--no-double-quant": not double_quant, "--quant-skip": bool(skip)}
        refuse_beside_file((name for name, given in said.items() if given), "--base-quant auto")
    if kind != "none":
        return BaseQuant(
            kind=kind,
            double_quant=double_quant,
            blocksize=blocksize,
            skip=tuple(skip) or None,
            experts=experts,
        )
    given = {
        "--no-double-quant": not double_quant,
        "--quant-blocksize": blocksize != 64,
        "--quant-skip": skip,
        "--quant-experts": experts,
    }
    for name in (name for name, value in given.items() if value):
        raise UsageError(
            f"{name} says how the base was quantized, but --base-quant is none; expected nf4, fp4 or int8."
        )
    return None
