"""The list of jobs, who takes which, and `lorafuse batch` on the command line."""

import errno
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import click
import pytest
import yaml
from build import adapter_tensors, checkpoint_tensors, files_of, write_checkpoint, write_told_adapter
from hypothesis import given
from hypothesis import strategies as st

from lorafuse import cli
from lorafuse.batching import passes
from lorafuse.batching.jobs import Job, checked_share, read_jobs, share_of
from lorafuse.errors import UsageError

ROOT = Path(__file__).resolve().parents[2]
PACKAGE_ROOT = str(Path(cli.__file__).parents[2])
# Those of one result are in project/test_examples.py.
OF_ONE = {"convert.sbatch", "commit.sbatch", "convert.yaml", "commit.yaml"}
EXAMPLES = sorted(path for path in (ROOT / "docs" / "examples").iterdir() if path.name not in OF_ONE)


# ---- JOBS


def test_lines(tmp_path):
    (tmp_path / "here").mkdir()
    lines = [
        {"adapter": "here", "name": "a"},
        {"adapter": "/abs/olute", "name": "b", "scale": 1},
        {"adapter": "org/name@v2", "name": "c", "dtype": "float16"},
        {"adapter": "here/such/dir", "name": "d"},
        {"adapter": "me/tuned/checkpoint-4", "name": "e"},
    ]
    path = tmp_path / "jobs.jsonl"
    path.write_text("\n" + "\n".join(map(json.dumps, lines)) + "\n\n")
    assert read_jobs(path) == [
        Job(str(tmp_path / "here"), "a"),
        Job("/abs/olute", "b", 1.0),
        Job("org/name@v2", "c", None, "float16"),
        Job(str(tmp_path / "here/such/dir"), "d"),
        Job("me/tuned/checkpoint-4", "e"),  # a folder of a repository
    ]


def test_a_relative_path_never_starts_at_the_working_directory(tmp_path, monkeypatch):
    (tmp_path / "org" / "name").mkdir(parents=True)
    (tmp_path / "lists").mkdir()
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "lists" / "jobs.jsonl"
    path.write_text(json.dumps({"adapter": "org/name", "name": "a"}))
    assert read_jobs(path) == [Job(str(tmp_path / "lists/org/name"), "a")]


def test_a_job_without_a_name_is_called_as_its_adapter(tmp_path):
    path = tmp_path / "jobs.jsonl"
    lines = [{"adapter": "runs/first/"}, {"adapter": "org/second@v2"}, {"adapter": "/abs/third/."}]
    path.write_text("\n".join(map(json.dumps, lines)))
    assert [job.name for job in read_jobs(path)] == ["first", "second", "third"]


GOOD = {"adapter": "x", "name": "n"}
NAME = "expected the name of a directory in OUT_ROOT, not hidden and no path"


@pytest.mark.parametrize(
    ("line", "complaint"),
    [
        ("not json", "is not valid JSON: Expecting value"),
        ("[" * 10**5, "RecursionError|recursion"),
        ("[]", 'is not an object with "adapter"'),
        ({"name": "x"}, 'is not an object with "adapter"'),
        ({"adapter": "/"}, "expected the name of a directory"),
        (
            GOOD | {"rank": 4, "alpha": 1},
            "has the unknown key alpha, rank; known are adapter, name, scale, dtype",
        ),
        (GOOD | {"adapter": ""}, "the adapter is ; expected a directory or a hub id"),
        (GOOD | {"adapter": 3}, "the adapter is 3; expected"),
        (GOOD | {"adapter": "a\0b"}, "the adapter is a.x00b; expected"),
        (GOOD | {"scale": "2"}, "the scale is '2'; expected a finite number"),
        (GOOD | {"scale": 10**400}, f"the scale is 1{'0' * 48}…; expected a finite number"),
        (GOOD | {"scale": True}, "the scale is True; expected"),
        ('{"adapter": "x", "name": "n", "scale": NaN}', "the scale is nan; expected"),
        (GOOD | {"dtype": "int8"}, "the dtype is int8; expected one of auto, float32, float16, bfloat16"),
        *(
            (GOOD | {"name": name}, NAME)
            for name in ("", ".", "..", ".hidden", "a/b", "../a", "/a", "a\0", "a\nb", "é" * 101, 7)
        ),
        ({"adapter": "y", "name": "first"}, "the name first is also that of line 1"),
    ],
)
def test_lines_that_are_refused(line, complaint, tmp_path):
    path = tmp_path / "jobs.jsonl"
    path.write_text(
        json.dumps({"adapter": "x", "name": "first"})
        + "\n\n"
        + (line if isinstance(line, str) else json.dumps(line))
    )
    with pytest.raises(UsageError, match=complaint) as e:
        read_jobs(path)
    assert str(e.value).startswith(f"{path}, line 3: ")


