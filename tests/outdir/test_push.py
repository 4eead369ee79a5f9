"""A result that goes to a repository on the hub, which is a server on this machine."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import build
import pytest
from hub_server import HubServer

import lorafuse
from lorafuse.cli import convert as command
from lorafuse.errors import OutDirError, StorageError, UsageError
from lorafuse.settings import Push


@pytest.fixture
def pair(tmp_path: Path) -> tuple[Path, Path]:
    return build.write_checkpoint(tmp_path / "ckpt", n_shards=2), build.write_adapter(tmp_path / "lora")


def files_on(hub: HubServer, repo: str, revision: str = "main") -> dict[str, bytes]:
    found = hub.repos[repo]
    files = build.files_of(found.path(found.refs[revision]))
    return {name: data for name, data in files.items() if name != ".gitattributes"}


def pushed_options(**options: Any) -> dict[str, Any]:
    return {"max_shard_size": 3000, "push_to_hub": "me/merged", **options}


def test_push(hub: HubServer, pair: tuple[Path, Path], tmp_path: Path) -> None:
    """The repository gets what OUT_DIR gets, in one commit; files of weights went before it."""
    events: list[Any] = []
    lorafuse.convert(*pair, tmp_path / "out", on_event=events.append, **pushed_options())
    here, there = build.files_of(tmp_path / "out"), files_on(hub, "me/merged")
    assert here.keys() == there.keys() and "README.md" in there
    assert {name for name in here if here[name] != there[name]} == {"lorafuse_receipt.json"}
    repo = hub.repos["me/merged"]
    assert len(repo.commits) == 2  # the first made the repository
    assert repo.messages == [f"Merge of lora into ckpt by lorafuse {lorafuse.__version__}"]
    n_shards = sum(name.endswith(".safetensors") for name in there)
    order = [path for _, path, _ in hub.log if "/upload/" in path or "/commit/" in path]
    assert n_shards > 3 and len(order) == n_shards + 1 and "/commit/" in order[-1]
    done = events[-1]
    assert done["url"] == f"{hub.url}/me/merged/commit/{repo.commits[-1]}" and done["kept_here"]
    assert not list(tmp_path.glob(".out*"))


def test_no_path_of_this_machine(hub: HubServer, pair: tuple[Path, Path], tmp_path: Path) -> None:
    """What is uploaded names inputs by their directories' names; the receipt here keeps the paths. All else
    in it is the same."""
    second = build.write_adapter(tmp_path / "second")
    lorafuse.convert(*pair, tmp_path / "out", adapters=[(second, 0.5)], **pushed_options())
    there = files_on(hub, "me/merged")
    for name, data in there.items():
        assert str(tmp_path).encode() not in data, name
    here, public = (
        json.loads(data["lorafuse_receipt.json"]) for data in (build.files_of(tmp_path / "out"), there)
    )
    assert str(pair[0]) in here["inputs"][0]["path"]
    assert [entry["path"] for entry in public["inputs"]][:2] == [
        "ckpt/config.json",
        "ckpt/" + build.shard_name(1, 2),
    ]
    assert {name.partition(": ")[0] for name in public["adapter_tensors"]["used"]} == {"lora", "second"}
    text = json.dumps(here)
    for folder in (*pair, second):
        text = text.replace(str(folder), folder.name)
    assert json.loads(text) == public


def test_streamed_through(hub: HubServer, tmp_path: Path, pair: tuple[Path, Path]) -> None:
    """From the hub to the hub: a few files of weights are here at once, OUT_DIR is not made, nothing is left,
    and the repository holds what a merge here makes."""
    hub.add("org/base", pair[0])
    most = 0

    def count(_: Any, path: str) -> bool:
        nonlocal most
        most = max(most, len(list(tmp_path.glob(".out.lorafuse-*/*/*.safetensors*"))))
        return False

    hub.faults.append(count)
    events: list[Any] = []
    options = pushed_options(stream=True, max_shard_size=1000)
    lorafuse.convert("org/base", pair[1], tmp_path / "out", on_event=events.append, **options)
    hub.faults.clear()
    assert not (tmp_path / "out").exists() and not list(tmp_path.glob(".out*"))
    assert not events[-1]["kept_here"] and most <= 2 + 4
    lorafuse.convert(pair[0], pair[1], tmp_path / "local", max_shard_size=1000)
    local, there = build.files_of(tmp_path / "local"), files_on(hub, "me/merged")
    n_shards = sum(name.endswith(".safetensors") for name in there)
    assert n_shards > 10
    made = there.keys() - {"README.md", "lorafuse_receipt.json"}
    assert {name: there[name] for name in made} == {name: local[name] for name in made}
    assert made | {"lorafuse_receipt.json"} == local.keys()


def test_streamed_through_and_killed(hub: HubServer, tmp_path: Path, pair: tuple[Path, Path]) -> None:
    """The next run sends what is missing. What is on the hub already is not made again, and without the same
    repository the run is refused."""
    hub.add("org/base", pair[0])
    arguments = ["org/base", str(pair[1]), str(tmp_path / "out"), "--stream", "--max-shard-size", "1000"]
    environ = os.environ | hub.environ(tmp_path / "home")
    n = 0

    def kill(request: Any, path: str) -> bool:
        nonlocal n
        n += "/upload/" in path
        if n == 6:
            process.send_signal(signal.SIGKILL)
        return False

    hub.faults.append(kill)
    process = subprocess.Popen(
        [sys.executable, "-m", "lorafuse", "convert", *arguments, "-q", "--push-to-hub", "me/merged"],
        env=environ,
    )
    assert process.wait(60) == -signal.SIGKILL
    hub.faults.clear()
    assert len(hub.repos["me/merged"].commits) == 1
    options: dict[str, Any] = {"stream": True, "max_shard_size": 1000}
    with pytest.raises(OutDirError, match="with other settings: push_to_hub was"):
        lorafuse.convert("org/base", pair[1], tmp_path / "out", **options)
    hub.log.clear()
    events: list[Any] = []
    options["push_to_hub"] = "me/merged"
    lorafuse.convert("org/base", pair[1], tmp_path / "out", on_event=events.append, **options)
    [resumed] = [event["n_shards"] for event in events if event["event"] == "resumed"]
    there = files_on(hub, "me/merged")
    n_shards = sum(name.endswith(".safetensors") for name in there)
    assert resumed >= 3 and len(hub.requests("PUT")) <= n_shards - 4
    lorafuse.convert(*pair, tmp_path / "local", max_shard_size=1000)
    local = build.files_of(tmp_path / "local")
    made = there.keys() - {"README.md", "lorafuse_receipt.json"}
    assert {name: there[name] for name in made} == {name: local[name] for name in made}


def test_where_to(hub: HubServer, pair: tuple[Path, Path], tmp_path: Path) -> None:
    """A private repository, a branch that is not there yet, a pull request; stale weights go."""
    lorafuse.convert(*pair, tmp_path / "1", push_to_hub=Push("me/merged", private=True), max_shard_size=3000)
    assert hub.repos["me/merged"].private
    lorafuse.convert(*pair, tmp_path / "2", push_to_hub=Push("me/merged", revision="v2"))
    assert "model.safetensors" in files_on(hub, "me/merged", "v2")
    stale = [name for name in files_on(hub, "me/merged", "v2") if "-of-" in name or "index" in name]
    assert not stale and "model.safetensors.index.json" in files_on(hub, "me/merged")
    events: list[Any] = []
    push = Push("me/merged", create_pr=True)
    lorafuse.convert(*pair, tmp_path / "3", push_to_hub=push, dtype="float32", on_event=events.append)
    assert events[-1]["url"] == f"{hub.url}/me/merged/discussions/1"
    assert (
        files_on(hub, "me/merged", "refs/pr/1")["model.safetensors"]
        != files_on(hub, "me/merged", "v2")["model.safetensors"]
    )


def refusal(kind: type[Exception], *arguments: Any, **options: Any) -> str:
    with pytest.raises(kind) as caught:
        lorafuse.convert(*arguments, **options)
    return str(caught.value)


def test_refusals(
    hub: HubServer, pair: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before a weight of the base is fetched."""
    hub.add("org/base", pair[0])
    names = ("org/base", pair[1], tmp_path / "out")
    hub.add("me/tuned", pair[1])
    assert refusal(OutDirError, *names, push_to_hub="me/tuned") == (
        "me/tuned: holds an adapter (adapter_config.json), for which loaders would take the result; choose "
        "another repository."
    )
    hub.add("me/open", pair[0])
    assert refusal(OutDirError, *names, push_to_hub=Push("me/open", private=True)) == (
        "me/open: is public on the hub already, and private=True is given."
    )
    assert "is no repository on the hub" in refusal(UsageError, *names, push_to_hub="merged")
    with pytest.raises(UsageError, match="does not go with a revision"):
        Push("me/merged", revision="v2", create_pr=True)
    monkeypatch.delenv("HF_TOKEN")
    assert refusal(StorageError, *names, push_to_hub="me/merged") == (
        "me/merged: the hub does not accept your token (401); log in with `hf auth login`."
    )
    assert not [name for name in hub.fetched() if name.startswith("model-0")]
    assert not list(tmp_path.glob(".out*"))


