"""Arguments of the Python functions, checked as click checks those of the commands, so that a wrong argument
is refused by its name."""

import inspect
from collections.abc import Callable, Iterable
from functools import wraps
from os import PathLike
from typing import Any, ParamSpec, TypeVar

from lorafuse.errors import UsageError, shown
from lorafuse.settings import Push, parse_nbytes

P = ParamSpec("P")
R = TypeVar("R")


def _is_path(value: Any) -> bool:
    return isinstance(value, str | PathLike)


def _size(parameter: str, value: Any) -> Any:
    try:
        parse_nbytes(value)
    except UsageError as e:
        raise UsageError(f"{parameter}: {e}") from None
    return value


def _names(parameter: str, value: Any) -> Any:
    """A sequence of strings; a string by itself is one of them."""
    names = (value,) if isinstance(value, str) else value
    if not isinstance(names, Iterable) or not all(isinstance(name, str) for name in names):
        raise UsageError(f"{parameter} is {shown(repr(value))}; expected a list of strings.")
    return names


def _adapters(parameter: str, value: Any) -> Any:
    """A sequence of paths, or of pairs (path, weight); a path by itself is one of them."""
    adapters = (value,) if _is_path(value) else value
    if not isinstance(adapters, Iterable) or not all(map(_is_adapter, adapters)):
        raise UsageError(
            f"{parameter} is {shown(repr(value))}; expected a list of paths, hub ids or pairs with a weight."
        )
    return adapters


def _is_adapter(value: Any) -> bool:
    return _is_path(value[0]) if isinstance(value, tuple) and len(value) == 2 else _is_path(value)


def _must(is_right: Callable[[Any], bool], expected: str) -> Callable[[str, Any], Any]:
    def check(parameter: str, value: Any) -> Any:
        if not is_right(value):
            raise UsageError(f"{parameter} is {shown(repr(value))}; expected {expected}.")
        return value

    return check


_PATH = _must(_is_path, "a path or a hub id")
_NUMBER = _must(lambda value: isinstance(value, int | float) and not isinstance(value, bool), "a number")
_FLAG = _must(lambda value: isinstance(value, bool), "True or False")
_TEXT = _must(lambda value: value is None or isinstance(value, str), "a string")
_CHECKS: dict[str, Callable[[str, Any], Any]] = {
    **dict.fromkeys(("ckpt", "adapter", "out_dir", "jobs", "out_root", "path"), _PATH),
    "base_quant_from": _must(lambda value: value is None or _is_path(value), "a path"),
    **dict.fromkeys(("max_shard_size", "memory_limit"), _size),
    **dict.fromkeys(("keep_dense", "quant_skip"), _names),
    **dict.fromkeys(("device", "adapter_name", "engine", "address"), _TEXT),
    **dict.fromkeys(("overwrite", "restart", "dry_run", "allow_nonfinite", "double_quant"), _FLAG),
    **dict.fromkeys(("quant_experts", "stream", "card", "commit"), _FLAG),
    **dict.fromkeys(("index", "of"), _must(lambda value: type(value) is int, "a whole number")),
    "push_to_hub": _must(lambda value: isinstance(value, str | Push), "a repository or a Push"),
    "adapters": _adapters,
    "adapter_scale": _NUMBER,
    "on_event": _must(callable, "a function of an event"),
}


def checked(function: Callable[P, R]) -> Callable[P, R]:
    """The function, which raises UsageError for arguments of a wrong kind. A string where several are
    expected is taken as one of them, not as its letters."""
    signature = inspect.signature(function)

    @wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        try:
            given = signature.bind(*args, **kwargs)
        except TypeError as e:  # as Python says it, with the function's name
            raise TypeError(f"{function.__name__}() {e}") from None
        for name, value in given.arguments.items():
            optional = signature.parameters[name].default is None and value is None
            if name in _CHECKS and not optional:
                given.arguments[name] = _CHECKS[name](name, value)
        return function(*given.args, **given.kwargs)

    return call