def test_no_jobs(tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "jobs.jsonl").write_text("\n")
    for name, complaint in {
        "empty": "has no sub-directory",
        "jobs.jsonl": "has no line",
        "nowhere": "no such file",
    }.items():
        with pytest.raises(UsageError, match=complaint):
            read_jobs(tmp_path / name)


# ---- shares


@given(n_jobs=st.integers(0, 60), of=st.integers(1, 20))
def test_shares_partition_the_jobs(n_jobs, of):
    jobs = [Job("x", str(i)) for i in range(n_jobs)]
    shares = [share_of(jobs, index, of) for index in range(of)]
    assert sorted((job for share in shares for job in share), key=lambda job: int(job.name)) == jobs
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


@given(first=st.integers(0, 9), step=st.integers(1, 5), count=st.integers(1, 20))
def test_the_tasks_of_an_array_take_each_share_once(first, step, count):
    """Wherever the array starts, in whatever steps it goes."""
    tasks = range(first, first + step * count, step)
    facts = {"COUNT": count, "MIN": tasks[0], "MAX": tasks[-1], "STEP": step}
    environs = [
        {f"SLURM_ARRAY_TASK_{k}": str(v) for k, v in facts.items()} | {"SLURM_ARRAY_TASK_ID": str(i)}
        for i in tasks
    ]
    assert [checked_share(None, None, environ) for environ in environs] == [(i, count) for i in range(count)]


@pytest.mark.parametrize(
    ("environ", "share"),
    [
        ({}, (0, 1)),
        ({"SLURM_ARRAY_TASK_ID": "2", "SLURM_ARRAY_TASK_COUNT": "3"}, (2, 3)),
        ({"JOB_COMPLETION_INDEX": "0", "JOB_COMPLETIONS": "5"}, (0, 5)),
        ({"JOB_COMPLETIONS": "5"}, (0, 1)),
    ],
)
def test_shares_by_environment(environ, share):
    assert checked_share(None, None, environ) == share
    assert checked_share(1, 2, environ) == (1, 2)


@pytest.mark.parametrize(
    ("index", "of", "environ", "complaint"),
    [
        (1, None, {}, "--index and --of go together"),
        (
            None,
            4,
            {"SLURM_ARRAY_TASK_ID": "0", "SLURM_ARRAY_TASK_COUNT": "1"},
            "--index and --of go together",
        ),
        (4, 4, {}, "index is 4 of 4; expected 0 to 3"),
        (-1, 4, {}, "index is -1 of 4"),
        (0, 0, {}, "of is 0; expected at least 1"),
        (
            None,
            None,
            {"JOB_COMPLETION_INDEX": "0"},
            "JOB_COMPLETIONS is not set; expected a number, or give --index and --of",
        ),
        (
            None,
            None,
            {"SLURM_ARRAY_TASK_ID": "x", "SLURM_ARRAY_TASK_COUNT": "1"},
            "SLURM_ARRAY_TASK_ID is x; expected a number",
        ),
        (
            None,
            None,
            {
                f"SLURM_ARRAY_TASK_{k}": v
                for k, v in {"ID": "5", "COUNT": "3", "MIN": "1", "MAX": "9", "STEP": "1"}.items()
            },
            "a list with holes",
        ),
    ],
)
def test_shares_that_are_refused(index, of, environ, complaint):
    with pytest.raises(UsageError, match=complaint):
        checked_share(index, of, environ)