def test_upload_that_fails(
    hub: HubServer, pair: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It ends the run; nothing is committed, and the same call goes on."""
    monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", lambda _: None)

    def refuse(request: Any, path: str) -> bool:
        if "/upload/" in path:
            request.refuse(500, "", "no\nroom")
            return True
        return False

    hub.faults.append(refuse)
    message = refusal(StorageError, *pair, tmp_path / "out", **pushed_options())
    assert message.startswith("me/merged") and "\n" not in message
    assert len(hub.repos["me/merged"].commits) == 1 and not (tmp_path / "out").exists()
    hub.faults.clear()
    events: list[Any] = []
    lorafuse.convert(*pair, tmp_path / "out", on_event=events.append, **pushed_options())
    assert "resumed" in [event["event"] for event in events]
    assert build.files_of(tmp_path / "out").keys() == files_on(hub, "me/merged").keys()


def test_command_line(hub: HubServer, pair: tuple[Path, Path], tmp_path: Path, capfd: Any) -> None:
    """The URL is said on stderr, OUT_DIR on stdout; where that is not made, the URL in its place."""

    def run(*options: str) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as exited:
            command.main([*map(str, pair), str(tmp_path / "out"), *options])
        return exited.value.code, *capfd.readouterr()  # type: ignore[return-value]

    status, out, err = run("--push-to-hub", "me/merged")
    url = f"{hub.url}/me/merged/commit/{hub.repos['me/merged'].commits[-1]}"
    assert (status, out) == (0, f"{tmp_path / 'out'}\n") and f"Pushed: {url}\n" in err
    hub.add("org/base", pair[0])
    status, out, err = run("--push-to-hub", "me/other", "--stream", "--overwrite", "--private", "-q")
    assert (status, out) == (0, f"{hub.url}/me/other/commit/{hub.repos['me/other'].commits[-1]}\n")
    assert hub.repos["me/other"].private and err == ""
    status, out, err = run("--private")
    assert (status, err) == (2, "Error: --private goes with --push-to-hub REPO.\n")
