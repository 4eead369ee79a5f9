"""A batch whose results go to repositories on the hub, too."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import build
import pytest
from click.testing import CliRunner
from hub_server import HubServer

import lorafuse
from lorafuse.batching import passes
from lorafuse.cli import lorafuse as command
from lorafuse.errors import OutDirError, StorageError, UsageError
from lorafuse.settings import Push

OPTIONS: dict[str, Any] = {"push_to_hub": "me/{name}", "max_shard_size": 3000, "memory_limit": "300MB"}


@pytest.fixture
def ckpt(tmp_path: Path) -> Path:
    return build.write_checkpoint(tmp_path / "ckpt", n_shards=2)


@pytest.fixture
def jobs(tmp_path: Path) -> Path:
    """Two adapters for q_proj alone: the results share most of their files."""
    for n, name in enumerate("ab", 1):
        tensors = build.adapter_tensors(build.checkpoint_tensors())
        some = {key: tensor * n for key, tensor in tensors.items() if "q_proj" in key}
        build.write_adapter(tmp_path / "jobs" / name, some, target_modules=["q_proj"])
    return tmp_path / "jobs"


def files_on(hub: HubServer, repo: str, revision: str = "main") -> dict[str, bytes]:
    found = hub.repos[repo]
    files = build.files_of(found.path(found.refs[revision]))
    return {name: data for name, data in files.items() if name != ".gitattributes"}


@pytest.mark.parametrize("share", ["hardlink", "copy"])
@pytest.mark.parametrize("most", [32, 1])
def test_each_result_has_its_repository(
    hub: HubServer,
    ckpt: Path,
    jobs: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    share: str,
    most: int,
) -> None:
    """It gets what OUT_ROOT/NAME gets, in one commit, files that results share too, in one pass or in two;
    nothing of this machine's paths."""
    monkeypatch.setattr(passes, "MAX_MEMBERS", most)
    events: list[Any] = []
    states = lorafuse.batch(ckpt, jobs, tmp_path / "out", share=share, on_event=events.append, **OPTIONS)
    assert [(state.state, state.error) for state in states] == [("done", None)] * 2
    alone = build.files_of(tmp_path / "out/a")
    lorafuse.convert(ckpt, jobs / "a", tmp_path / "single", max_shard_size=3000)
    for name in "ab":
        here, there = build.files_of(tmp_path / "out" / name), files_on(hub, f"me/{name}")
        assert here.keys() == there.keys() and "README.md" in there
        assert {file for file in here if here[file] != there[file]} == {"lorafuse_receipt.json"}
        assert not [file for file, data in there.items() if str(tmp_path).encode() in data]
        assert len(hub.repos[f"me/{name}"].commits) == 2  # the first made the repository
    tensors = {file for file in alone if file.endswith(".safetensors")}
    assert len(tensors) > 3
    urls = {event["job"]: event["url"] for event in events if event["event"] == "job"}
    assert urls == {
        name: f"{hub.url}/me/{name}/commit/{hub.repos[f'me/{name}'].commits[-1]}" for name in "ab"
    }
    assert not list(tmp_path.glob("out/.*"))


def test_what_is_there_already(hub: HubServer, ckpt: Path, jobs: Path, tmp_path: Path) -> None:
    """It is skipped where the hub holds it. Where the hub does not, the job fails, and --overwrite helps."""
    lorafuse.batch(ckpt, jobs, tmp_path / "out", max_shard_size=3000)
    states = lorafuse.batch(ckpt, jobs, tmp_path / "out", **OPTIONS)
    assert [type(state.error) for state in states] == [OutDirError] * 2
    assert str(states[0].error) == (
        f"{tmp_path}/out/a: is complete here, but me/a on the hub does not hold it; overwrite=True makes it "
        "again, and pushes it."
    )
    assert "me/a" not in hub.repos
    states = lorafuse.batch(ckpt, jobs, tmp_path / "out", overwrite=True, **OPTIONS)
    assert [state.state for state in states] == ["done"] * 2
    states = lorafuse.batch(ckpt, jobs, tmp_path / "out", **OPTIONS)
    assert [state.state for state in states] == ["skipped"] * 2
    on_branch = Push("me/{name}", revision="v2")
    states = lorafuse.batch(ckpt, jobs, tmp_path / "out", **OPTIONS | {"push_to_hub": on_branch})
    assert [state.state for state in states] == ["failed"] * 2
    assert len(hub.repos["me/a"].commits) == 2
    other = lorafuse.convert(ckpt, jobs / "b", tmp_path / "b", max_shard_size=3000, push_to_hub="me/a")
    assert other["outputs"]
    states = lorafuse.batch(ckpt, jobs, tmp_path / "out", **OPTIONS)
    assert [state.state for state in states] == ["failed", "skipped"]