# ---- the command


@pytest.fixture
def inputs(tmp_path, monkeypatch):
    for name in ("SLURM_ARRAY_TASK_ID", "JOB_COMPLETION_INDEX"):
        monkeypatch.delenv(name, raising=False)
    write_checkpoint(tmp_path / "ckpt")
    for name in ("good", "other"):
        write_told_adapter(tmp_path / "jobs" / name)
    return [tmp_path / "ckpt", tmp_path / "jobs", tmp_path / "out"]


@pytest.fixture
def run(capsys):
    """(arguments) → exit code, stdout, stderr of `lorafuse batch`."""

    def call(*args):
        handler = signal.getsignal(signal.SIGTERM)
        code = 0
        try:
            cli.batch.main([str(arg) for arg in args], prog_name="lorafuse batch")
        except SystemExit as e:
            code = int(e.code or 0)
        finally:
            signal.signal(signal.SIGTERM, handler)
        out, err = capsys.readouterr()
        assert "Traceback" not in out + err
        return code, out, err

    return call


def test_results_on_stdout_and_a_line_for_each_job_on_stderr(inputs, run):
    """What was kept, each failure once, and the sum."""
    out = inputs[2]
    code, stdout, stderr = run(*inputs)
    assert (code, stdout) == (0, f"{out}/good\n{out}/other\n")
    kept = r"99\.\d% of the update kept, 99\.\d% where it is least"
    done = rf"(good|other): done, {kept}; 13\.\d KB in \d\.\d s\n"
    assert re.fullmatch(rf"({done}){{2}}In all: 2 done; 26\.\d KB in \d?.*\.\n", stderr), stderr
    (inputs[1] / "bad").mkdir()
    code, stdout, stderr = run(*inputs)
    assert (code, stdout) == (9, f"{out}/good\n{out}/other\n")
    config = inputs[1] / "bad" / "adapter_config.json"
    why = f"bad: failed with exit code 4: {config}: not found; {inputs[1] / 'bad'} is no PEFT adapter.\n"
    there = "".join(f"{name}: skipped, its result is there already\n" for name in ("good", "other"))
    error = "Error: 1 of 3 jobs failed; the others are complete.\n"
    assert stderr == f"{why}{there}In all: 1 failed, 2 skipped.\n{error}"
    assert run("-q", *inputs)[2] == why + error


def test_nothing_is_said_to_be_complete_that_is_not(inputs, run):
    """When all jobs fail, and when nothing ran."""
    (inputs[1] / "bad").mkdir()
    code, stdout, stderr = run("--dry-run", *inputs)
    assert (code, stderr.splitlines()[-1]) == (9, "Error: 1 of 3 jobs would fail; nothing was written.")
    assert stdout.splitlines()[-1].startswith("In all: 1 failed, 2 planned; writes 21.8 KB; disk ")
    for name in ("good", "other"):
        shutil.rmtree(inputs[1] / name)
    code, stdout, stderr = run(*inputs)
    assert (code, stdout) == (9, "")
    assert stderr.splitlines()[-1] == "Error: 1 of 1 jobs failed; none is complete."


def test_updates_that_are_lost_are_warned_of(inputs, run):
    """As convert does."""
    tensors = adapter_tensors(checkpoint_tensors(), 0.01)
    write_told_adapter(inputs[1] / "tiny", tensors)
    code, _, stderr = run(*inputs)
    assert code == 0
    (warning,) = [line for line in stderr.splitlines() if line.startswith("Warning: ")]
    assert re.match(
        r"Warning: tiny: \d weights keep less than 97% of the update, .* --dtype float16", warning
    )


