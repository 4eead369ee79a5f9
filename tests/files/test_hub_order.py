"""No weight of a base on the hub is fetched before it is known that the run needs it."""

from pathlib import Path
from typing import Any

import build
import pytest
import torch
from hub_server import HubServer

import lorafuse
from lorafuse.errors import AdapterError, LorafuseError, OutDirError, StorageError, UsageError
from lorafuse.outdir.out_dir import Space

WEIGHTS = {build.shard_name(number, 2) for number in (1, 2)}


@pytest.fixture
def repos(hub: HubServer, tmp_path: Path) -> HubServer:
    hub.add("org/base", build.write_checkpoint(tmp_path / "ckpt", n_shards=2))
    hub.add("me/tuned", build.write_adapter(tmp_path / "lora"))
    return hub


def refused(hub: HubServer, kind: type[LorafuseError], *names: object, **options: Any) -> str:
    """What is said, and that no weight of the base was fetched for it."""
    with pytest.raises(kind) as caught:
        lorafuse.convert(*names, **options)  # type: ignore[arg-type]
    assert not WEIGHTS & hub.fetched().keys()
    return str(caught.value)


def test_out_dir_comes_first(repos: HubServer, tmp_path: Path) -> None:
    """The hub is not even asked where OUT_DIR may not be written."""
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("")
    assert "exists and is not empty" in refused(repos, OutDirError, "org/base", "me/tuned", tmp_path / "out")
    refused(repos, OutDirError, "org/base", tmp_path / "lora", tmp_path / "lora" / "out")
    assert repos.log == []


@pytest.mark.parametrize("name", ["me/tunde", "no-such-directory", "me/tuned@v3", "org/base"])
def test_then_the_adapter(repos: HubServer, tmp_path: Path, name: str) -> None:
    """Of the base, nothing is asked where the adapter is mistyped, or is none."""
    message = refused(repos, AdapterError, "org/base@main", name, tmp_path / "out")
    assert message.startswith(name.partition("@")[0])
    if name != "org/base":
        assert not [path for _, path, _ in repos.log if "org/base" in path]


def test_then_headers_and_plan(repos: HubServer, tmp_path: Path) -> None:
    """A dry run reads the headers of the base."""
    plan = lorafuse.convert("org/base", "me/tuned", tmp_path / "out", dry_run=True)
    local = lorafuse.convert(tmp_path / "ckpt", tmp_path / "lora", tmp_path / "out", dry_run=True)
    # Where the inputs are, and how fast this machine reads them and how much room it has at the moment.
    own = dict.fromkeys(("notes", "inputs", "estimate", "disk"))
    assert plan | own == local | own
    assert repos.fetched("org/base") == {"config.json": 1, "model.safetensors.index.json": 1}
    assert {name for name, _ in repos.ranged()} == WEIGHTS


def test_then_refusals(repos: HubServer, tmp_path: Path) -> None:
    """An adapter that does not fit, a limit that is too small, values that are not finite."""
    lora = build.write_adapter(tmp_path / "misfit", {"base_model.model.x.lora_A.weight": torch.ones(4, 16)})
    refused(repos, AdapterError, "org/base", lora, tmp_path / "out")
    refused(repos, UsageError, "org/base", "me/tuned", tmp_path / "out", memory_limit="30MB")
    tensors = build.adapter_tensors(build.checkpoint_tensors())
    nan = build.write_adapter(tmp_path / "nan", {name: t * float("nan") for name, t in tensors.items()})
    refused(repos, AdapterError, "org/base", nan, tmp_path / "out")


def test_then_room(repos: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the result needs is asked for first."""
    monkeypatch.setattr(
        "lorafuse.outdir.staging.space_below", lambda _: Space(free_nbytes=1000, block_nbytes=1)
    )
    message = refused(repos, StorageError, "org/base", "me/tuned", tmp_path / "out")
    assert "1000 are free" in message


def test_batch(repos: HubServer, tmp_path: Path) -> None:
    """A batch that is only planned fetches no weight, nor one of which all is there; else each is fetched
    once."""
    jobs = tmp_path / "jobs"
    for name in ("a", "b"):
        build.write_adapter(jobs / name)
    lorafuse.batch("org/base", jobs, tmp_path / "out", dry_run=True)
    assert not WEIGHTS & repos.fetched().keys()
    lorafuse.batch("org/base", jobs, tmp_path / "out")
    assert {name: repos.fetched()[name] for name in WEIGHTS} == dict.fromkeys(WEIGHTS, 1)
    repos.log.clear()
    for path in (tmp_path / "home").rglob("*.safetensors"):
        path.unlink()
    states = lorafuse.batch("org/base", jobs, tmp_path / "out")
    assert [state.state for state in states] == ["skipped", "skipped"]
    assert not WEIGHTS & repos.fetched().keys()


def test_verify(repos: HubServer, tmp_path: Path) -> None:
    """A merge of a base on the hub is made again from there."""
    lorafuse.convert("org/base", "me/tuned", tmp_path / "out")
    checked = lorafuse.verify(tmp_path / "out", ckpt="org/base", adapters=["me/tuned"])
    assert checked["weights"] == 21
