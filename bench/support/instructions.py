"""How many instructions a command takes: what other processes do meanwhile does not change the number.

`perf stat` counts them where the kernel and the processor allow it. Valgrind counts them everywhere, some
fifty times slower, for a processor without AVX-512 and without instructions for SHA-256.
"""

import re
import shutil
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

from bench.support import measure

PERF = ("perf", "stat", "--field-separator=,", "--event=instructions:u")
VALGRIND = ("valgrind", "--tool=cachegrind", "--cache-sim=no", "--cachegrind-out-file=/dev/null")


def of_perf(text: str) -> int | None:
    """The number in what `perf stat` writes; None where it could not count."""
    found = re.search(r"^(\d+),,instructions", text, re.MULTILINE)
    return int(found[1]) if found else None


def of_valgrind(text: str) -> int | None:
    """The number in what cachegrind writes."""
    found = re.search(r"\bI +refs: +([\d,]+)", text)
    return int(found[1].replace(",", "")) if found else None


def counter() -> str | None:
    """What counts on this machine."""
    if shutil.which(PERF[0]) and _counted([*PERF, "--output"], ["true"], of_perf):
        return "perf"
    return "valgrind" if shutil.which(VALGRIND[0]) else None


def count(tool: str, argv: Sequence[str | Path], **environment: str) -> int | None:
    """Instructions of a command and its threads."""
    if tool == "perf":
        return _counted([*PERF, "--output"], argv, of_perf, **environment)
    return _counted([*VALGRIND, "--log-file"], argv, of_valgrind, **environment)


def _counted(
    tool: Sequence[str], argv: Sequence[str | Path], parse: Callable[[str], int | None], **environment: str
) -> int | None:
    """`tool`: its command, up to the option that takes the file of its output."""
    with tempfile.NamedTemporaryFile("r") as out:
        *words, option = tool
        try:
            measure.run([*words, f"{option}={out.name}", *argv], **environment)
        except measure.ChildError:
            return None
        return parse(out.read())