def test_events(inputs, run):
    code, stdout, _ = run("--json", *inputs)
    events = [json.loads(line) for line in stdout.splitlines()]
    assert code == 0
    assert [e["job"] for e in events if e["event"] == "plan"] == ["good", "other"]
    assert next(e["jobs"] for e in events if e["event"] == "pass") == ["good", "other"]
    assert [(e["job"], e["state"]) for e in events if e["event"] == "job"] == [
        ("good", "done"),
        ("other", "done"),
    ]
    assert {e["event"] for e in events} == {"plan", "pass", "shard", "job", "total"}


def test_dry_run(inputs, run):
    before = files_of(inputs[0].parent)
    code, stdout, stderr = run("--dry-run", "-q", *inputs)
    assert (code, stderr) == (0, "")
    disk = r"disk \d+ KB needed, [\d,.]+ [GT]B free; less than a second"
    one = rf"changes 4 of 21 weights; writes 10\.9 KB; {disk}; pass 1"
    base, *planned = stdout.splitlines(keepends=True)
    assert base == f"base: {inputs[0]}: llama: 21 weights in full precision\n"
    jobs = rf"good: {one}\nother: {one}\nIn all: 2 planned; writes 21\.8 KB; {disk}\n"
    assert re.fullmatch(jobs, "".join(planned))
    assert files_of(inputs[0].parent) == before and not inputs[2].exists()


@pytest.mark.parametrize(
    "options",
    [
        ["--index", "1"],
        ["--of", "2"],
        ["--share", "x"],
        ["--index", "2", "--of", "2"],
        ["--adapter-scale", "nan"],
    ],
)
def test_usage(options, inputs, run):
    code, stdout, stderr = run(*inputs, *options)
    assert (code, stdout) == (2, "") and "Error: " in stderr and not inputs[2].exists()


def test_usage_needs_no_torch(inputs):
    inputs[1] = inputs[1] / "nowhere"
    code = "import sys; sys.modules['torch'] = None; from lorafuse.cli import main; main()"
    command = [
        sys.executable,
        "-c",
        f"import sys; sys.path.insert(0, {PACKAGE_ROOT!r}); {code}",
        "batch",
        *map(str, inputs),
    ]
    done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2
    assert done.stderr == f"Error: {inputs[1]}: no such file or directory.\n"


@pytest.mark.parametrize(("error", "code"), [(KeyboardInterrupt, 130), (None, 143)])
def test_signals(error, code, inputs, run, monkeypatch):
    """What is finished stays."""
    monkeypatch.setattr(passes, "MAX_MEMBERS", 1)
    make_plan = passes.make_plan

    def interrupted(*args, **options):
        if (inputs[2] / "good").exists():
            if error:
                raise error
            signal.raise_signal(signal.SIGTERM)
        return make_plan(*args, **options)

    monkeypatch.setattr(passes, "make_plan", interrupted)
    found, stdout, stderr = run(*inputs)
    assert (found, stdout) == (code, f"{inputs[2]}/good\n")
    assert stderr.endswith("Error: interrupted; what is finished stays, and the same command goes on.\n")
    monkeypatch.undo()
    assert run(*inputs)[0] == 0


def test_a_job_that_cannot_even_be_looked_at_fails_alone(inputs, run):
    """A path that is too long, that no file system can spell, of an unknown kind, or a link to nowhere."""
    ckpt, jobs, out = inputs
    (jobs / "lost").symlink_to("/nowhere/at/all")
    assert run(ckpt, jobs, out)[:2] == (9, f"{out}/good\n{out}/other\n")
    adapters = {
        "long": "/" + "x" * 300,
        "odd": "\ud800",
        "kind": "gopher://there",
        "fine": str(jobs / "good"),
    }
    lines = [json.dumps({"adapter": adapter, "name": name}) for name, adapter in adapters.items()]
    listed = jobs.with_name("jobs.jsonl")
    listed.write_text("\n".join(lines))
    code, stdout, stderr = run(ckpt, listed, out)
    assert (code, stdout) == (9, f"{out}/fine\n") and "3 of 4 jobs failed" in stderr
    assert "gopher" in stderr and "Traceback" not in stderr and "report it" not in stderr


