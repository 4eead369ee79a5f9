"""A batch whose base lies on the hub: streamed for each pass, and named by the adapters."""

import json
from pathlib import Path
from typing import Any

import build
import pytest
from click.testing import CliRunner
from hub_server import HubServer

import lorafuse
from lorafuse.batching import passes
from lorafuse.cli import lorafuse as command
from lorafuse.errors import AdapterError, StorageError, UsageError
from lorafuse.outdir import staging

N_SHARDS = 6


@pytest.fixture
def ckpt(tmp_path: Path) -> Path:
    return build.write_by_layers(tmp_path / "ckpt", N_SHARDS)


@pytest.fixture
def jobs(tmp_path: Path) -> Path:
    tensors = build.adapter_tensors(build.checkpoint_tensors(n_layers=8))
    for n, name in enumerate("abc", 1):
        scaled = {key: tensor * n for key, tensor in tensors.items()}
        build.write_adapter(tmp_path / "jobs" / name, scaled, base_model_name_or_path="org/base")
    return tmp_path / "jobs"


def weights(folder: Path) -> dict[str, bytes]:
    return {name: data for name, data in build.files_of(folder).items() if name.endswith(".safetensors")}


def refetched(hub: HubServer) -> dict[str, int]:
    return {name: n for name, n in hub.fetched().items() if name.endswith(".safetensors")}


@pytest.mark.parametrize("most", [32, 1])
def test_streamed(
    hub: HubServer, ckpt: Path, jobs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, most: int
) -> None:
    """Each result is that of the whole base. A few files of the base are beside the results at once, none is
    in the hub's cache, and none is left; each pass fetches the base anew."""
    hub.add("org/base", ckpt)
    monkeypatch.setattr(passes, "MAX_MEMBERS", most)
    held = 0

    def count(_: Any, path: str) -> bool:
        nonlocal held
        held = max(held, len(list(tmp_path.glob("out/.*.lorafuse-*/base/*.safetensors"))))
        return False

    hub.faults.append(count)
    events: list[Any] = []
    states = lorafuse.batch(
        "org/base", jobs, tmp_path / "out", stream=True, memory_limit="200MB", on_event=events.append
    )
    assert [state.state for state in states] == ["done"] * 3
    n_passes = sum(event["event"] == "pass" for event in events)
    assert n_passes == (1 if most == 32 else 3)
    fetched = refetched(hub)
    assert len(fetched) == N_SHARDS and min(fetched.values()) == n_passes
    assert 0 < held < 2  # while the second is asked for
    assert not list((tmp_path / "home").rglob("*.safetensors"))
    assert {path.name for path in (tmp_path / "out").iterdir()} == set("abc")
    told = {event["file"] for event in events if event["event"] == "fetched"}
    assert told == fetched.keys()
    lorafuse.batch(ckpt, jobs, tmp_path / "local", memory_limit="200MB")
    for name in "abc":
        assert weights(tmp_path / "out" / name) == weights(tmp_path / "local" / name)
    again = lorafuse.batch("org/base", jobs, tmp_path / "out", stream=True, memory_limit="200MB")
    assert [state.state for state in again] == ["skipped"] * 3 and refetched(hub) == fetched


def test_quantized_streamed_twice(
    hub: HubServer, base: Any, adapter: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A second pass plans with small tensors of files that are not here any more."""
    hub.add("org/base", base("nf4_dq"))
    lora = adapter("nf4_dq", target_modules=["q_proj"])
    (tmp_path / "jobs.jsonl").write_text(
        "".join(json.dumps({"adapter": str(lora), "name": name}) + "\n" for name in "ab")
    )
    monkeypatch.setattr(passes, "MAX_MEMBERS", 1)
    states = lorafuse.batch("org/base", tmp_path / "jobs.jsonl", tmp_path / "out", stream=True)
    assert [str(state.error) for state in states if state.error] == []
    lorafuse.convert(base("nf4_dq"), lora, tmp_path / "local")
    merged = [lorafuse.inspect(tmp_path / path)["update"] for path in ("out/a", "out/b", "local")]
    assert merged[0] == merged[1] == merged[2]
    assert lorafuse.verify(tmp_path / "out/b", ckpt=base("nf4_dq"), adapters=[lora])["weights"] > 0


def test_planning_reads_between_two_passes(
    hub: HubServer, ckpt: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An adapter's copy of the embedding is compared with the base's, of which only this is read."""
    hub.add("org/base", ckpt)
    tensors = build.checkpoint_tensors(n_layers=8)
    embedding = "model.embed_tokens.weight"
    copy = {f"base_model.model.{embedding}": tensors[embedding]}
    for name in "ab":
        build.write_adapter(tmp_path / "jobs" / name, build.adapter_tensors(tensors) | copy)
    monkeypatch.setattr(passes, "MAX_MEMBERS", 1)
    states = lorafuse.batch("org/base", tmp_path / "jobs", tmp_path / "out", stream=True)
    assert [state.state for state in states] == ["done"] * 2
    assert refetched(hub)[build.shard_name(1, N_SHARDS)] == 2  # as a whole, once for each pass
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"a", "b"}