def test_one_repository_that_refuses(hub: HubServer, ckpt: Path, jobs: Path, tmp_path: Path) -> None:
    """It costs its own job alone, whose result is not there either, and the same call goes on."""
    adapter = build.write_adapter(tmp_path / "other")
    hub.add("me/a", adapter)
    states = lorafuse.batch(ckpt, jobs, tmp_path / "out", **OPTIONS)
    assert [(state.name, state.state) for state in states] == [("a", "failed"), ("b", "done")]
    assert "me/a: holds an adapter" in str(states[0].error)
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["b"]


def test_a_commit_that_fails(hub: HubServer, ckpt: Path, jobs: Path, tmp_path: Path) -> None:
    """The result is not in OUT_ROOT before it is on the hub; the next call goes on."""

    def refuse(request: Any, path: str) -> bool:
        if "/me/a/commit/" not in path:
            return False
        request.answer(403, b"{}")
        return True

    hub.faults.append(refuse)
    states = lorafuse.batch(ckpt, jobs, tmp_path / "out", **OPTIONS)
    assert [(state.name, state.state) for state in states] == [("a", "failed"), ("b", "done")]
    assert isinstance(states[0].error, StorageError) and not (tmp_path / "out/a").exists()
    hub.faults.clear()
    states = lorafuse.batch(ckpt, jobs, tmp_path / "out", **OPTIONS)
    assert [(state.name, state.state) for state in states] == [("a", "done"), ("b", "skipped")]
    assert build.files_of(tmp_path / "out/a").keys() == files_on(hub, "me/a").keys()


def test_repositories_of_lines(hub: HubServer, ckpt: Path, jobs: Path, tmp_path: Path) -> None:
    """A job's own repo goes before the option, and stands without it, beside jobs that stay here."""
    lines = [{"adapter": "jobs/a", "repo": "you/special"}, {"adapter": "jobs/b"}]
    (tmp_path / "jobs.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    ran = CliRunner().invoke(
        command, ["batch", str(ckpt), str(tmp_path / "jobs.jsonl"), str(tmp_path / "out")]
    )
    assert ran.exit_code == 0 and hub.repos.keys() == {"you/special"}
    said = re_line(ran.stderr, "a: done")
    assert said.endswith(f"; pushed: {hub.url}/you/special/commit/{hub.repos['you/special'].commits[-1]}")
    assert "pushed" not in re_line(ran.stderr, "b: done")
    private = ["--push-to-hub", "me/x-{name}", "--private"]
    ran = CliRunner().invoke(
        command, ["batch", str(ckpt), str(tmp_path / "jobs.jsonl"), str(tmp_path / "new"), *private]
    )
    assert ran.exit_code == 9  # you/special is public
    assert hub.repos["me/x-b"].private and "you/special: is public" in ran.stderr


def re_line(text: str, start: str) -> str:
    return next(line for line in text.splitlines() if line.startswith(start))


def test_from_the_hub_to_the_hub(hub: HubServer, ckpt: Path, jobs: Path, tmp_path: Path) -> None:
    hub.add("org/base", ckpt)
    states = lorafuse.batch("org/base", jobs, tmp_path / "out", stream=True, **OPTIONS)
    assert [state.state for state in states] == ["done"] * 2
    assert build.files_of(tmp_path / "out/b").keys() == files_on(hub, "me/b").keys()
    assert lorafuse.verify(tmp_path / "out/b", ckpt=ckpt, adapters=jobs / "b")["weights"] > 10
    assert not list((tmp_path / "home").rglob("*.safetensors"))