def test_a_job_in_a_directory_that_may_not_be_entered_fails_alone(inputs, run, monkeypatch):
    """Root may enter any directory, so the kernel's answer to others is given here."""
    ckpt, jobs, out = inputs
    locked, stat = str(jobs.with_name("locked") / "x"), os.stat

    def refused(path, *args, **options):
        if str(path).startswith(locked):
            raise PermissionError(errno.EACCES, "Permission denied", path)
        return stat(path, *args, **options)

    monkeypatch.setattr(os, "stat", refused)
    lines = [{"adapter": locked, "name": "x"}, {"adapter": str(jobs / "good"), "name": "y"}]
    (jobs.with_name("jobs.jsonl")).write_text("\n".join(map(json.dumps, lines)))
    code, stdout, stderr = run("-q", ckpt, jobs.with_name("jobs.jsonl"), out)
    assert (code, stdout) == (9, f"{out}/y\n")
    assert stderr.startswith(f"x: failed with exit code 5: {locked}: Permission denied.\n")


# ---- docs


def options_of(text):
    """Options that follow `lorafuse batch` in a script, its continued lines joined."""
    calls = re.findall(r"lorafuse batch(?:[^\n\\]|\\\n)*", text)
    return [option for call in calls for option in re.findall(r"(?<![\w-])--[a-z-]+", call)]


def test_examples_name_options_that_exist():
    known = {
        "--help",
        *(name for one in cli.batch.params if isinstance(one, click.Option) for name in one.opts),
    }
    texts = [path.read_text() for path in [*EXAMPLES, ROOT / "docs" / "batch.md", ROOT / "README.md"]]
    assert all("lorafuse batch" in text for text in texts)
    assert {option for text in texts for option in options_of(text)} <= known
    manifests = [
        yaml.safe_load(text) for path, text in zip(EXAMPLES, texts, strict=False) if path.suffix == ".yaml"
    ]
    commands = [
        word for one in manifests for word in one["spec"]["template"]["spec"]["containers"][0]["command"]
    ]
    assert {word for word in commands if word.startswith("-")} <= known
    shown = re.search(r"```\n\$ lorafuse batch --help\n(.*?)```", texts[-2], re.S)[1]
    from click.testing import CliRunner

    assert shown == CliRunner().invoke(cli.batch, ["--help"], prog_name="lorafuse batch").output


@pytest.mark.parametrize(
    "path", [path for path in EXAMPLES if path.suffix in (".sbatch", ".sh")], ids=lambda path: path.name
)
def test_scripts_parse(path):
    subprocess.run(["bash", "-n", str(path)], check=True)
    subprocess.run(["bash", "-n"], input=path.read_text(), text=True, check=True)


@pytest.mark.parametrize(
    "path", [path for path in EXAMPLES if path.suffix == ".yaml"], ids=lambda path: path.name
)
def test_manifests_run_an_indexed_job(path):
    """Each pod finds its index, which Kubernetes sets, and how many there are, which it does not."""
    [job] = [one for one in yaml.safe_load_all(path.read_text()) if one["kind"] == "Job"]
    spec = job["spec"]
    assert job["apiVersion"] == "batch/v1" and spec["completionMode"] == "Indexed"
    [container] = spec["template"]["spec"]["containers"]
    environ = {one["name"]: one["value"] for one in container["env"]}
    assert environ["JOB_COMPLETIONS"] == str(spec["completions"])
    shares = [
        checked_share(None, None, environ | {"JOB_COMPLETION_INDEX": str(i)})
        for i in range(spec["completions"])
    ]
    assert shares == [(i, spec["completions"]) for i in range(spec["completions"])]
    mounts = {mount["mountPath"] for mount in container["volumeMounts"]}
    arguments = [word for word in container["command"] if word.startswith("/")]
    assert all(any(word.startswith(mount) for mount in mounts) for word in arguments)