def test_room_for_what_is_streamed(
    hub: HubServer, ckpt: Path, jobs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The two files count: with room for the results alone it is refused before a file is fetched."""
    hub.add("org/base", ckpt)
    plan = lorafuse.batch("org/base", jobs, tmp_path / "out", dry_run=True, memory_limit="200MB")
    assert len(plan) == 3
    nbytes = sum(path.stat().st_size for path in ckpt.glob("*.safetensors"))
    real = staging.space_below

    def small(folder: Path) -> Any:
        return staging.replace(real(folder), free_nbytes=nbytes + 1000)

    monkeypatch.setattr("lorafuse.outdir.local.space_below", small)
    monkeypatch.setattr(passes, "MAX_MEMBERS", 1)
    with pytest.raises(StorageError, match="are needed for a, "):
        lorafuse.batch("org/base", jobs, tmp_path / "out", stream=True)
    assert not refetched(hub)
    lorafuse.batch("org/base", jobs, tmp_path / "out")  # into the hub's cache


def test_the_base_that_all_name(hub: HubServer, ckpt: Path, jobs: Path, tmp_path: Path) -> None:
    hub.add("org/base", ckpt)
    planned = CliRunner().invoke(command, ["batch", "auto", str(jobs), str(tmp_path / "out"), "--dry-run"])
    assert (
        planned.stdout.startswith("base: org/base: llama: ")
        and "; time not known; pass 1\n" in planned.stdout
    )
    (jobs / "empty").mkdir()  # its own error
    states = lorafuse.batch("auto", jobs, tmp_path / "out")
    assert [(state.name, state.state) for state in states] == [
        ("a", "done"), ("b", "done"), ("c", "done"), ("empty", "failed"),
    ]  # fmt: skip
    receipt = json.loads((tmp_path / "out/a/lorafuse_receipt.json").read_text())
    assert receipt["inputs"][0]["path"] == "org/base/config.json"


def test_another_base_or_none(hub: HubServer, jobs: Path, tmp_path: Path) -> None:
    """Every base is listed with the jobs that name it, before anything is fetched."""
    build.write_adapter(jobs / "d", base_model_name_or_path="org/base", revision="v2")
    build.write_adapter(jobs / "e", base_model_name_or_path=None)
    build.write_adapter(jobs / "f", base_model_name_or_path="org/base", revision="\x1b[31mred")
    ran = CliRunner().invoke(command, ["batch", "auto", str(jobs), str(tmp_path / "out")])
    assert ran.exit_code == 2 and ran.stdout == ""
    assert ran.stderr == (
        "Error: The adapters do not name one base for all: org/base (a, b, c); org/base@v2 (d); no base (e); "
        "org/base@\\x1b[31mred (f). Give the checkpoint.\n"
    )
    assert not (tmp_path / "out").exists() and hub.log == []


def test_a_base_that_is_nowhere(jobs: Path, tmp_path: Path) -> None:
    for name in "abc":
        build.rewrite(jobs / name, base_model_name_or_path="/no/such/base")
    with pytest.raises(AdapterError, match="names /no/such/base as its base, which is no directory here"):
        lorafuse.batch("auto", jobs, tmp_path / "out")
    for name in "abc":
        (jobs / name / "adapter_config.json").unlink()
    with pytest.raises(UsageError, match=r"for all: none of them can be read\. Give the checkpoint\."):
        lorafuse.batch("-", jobs, tmp_path / "out")