@pytest.mark.parametrize(
    ("push", "said"),
    [
        ("me/merged", "The results a and b would both go to me/merged; give a pattern, such as me/{name}, or "
                      "a repo for each job."),
        ("me", "'me' is no repository on the hub; expected a name such as me/merged."),
        (Push("me/{name}", create_pr=True), "create_pr=True is for a single merge; "),
    ],
)  # fmt: skip
def test_wrong_patterns(ckpt: Path, jobs: Path, tmp_path: Path, push: Any, said: str) -> None:
    with pytest.raises(UsageError) as caught:
        lorafuse.batch(ckpt, jobs, tmp_path / "out", push_to_hub=push, dry_run=True)
    assert str(caught.value).startswith(said)


def test_a_name_that_no_repository_can_have(ckpt: Path, jobs: Path, tmp_path: Path) -> None:
    (jobs / "a").rename(jobs / "my run")
    with pytest.raises(UsageError, match=r"^my run: 'me/my run' is no repository on the hub; expected"):
        lorafuse.batch(ckpt, jobs, tmp_path / "out", push_to_hub="me/{name}")
    with pytest.raises(UsageError, match=r"^push_to_hub is 'me/\{name\}'; \{name\} is for a batch\.$"):
        lorafuse.convert(ckpt, jobs / "b", tmp_path / "out", push_to_hub="me/{name}")


def test_a_dry_run_asks_nobody(hub: HubServer, ckpt: Path, jobs: Path, tmp_path: Path) -> None:
    states = lorafuse.batch(ckpt, jobs, tmp_path / "out", dry_run=True, **OPTIONS)
    assert [state.state for state in states] == ["planned"] * 2 and hub.log == []
    arguments = [
        "batch",
        str(ckpt),
        str(jobs),
        str(tmp_path / "out"),
        "--dry-run",
        "--push-to-hub",
        "me/{name}",
    ]
    ran = CliRunner().invoke(command, arguments)
    assert [line.rpartition("; ")[2] for line in ran.stdout.splitlines()[1:3]] == ["to me/a", "to me/b"]


@pytest.mark.parametrize("after", [2, 9])
def test_killed_on_the_way(hub: HubServer, ckpt: Path, jobs: Path, tmp_path: Path, after: int) -> None:
    """From the hub to the hub: the same call goes on, and nothing is left beside the results."""
    hub.add("org/base", ckpt)
    n = 0

    def kill(request: Any, path: str) -> bool:
        nonlocal n
        n += "/upload/" in path
        if n == after:
            process.kill()
        return False

    hub.faults.append(kill)
    arguments = [
        "batch",
        "org/base",
        str(jobs),
        str(tmp_path / "out"),
        "--stream",
        "--push-to-hub",
        "me/{name}",
    ]
    process = subprocess.Popen(
        [sys.executable, "-m", "lorafuse", *arguments, "--max-shard-size", "1000", "-q"],
        env=os.environ | hub.environ(tmp_path / "home"),
        stdout=subprocess.DEVNULL,
    )
    assert process.wait(60) == -signal.SIGKILL
    hub.faults.clear()
    options = OPTIONS | {"max_shard_size": 1000, "memory_limit": "100MB"}
    states = lorafuse.batch("org/base", jobs, tmp_path / "out", stream=True, **options)
    assert {state.state for state in states} <= {"done", "skipped"}
    lorafuse.batch(ckpt, jobs, tmp_path / "local", max_shard_size=1000)
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"a", "b"}
    for name in "ab":
        there, local = files_on(hub, f"me/{name}"), build.files_of(tmp_path / "local" / name)
        made = local.keys() - {"lorafuse_receipt.json"}
        assert {file: there[file] for file in made} == {file: local[file] for file in made}
