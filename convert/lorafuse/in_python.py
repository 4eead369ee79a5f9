"""What a message says of options, in the words of a caller from Python: `overwrite=True` for `--overwrite`.

Everything below writes messages as the command line prints them. `spoken_in_python` stands around each public
function and nowhere else: the command line calls the functions inside.
"""

import re
from collections.abc import Callable, Mapping
from functools import wraps
from typing import Any, ParamSpec, TypeVar

from lorafuse.errors import LorafuseError
from lorafuse.settings import BASE_QUANT_CHOICES, DTYPE_CHOICES, FORMAT_CHOICES, ROUNDING_CHOICES

P = ParamSpec("P")
R = TypeVar("R")

FLAGS = {
    **{name: f"{name}=True" for name in ("overwrite", "restart", "allow_nonfinite", "quant_experts")},
    **{name: f"{name}=True" for name in ("dry_run", "stream", "card", "private", "create_pr", "commit")},
    "no_double_quant": "double_quant=False",
}
VALUED = {
    *("dtype", "format", "keep_dense", "rounding", "max_shard_size", "device", "memory_limit"),
    *("adapter_scale", "adapter_name", "base_quant", "quant_blocksize", "quant_skip", "base_quant_from"),
    *("adapters", "share", "index", "of", "ckpt", "sample", "push_to_hub", "revision"),
    *("engine", "address"),
}
_WORDS = {*DTYPE_CHOICES, *FORMAT_CHOICES, *BASE_QUANT_CHOICES, *ROUNDING_CHOICES, "cpu", "cuda"}
TEXTS, LISTS = ("message", "error"), ("notes", "problems")  # fields that people read
# What follows an option is its value where it is a word of a choice, a placeholder, in quotes, a path, or
# stands before a colon.
_CHOICE = "|".join(sorted(_WORDS))
_VALUE = rf"'[^']*'|[A-Z]+\b|[\w*?/.-]+(?=:)|[^\s,;:]*[./][^\s,;:]*[^\s,;:.)]|(?:{_CHOICE})\b"
_OPTION = re.compile(rf"--([a-z]+(?:-[a-z]+)*)(?: ({_VALUE}))?( (?=--))?")
_NAMED = re.compile(r"the option ([a-z]+(?:-[a-z]+)+)")


def in_python(message: str) -> str:
    """The message with parameters in place of options. What is no parameter stays as it is."""
    message = _NAMED.sub(lambda match: match[1].replace("-", "_"), message)
    return _OPTION.sub(_parameter, message)


def _parameter(option: re.Match[str]) -> str:
    name, value = option[1].replace("-", "_"), option[2]
    name = "adapters" if name == "adapter" else name
    behind = f" {value}" if value else ""
    if name in FLAGS:
        told = FLAGS[name] + behind
    elif name in VALUED and value:
        quoted = value if value.isupper() else repr(value.strip("'"))
        told = f"{name}={quoted}"
    elif name in VALUED:
        told = name
    else:
        return option[0]
    return told + (", " if option[3] else "")


def spoken_in_python(function: Callable[P, R]) -> Callable[P, R]:
    """The public form of a function: its errors, its events and what it returns name parameters."""

    @wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        listener: Any = kwargs.get("on_event")
        if callable(listener):
            kwargs["on_event"] = lambda event: listener(_event(event))
        try:
            result = function(*args, **kwargs)
        except LorafuseError as error:
            _respeak(error)
            raise
        if isinstance(result, list):  # the states of a batch's jobs
            _respeak(*(state.error for state in result if state.error))
        elif isinstance(result, dict):
            result.update(_event(result))
        return result

    return call


def _event(event: Mapping[str, Any]) -> dict[str, Any]:
    """An event, or what a function returns, with its texts for people in Python's words."""
    texts = [field for field in TEXTS if isinstance(event.get(field), str)]
    said: dict[str, Any] = {field: in_python(event[field]) for field in texts}
    lists = {field: list(map(in_python, event[field])) for field in LISTS if field in event}
    update = event.get("update")
    if update and update.get("remedy"):
        said["update"] = {**update, "remedy": in_python(update["remedy"])}
    return {**event, **said, **lists}


def _respeak(*errors: LorafuseError) -> None:
    for error in errors:
        error.args = tuple(in_python(str(argument)) for argument in error.args)
