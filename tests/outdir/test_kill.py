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

import pytest
from scenario import SHARD, Work, content, five_shards, uninterrupted

import lorafuse
from lorafuse.files.names import RECEIPT

N_KILLS = 150
ENVIRONMENT = os.environ | {
    "PYTHONPATH": str(Path(lorafuse.__file__).parents[1]),
    "PYTHONDONTWRITEBYTECODE": "1",
}
# One process imports torch, and forks for each command line it is given: {"argv", "kill_after"} to {"status",
# "wall_s"}.
WARM = """
import json, os, signal, sys, time
import lorafuse.batching.batch
from lorafuse.cli import main
for line in sys.stdin:
    order = json.loads(line)
    began = time.monotonic()
    child = os.fork()
    if not child:
        sys.stdin = sys.stdout = sys.stderr = open(os.devnull, "r+")
        sys.argv = ["lorafuse", *order["argv"]]
        try:
            main()
        except SystemExit as e:
            os._exit(e.code or 0)
    if order["kill_after"] is not None:
        time.sleep(order["kill_after"])
        os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    wall_s = time.monotonic() - began
    print(json.dumps({"status": os.waitstatus_to_exitcode(status), "wall_s": wall_s}), flush=True)
"""


@pytest.fixture
def inputs(tmp_path):
    return five_shards(tmp_path)


@pytest.fixture
def clean(inputs, tmp_path):
    return uninterrupted(inputs, tmp_path / "clean")


@pytest.fixture
def warm():
    """warm(argv, kill_after) is the exit status of the command and how long it took."""
    with subprocess.Popen(
        [sys.executable, "-c", WARM],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=ENVIRONMENT,
    ) as process:

        def run(argv, kill_after=None):
            process.stdin.write(json.dumps({"argv": argv, "kill_after": kill_after}) + "\n")
            process.stdin.flush()
            answer = json.loads(process.stdout.readline())
            return answer["status"], answer["wall_s"]

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
    wall_s = min(warm(argv if n == 0 else [*argv, "--overwrite"])[1] for n in range(3))
    work.reset()
    until = time.monotonic() + share_s
    while ends.total() < N_KILLS or time.monotonic() < until:
        status, _ = warm(argv, rng.uniform(0, wall_s))
        complete = work.check_untouched(clean)
        if status == -signal.SIGKILL:
            ends["complete" if complete else f"{n_finished(work.path)} shards"] += 1
        else:
            assert (status, complete) in ((0, True), (7, True))
        if complete or rng.random() < 0.3:
            assert warm(argv)[0] in ((0, 7) if complete and not work.old else (0,))
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
    _, wall_s = warm(argv)
    shutil.rmtree(out)
    until = time.monotonic() + share_s
    while ends.total() < N_KILLS or time.monotonic() < until:
        status, _ = warm(argv, rng.uniform(0, wall_s))
        assert status in (0, -signal.SIGKILL)
        there = [name for name in names if (out / name).exists()]
        assert all(same_weights(out / name, clean) for name in there)
        if status:
            ends[f"{len(there)} results, {n_finished(out) if out.exists() else 0} shards"] += 1
        if len(there) == len(names) or rng.random() < 0.3:
            assert warm(argv)[0] == 0
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


def traced(inject, numbers, argv, *options):
    """The command with a fault in the Nth of certain system calls of a thread, for each N until there is no
    Nth: how it ended."""
    if not shutil.which("strace"):
        pytest.skip("needs strace")
    for n in numbers:
        strace = [
            "strace",
            "-f",
            "-qqq",
            "-o",
            "/dev/null",
            *options,
            "-e",
            f"trace={inject.partition(':')[0]}",
        ]
        strace += ["-e", f"inject={inject}:when={n}", sys.executable, "-m", "lorafuse.cli"]
        done = subprocess.run(
            [*strace, *argv], env=ENVIRONMENT, capture_output=True, text=True, timeout=120, check=False
        )
        if "ptrace" in done.stderr.lower():
            pytest.skip(f"may not trace here: {done.stderr.strip()}")
        yield done
        if done.returncode == 0:
            return


@pytest.mark.parametrize("calls", ["write", "fsync", "rename,renameat2", "mkdir", "unlink,unlinkat,rmdir"])
def test_killed_in_a_system_call(calls, inputs, clean, tmp_path, monkeypatch):
    work = Work("exchange", inputs, tmp_path / "work", monkeypatch)
    statuses = []
    for done in traced(f"{calls}:signal=KILL", [2, 6, 18, 54], command(inputs, work)):
        statuses.append(done.returncode)
        work.check_untouched(clean)
        work.again()
        work.check_finished(clean)
        work.reset()
    assert statuses[0] == -signal.SIGKILL and {*statuses} <= {0, -signal.SIGKILL}, statuses


@pytest.mark.parametrize(
    ("inject", "of"),
    [
        ("write:error=ENOSPC", None),
        ("fsync:error=EIO", None),
        ("rename:error=EACCES", None),
        ("preadv,preadv2,pread64:error=EIO", "ckpt/model.safetensors"),
        ("read,preadv,preadv2,pread64:error=EIO", "adapter/adapter_model.safetensors"),
    ],
)
def test_a_system_call_that_fails(inject, of, inputs, clean, tmp_path, monkeypatch):
    """Exit 5 and one line; then the same command finishes."""
    work = Work("exchange", inputs, tmp_path / "work", monkeypatch)
    options = ["--seccomp-bpf", *(["-P", str(tmp_path / of)] if of else [])]
    statuses = []
    for done in traced(inject, [1, 2, 3, 5, 9, 17, 33, 65, 129], command(inputs, work), *options):
        statuses.append(done.returncode)
        complete = work.check_untouched(clean)
        # The last write says where the result is, which then is there.
        assert done.returncode == 5 or (complete and done.returncode == 0), done.stderr
        assert not done.stderr or (done.stderr.startswith("Error: ") and done.stderr.count("\n") == 1), (
            done.stderr
        )
        work.again()
        work.check_finished(clean)
        work.reset()
    assert statuses[0] == 5 and statuses[-1] == 0, statuses
