"""Do merges write the same bytes as another commit's did, over a whole corpus of merges?

    python -m bench.faithfulness.digests record DIGESTS.json --corpus ACCEPT.py --package OTHER/convert
    python -m bench.faithfulness.digests compare DIGESTS.json --corpus ACCEPT.py [-k NAME]

The corpus is a script that takes `--cli COMMAND --lorafuse COMMAND [-k NAME]` and runs these commands on
inputs that it makes. The command that it gets is logged_lorafuse.py, which runs lorafuse from
--package, by default this checkout's `convert`, and logs a digest of every file that a merge wrote, under a
digest of its inputs.

Two runs meet in their keys since the corpus makes its inputs from fixed seeds and runs here with a fixed hash
seed and in a fixed temporary directory (an adapter names its base by path); so both need the same --tmp, and
the same versions of torch, transformers, bitsandbytes and peft. Covered: every merge that ends by itself,
each result of `batch`, and that what was refused still is. Not covered: error texts, what `inspect` and
`verify` print, and the content of what a hub id names. Keys that one side alone has are counted.
"""

import argparse
import itertools
import json
import os
import runpy
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path

from bench.faithfulness.logged_lorafuse import Results

HERE = Path(__file__).resolve()


def corpus_with_counted_names(arguments: list[str]) -> None:
    """Runs the corpus in this process, where temporary names are counted, not random."""
    vars(tempfile)["_get_candidate_names"] = lambda: map("{:06}".format, itertools.count())
    sys.argv = arguments
    runpy.run_path(arguments[0], run_name="__main__")


def run_corpus(corpus: Path, package: Path, tmp: Path, check: str | None) -> Results:
    """Runs the corpus with lorafuse from a package, which must really be imported from there."""
    env = os.environ | {"TMPDIR": str(tmp / "work"), "PYTHONHASHSEED": "0", "PYTHONPATH": str(package)}
    where = [sys.executable, "-P", "-c", "import lorafuse; print(lorafuse.__file__)"]
    found = Path(subprocess.run(where, env=env, check=True, capture_output=True, text=True).stdout.strip())
    if not found.is_relative_to(package):
        raise SystemExit(f"lorafuse is imported from {found}, not from {package}")
    command = [sys.executable, str(HERE.with_name("logged_lorafuse.py")), str(tmp / "log"), str(package)]
    options = ["--cli", shlex.join([*command, "convert"]), "--lorafuse", shlex.join(command)]
    options += ["-k", check] if check else []
    tmp.mkdir()
    try:
        (tmp / "log").mkdir()
        (tmp / "work").mkdir()
        del env["PYTHONPATH"]  # the corpus itself does not need lorafuse
        subprocess.run(
            [sys.executable, "-m", "bench.faithfulness.digests", "corpus", corpus, *options],
            env=env,
            cwd=HERE.parents[2],
            check=False,
        )
        for lost in (tmp / "log").glob("lost-*"):
            print("not logged:", lost.read_text(encoding="utf-8"), file=sys.stderr)
        return joined(json.loads(p.read_bytes()) for p in sorted((tmp / "log").glob("[0-9]*")))
    finally:
        shutil.rmtree(tmp, ignore_errors=True)


def joined(logs: Iterable[Results]) -> Results:
    """Equal keys become one; a file that came out differently has all its digests."""
    found: Results = {}
    for key, result in itertools.chain.from_iterable(log.items() for log in logs):
        into = found.setdefault(key, {})
        for name in result:
            into[name] = sorted({*into.get(name, []), *result[name]})
    return found


def compare(recorded: Results, now: Results) -> tuple[list[str], bool]:
    """Returns the lines of the report, and whether all is equal of what both sides have."""
    lines, n_equal, n_plans = [], 0, 0
    both = sorted(recorded.keys() & now.keys(), key=lambda key: (recorded[key]["check"], key))
    for key in both:
        a, b = recorded[key], now[key]
        names = [name for name in sorted(a.keys() | b.keys()) if a.get(name) != b.get(name)]
        n_equal += not names
        n_plans += "plan_id" in names
        if names:
            lines.append(f"different: {key} of {', '.join(a['check'])}: {', '.join(names)}")
    n_refused = sum("refused" in recorded[key] for key in both)
    lines.append(f"{len(both)} results compared ({n_refused} of them refusals): {n_equal} equal")
    lines.append(f"{len(both) - n_equal} different; plan_id differs in {n_plans}")
    for side, other, name in ((recorded, now, "the record"), (now, recorded, "this run")):
        alone = [key for key in side if key not in other]
        checks = sorted({check for key in alone for check in side[key]["check"]})
        lines.append(f"only {name} has {len(alone)}: {', '.join(checks)}")
    return lines, bool(both) and n_equal == len(both)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("action", choices=["record", "compare"])
    parser.add_argument("digests", type=Path, help="the JSON file to write, or to compare with")
    parser.add_argument("--corpus", type=Path, required=True)
    parser.add_argument("--package", type=Path, default=HERE.parents[2] / "convert")
    parser.add_argument("--tmp", type=Path, default=Path("/tmp/lorafuse-digests"), help="made, and removed")
    parser.add_argument("-k", metavar="NAME", help="only the corpus' checks with this in their name")
    args = parser.parse_args()
    recorded: Results = json.loads(args.digests.read_bytes()) if args.action == "compare" else {}
    now = run_corpus(args.corpus.resolve(), args.package.resolve(), args.tmp, args.k)
    if args.action == "record":
        lines = (f'"{key}": {json.dumps(now[key], sort_keys=True)}' for key in sorted(now))
        args.digests.write_text("{\n" + ",\n".join(lines) + "\n}\n", encoding="utf-8")
        print(f"{len(now)} results recorded")
        return 0
    lines, equal = compare(recorded, now)
    print("\n".join(lines))
    return not equal


if __name__ == "__main__":
    sys.exit(corpus_with_counted_names(sys.argv[2:]) if sys.argv[1:2] == ["corpus"] else main())
