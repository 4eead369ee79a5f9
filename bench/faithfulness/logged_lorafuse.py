"""lorafuse, with a log of what its merges came to: the command that digests.py gives to a corpus.

    python -m bench.faithfulness.logged_lorafuse LOG_DIR PACKAGE ARGUMENT...

Runs `lorafuse ARGUMENT...` from the folder PACKAGE. After a `convert` or a `batch`, a file in LOG_DIR says
what came of it. The key of a result is a digest of the names and contents of its input files, of the options
that decide bytes, and of the corpus' check that ran it, which the current directory names. Its value is a
digest for each output file. The receipt is taken without what differs from run to run, and its plan_id, which
depends on the version too, stands beside it. A refusal (exit status 3, 4 or 7) or a crash is a result as
well. A digest is the first 16 hex digits of a sha256.
"""

import hashlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

RECEIPT = "lorafuse_receipt.json"
NOT_THE_SAME_EACH_RUN = {"timing", "peak_rss", "tool", "plan_id"}
FLAGS = {"--quant-experts", "--double-quant", "--no-double-quant", "--allow-nonfinite", "--dry-run"}
FLAGS_WITHOUT_EFFECT = {"--overwrite", "--restart", "--json", "-q", "--quiet", "-v", "--verbose"}
VALUES_WITHOUT_EFFECT = {"--memory-limit", "--device", "--share", "--index", "--of"}
REFUSED = (1, 3, 4, 7)  # the statuses that the inputs alone decide; 1 is a crash
SOME_FAILED = 9  # of a batch, whose other results are there

Results = dict[str, dict[str, list[str]]]  # key: {"check": [name in the corpus], "plan_id", file: digests}


def digest(data: Any) -> str:
    return hashlib.sha256(json.dumps(data, sort_keys=True).encode()).hexdigest()[:16]


def digest_of(path: Path) -> str:
    with path.open("rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()[:16]


def digests_of(directory: Path) -> dict[str, str]:
    files = {p.relative_to(directory).as_posix(): p for p in sorted(directory.rglob("*")) if p.is_file()}
    return {name: digest_of(files[name]) for name in files}


def content(text: str) -> Any:
    """What an argument stands for: digests if it is the path of files (PATH:WEIGHT too), else itself."""
    name, colon, weight = (text, "", "") if Path(text).exists() else text.rpartition(":")
    path = Path(name)
    if path.is_file():
        return digest_of(path)
    return [digests_of(path), colon + weight] if name and path.is_dir() else text


def subjects_and_options(arguments: list[str]) -> tuple[list[str], list[Any]]:
    """Returns the subjects of a command line, and what its options that decide bytes stand for."""
    subjects, options, rest = [], [], iter(arguments)
    for argument in rest:
        name, equals, value = argument.partition("=")
        if not argument.startswith("-"):
            subjects.append(argument)
        elif name in FLAGS:
            options.append([name])
        elif name not in FLAGS_WITHOUT_EFFECT:
            value = value if equals else next(rest, "")
            options += [[name, content(value)]] if name not in VALUES_WITHOUT_EFFECT else []
    return subjects, sorted(options, key=json.dumps)


def result_of(directory: Path) -> dict[str, list[str]]:
    receipt = json.loads((directory / RECEIPT).read_bytes())
    same = {name: receipt[name] for name in receipt.keys() - NOT_THE_SAME_EACH_RUN}
    files = digests_of(directory) | {RECEIPT: digest(same), "plan_id": receipt["plan_id"][:16]}
    return {name: [files[name]] for name in files}


def results_of(verb: str, arguments: list[str], status: int) -> Results:
    """What one run of the command in the current directory came to."""
    subjects, options = subjects_and_options(arguments)
    if verb not in ("convert", "batch") or len(subjects) != 3 or status not in (0, *REFUSED, SOME_FAILED):
        return {}
    check = re.findall(r"(?<=/)[a-z]+\.\d+(?=/|$)", str(Path.cwd()))[:1]
    inputs, out = [check, verb, options, *map(content, subjects[:2])], Path(subjects[2])
    if verb == "batch" and Path(subjects[1]).is_file():
        lines = Path(subjects[1]).read_text(encoding="utf-8").splitlines()
        jobs = [json.loads(line) for line in lines if line.startswith("{")]
        inputs += [content(str(Path(subjects[1]).parent / job["adapter"])) for job in jobs]
    if status in REFUSED:
        return {digest([*inputs, ""]): {"check": check, "refused": [str(status)]}}
    places = [out] if verb == "convert" else out.glob("*")
    done = [place for place in places if (place / RECEIPT).is_file()]
    return {digest([*inputs, "" if p == out else p.name]): {"check": check, **result_of(p)} for p in done}


def run(log: str, package: str, arguments: list[str]) -> int:
    """Runs lorafuse; its streams and status are those of the command."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: None)  # not SIG_IGN, which the command would inherit
    path = os.pathsep.join([package, *filter(None, [os.environ.get("PYTHONPATH")])])
    command = [sys.executable, "-P", "-m", "lorafuse.cli", *arguments]
    status = subprocess.run(command, env=os.environ | {"PYTHONPATH": path}, check=False).returncode
    try:
        if results := results_of(arguments[0], arguments[1:], status):
            Path(log, f"{time.time_ns()}-{os.getpid()}").write_text(json.dumps(results), encoding="utf-8")
    except (OSError, ValueError, KeyError, TypeError, IndexError) as error:
        Path(log, f"lost-{os.getpid()}").write_text(f"{arguments}: {error!r}", encoding="utf-8")
    return status if status >= 0 else 128 - status


if __name__ == "__main__":
    sys.exit(run(sys.argv[1], sys.argv[2], sys.argv[3:]))
