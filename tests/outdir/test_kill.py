"""Real processes that are really killed, or whose system calls really fail; test_resume.py simulates every
call, this tries a few.

`make soak` kills for its share of LORAFUSE_SOAK hours, and says how often and where.
"""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import pytest
import warm as warm_process
from scenario import SHARD, Work, content

import lorafuse
from lorafuse.files.names import RECEIPT

N_KILLS, N_KILLS_SOAKED = 50, 150
ENVIRONMENT = os.environ | {"PYTHONPATH": str(Path(lorafuse.__file__).parents[1])}


@pytest.fixture(scope="module")
def warm():
    """warm(argv, …) has the exit status of the command, how long it took, and what it wrote to stderr."""
    with subprocess.Popen(
        [sys.executable, warm_process.__file__],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=ENVIRONMENT,
    ) as process:

        def run(argv, *, kill_after=None, strace=None):
            order = {"argv": argv, "kill_after": kill_after, "strace": strace}
            process.stdin.write(json.dumps(order) + "\n")
            process.stdin.flush()
            answer = json.loads(process.stdout.readline())
            if "refused" in answer:
                pytest.skip(f"may not trace here: {answer['refused']}")
            return SimpleNamespace(**answer)

        yield run
        process.stdin.close()


def command(inputs, work):
    return [
        "convert",
        "-q",
        *map(str, inputs),
        str(work.out),
        "--max-shard-size",
        SHARD,
        *(["--overwrite"] if work.old else []),
    ]


def n_finished(folder):
    """Shards of which a journal says that they are finished."""
    journals = [path.read_text() for path in folder.rglob("journal.jsonl")]
    return sum(line.startswith('{"finished"') for text in journals for line in text.splitlines())


@pytest.mark.soak
@pytest.mark.parametrize("way", ["beside", "exchange"])
def test_killed_at_any_time(way, inputs, clean, warm, tmp_path, monkeypatch, share_s, request, capsys):
    """Once, or several times until the run is through: then it is what it would have been."""
    rng = random.Random(None if share_s else 0)
    work, ends = Work(way, inputs, tmp_path / "work", monkeypatch), Counter()
    argv = command(inputs, work)
    wall_s = min(warm(argv if n == 0 else [*argv, "--overwrite"]).wall_s for n in range(3))
    work.reset()
    least, until = N_KILLS_SOAKED if share_s else N_KILLS, time.monotonic() + share_s
    while ends.total() < least or time.monotonic() < until or (len(ends) <= 3 and ends.total() < 4 * least):
        status = warm(argv, kill_after=rng.uniform(0, wall_s)).status
        complete = work.check_untouched(clean)
        if status == -signal.SIGKILL:
            ends["complete" if complete else f"{n_finished(work.path)} shards"] += 1
        else:
            assert (status, complete) in ((0, True), (7, True))
        if complete or rng.random() < 0.3:
            assert warm(argv).status in ((0, 7) if complete and not work.old else (0,))
            work.check_finished(clean)
            work.reset()
    assert len(ends) > 3, ends
    if share_s:
        tell(request.node.name, ends, capsys)


def tell(name, ends, capsys):
    said = ", ".join(f"{end}: {n}" for end, n in sorted(ends.items()))
    with capsys.disabled():
        sys.stdout.write(f"\n{name}: {ends.total()} kills ({said})\n")


@pytest.mark.soak
def test_a_batch_killed_at_any_time(inputs, clean, warm, tmp_path, share_s, request, capsys):
    """Each result is complete or not there, and at last all are."""
    rng, ends, out = random.Random(None if share_s else 0), Counter(), tmp_path / "out"
    names = ["a", "b", "c"]
    for name in names:
        shutil.copytree(inputs[1], tmp_path / "jobs" / name)
    argv = ["batch", "-q", str(inputs[0]), str(tmp_path / "jobs"), str(out), "--max-shard-size", SHARD]
    wall_s = warm(argv).wall_s
    shutil.rmtree(out)
    least, until = N_KILLS_SOAKED if share_s else N_KILLS, time.monotonic() + share_s
    while ends.total() < least or time.monotonic() < until:
        status = warm(argv, kill_after=rng.uniform(0, wall_s)).status
        assert status in (0, -signal.SIGKILL)
        there = [name for name in names if (out / name).exists()]
        assert all(same_weights(out / name, clean) for name in there)
        if status:
            ends[f"{len(there)} results, {n_finished(out) if out.exists() else 0} shards"] += 1
        if len(there) == len(names) or rng.random() < 0.3:
            assert warm(argv).status == 0
            assert sorted(path.name for path in out.iterdir()) == names
            assert all(same_weights(out / name, clean) for name in names)
            shutil.rmtree(out)
    assert len(ends) > 5, ends
    if share_s:
        tell(request.node.name, ends, capsys)


def same_weights(out, clean):
    """And everything else but the receipt, which names the adapter."""
    found = content(out)
    return found.keys() == clean.keys() and all(
        found[name] == clean[name] for name in clean if name != RECEIPT
    )


# ---- system calls, by strace


def traced(warm, inject, numbers, argv, *options):
    """The command with a fault in the Nth of certain system calls of a thread, for each N until there is no
    Nth: how it ended."""
    if not shutil.which("strace"):
        pytest.skip("needs strace")
    for n in numbers:
        trace = f"trace={inject.partition(':')[0]}"
        done = warm(argv, strace=[*options, "-e", trace, "-e", f"inject={inject}:when={n}"])
        yield done
        if done.status == 0:
            return


@pytest.mark.parametrize(
    "calls", ["write,pwrite64", "fsync", "rename,renameat2", "mkdir", "unlink,unlinkat,rmdir"]
)
def test_killed_in_a_system_call(calls, inputs, clean, warm, tmp_path, monkeypatch):
    work = Work("exchange", inputs, tmp_path / "work", monkeypatch)
    statuses = []
    for done in traced(warm, f"{calls}:signal=KILL", [2, 6, 18, 54], command(inputs, work)):
        statuses.append(done.status)
        work.check_untouched(clean)
        work.again()
        work.check_finished(clean)
        work.reset()
    assert statuses[0] == -signal.SIGKILL and {*statuses} <= {0, -signal.SIGKILL}, statuses


@pytest.mark.parametrize(
    ("inject", "of"),
    [
        ("write,pwrite64:error=ENOSPC", None),
        ("fsync:error=EIO", None),
        ("rename:error=EACCES", None),
        ("preadv,preadv2,pread64:error=EIO", "ckpt/model.safetensors"),
        ("read,preadv,preadv2,pread64:error=EIO", "adapter/adapter_model.safetensors"),
    ],
)
def test_a_system_call_that_fails(inject, of, inputs, clean, warm, tmp_path, monkeypatch):
    """Exit 5 and one line; then the same command finishes."""
    work = Work("exchange", inputs, tmp_path / "work", monkeypatch)
    options = ["-P", str(tmp_path / of)] if of else []
    statuses = []
    for done in traced(warm, inject, [1, 2, 3, 5, 9, 17, 33, 65, 129], command(inputs, work), *options):
        statuses.append(done.status)
        complete = work.check_untouched(clean)
        # The last write says where the result is, which then is there.
        assert done.status == 5 or (complete and done.status == 0), done.stderr
        assert not done.stderr or (done.stderr.startswith("Error: ") and done.stderr.count("\n") == 1), (
            done.stderr
        )
        work.again()
        work.check_finished(clean)
        work.reset()
    assert statuses[0] == 5 and statuses[-1] == 0, statuses
