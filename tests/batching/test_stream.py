"""A base on the hub that is fetched ahead of the merge and removed behind it."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import build
import pytest
from hub_server import HubServer

import lorafuse
from lorafuse.errors import StorageError
from lorafuse.files.local_folder import LocalFolder
from lorafuse.inputs.fetching import Fetching
from lorafuse.outdir.staging import LocalOutDir

N_SHARDS = 6


@pytest.fixture
def ckpt(tmp_path: Path) -> Path:
    return build.write_by_layers(tmp_path / "ckpt")


@pytest.fixture
def lora(tmp_path: Path) -> Path:
    return build.write_adapter(tmp_path / "lora", build.adapter_tensors(build.checkpoint_tensors(n_layers=8)))


@pytest.fixture
def watched(hub: HubServer, tmp_path: Path) -> Iterator[Callable[[], int]]:
    """watched() → the most files of the base that were beside the result at once, as the server saw it with
    each request."""
    most = 0

    def count(_: Any, path: str) -> bool:
        nonlocal most
        if path.endswith(".safetensors"):
            most = max(most, len(streamed(tmp_path)))
        return False

    hub.faults.append(count)
    yield lambda: most


def streamed(tmp_path: Path) -> list[Path]:
    """Files of weights of a base beside the result."""
    return list(tmp_path.glob(".out.lorafuse-*/base/*.safetensors"))


def same(out: Path, local: Path) -> bool:
    left, right = build.files_of(out), build.files_of(local)
    return {name: left[name] for name in left.keys() - {"lorafuse_receipt.json"}} == {
        name: right[name] for name in right.keys() - {"lorafuse_receipt.json"}
    }


def test_two_files_at_a_time(
    hub: HubServer, ckpt: Path, lora: Path, tmp_path: Path, watched: Callable[[], int]
) -> None:
    """The result is what it is of the whole base; two files are held at once, none is in the hub's cache, and
    none is left."""
    hub.add("org/base", ckpt)
    events: list[Any] = []
    receipt = lorafuse.convert("org/base", lora, tmp_path / "out", stream=True, on_event=events.append)
    lorafuse.convert(ckpt, lora, tmp_path / "local")
    assert same(tmp_path / "out", tmp_path / "local")
    fetched = {name: n for name, n in hub.fetched().items() if name.endswith(".safetensors")}
    assert len(fetched) == N_SHARDS and sum(fetched.values()) <= N_SHARDS + 1
    assert watched() < 2  # while the second is asked for
    assert not list((tmp_path / "home").rglob("*.safetensors"))
    assert sorted(path.name for path in tmp_path.iterdir() if path.name.startswith(".out")) == []
    told = [event["file"] for event in events if event["event"] == "fetched"]
    assert sorted(set(told)) == sorted(fetched) and len(told) == sum(fetched.values())
    hashes = {entry["path"].rpartition("/")[2]: entry["sha256"] for entry in receipt["inputs"]}
    local = lorafuse.convert(ckpt, lora, tmp_path / "again")
    assert hashes == {entry["path"].rpartition("/")[2]: entry["sha256"] for entry in local["inputs"]}


@pytest.mark.parametrize("kind", ["nf4_dq", "int8", "gpt2"])
def test_bases(hub: HubServer, base: Any, adapter: Any, tmp_path: Path, kind: str) -> None:
    """Quantized bases, whose small tensors planning reads, and stacked ones."""
    lora = adapter(kind, target_modules=["c_attn"] if kind == "gpt2" else ["q_proj", "down_proj"])
    hub.add("org/base", base(kind))
    lorafuse.convert("org/base", lora, tmp_path / "out", stream=True)
    lorafuse.convert(base(kind), lora, tmp_path / "local")
    assert same(tmp_path / "out", tmp_path / "local")


@pytest.mark.parametrize("stream", [False, True])
def test_what_nobody_planned(
    hub: HubServer, ckpt: Path, lora: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stream: bool
) -> None:
    """A file that a weight reads although no plan says so is fetched as a whole, and compared, all the same:
    nothing that is merged was read in ranges."""
    hub.add("org/base", ckpt)
    monkeypatch.setattr(Fetching, "_files_of", lambda *_: iter(()))
    lorafuse.convert("org/base", lora, tmp_path / "out", stream=stream)
    assert len([name for name in hub.fetched() if name.endswith(".safetensors")]) == N_SHARDS
    assert len(hub.ranged()) == N_SHARDS  # for the headers
    lorafuse.convert(ckpt, lora, tmp_path / "local")
    assert same(tmp_path / "out", tmp_path / "local")
    assert not list(tmp_path.glob(".out*"))


def test_into_the_cache(hub: HubServer, ckpt: Path, lora: Path, tmp_path: Path) -> None:
    """Without it the files stay in the hub's cache, each fetched once; then nothing is left to stream."""
    hub.add("org/base", ckpt)
    lorafuse.convert("org/base", lora, tmp_path / "out")
    lorafuse.convert("org/base", lora, tmp_path / "out2", stream=True)
    assert same(tmp_path / "out", tmp_path / "out2")
    assert [n for name, n in hub.fetched().items() if name.endswith(".safetensors")] == [1] * N_SHARDS


def test_a_file_that_is_broken(
    hub: HubServer, ckpt: Path, lora: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file whose hash is wrong ends the run, though the merge is at an earlier one; the same call goes on
    from the finished files of the result."""
    hub.add("org/base", ckpt)
    wrong = build.shard_name(4, N_SHARDS)

    def damage(request: Any, path: str) -> bool:
        if not path.endswith(wrong) or request.command != "GET" or "Range" in request.headers:
            return False
        data = bytearray((ckpt / wrong).read_bytes())
        data[-1] ^= 1
        request.send(bytes(data))
        return True

    hub.faults.append(damage)
    options: dict[str, Any] = {"stream": True, "max_shard_size": 4000}
    with pytest.raises(StorageError) as caught:
        lorafuse.convert("org/base", lora, tmp_path / "out", **options)
    assert f"org/base/{wrong}: what the hub sends is not what it lists" in str(caught.value)
    assert not (tmp_path / "out").exists()
    hub.faults.clear()
    events: list[Any] = []
    lorafuse.convert("org/base", lora, tmp_path / "out", on_event=events.append, **options)
    assert [event["event"] for event in events if event["event"] == "resumed"] == ["resumed"]
    lorafuse.convert(ckpt, lora, tmp_path / "local", max_shard_size=4000)
    assert same(tmp_path / "out", tmp_path / "local")
    assert not list(tmp_path.glob(".out.lorafuse-*"))


def test_room(
    hub: HubServer, ckpt: Path, lora: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two files of the base have to fit beside the result; the whole base need not. Without --stream the
    cache has to have room for all of it."""
    hub.add("org/base", ckpt)
    from lorafuse.outdir import free_space, staging
    from lorafuse.outdir.out_dir import Space

    needed: list[int] = []
    real = free_space._needed
    monkeypatch.setattr(free_space, "_needed", lambda *a: needed.append(real(*a)) or needed[-1])
    lorafuse.convert(ckpt, lora, tmp_path / "local")
    [of_result] = needed[:1]
    of_two = sum(sorted(path.stat().st_size for path in ckpt.glob("*.safetensors"))[-2:])
    free = of_result + of_two
    monkeypatch.setattr(staging, "space_below", lambda _: Space(free, 1))
    lorafuse.convert("org/base", lora, tmp_path / "out", stream=True)
    free = of_result + of_two // 2
    with pytest.raises(StorageError, match="are missing"):
        lorafuse.convert("org/base", lora, tmp_path / "out2", stream=True)
    monkeypatch.undo()


def test_room_in_the_cache(
    hub: HubServer, ckpt: Path, lora: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.add("org/base", ckpt)
    usage = type("Usage", (), {"free": 1000})()
    monkeypatch.setattr("lorafuse.files.hub_folder.shutil.disk_usage", lambda _: usage)
    with pytest.raises(StorageError) as caught:
        lorafuse.convert("org/base", lora, tmp_path / "out")
    assert "bytes are to be fetched into the hub's cache and 1000 are free there; stream=True" in str(
        caught.value
    )
    assert not [name for name in hub.fetched() if name.endswith(".safetensors")]


def slowly(seconds: float) -> Callable[[Any, str], bool]:
    """Files of weights come in pieces, with a pause before each."""

    def fault(request: Any, path: str) -> bool:
        if not path.endswith(".safetensors") or request.command != "GET" or "Range" in request.headers:
            return False
        time.sleep(seconds)
        return False

    return fault


def test_killed_at_any_time(hub: HubServer, ckpt: Path, lora: Path, tmp_path: Path) -> None:
    """Again and again, while files come: each run goes on from what is finished, the last one finishes, and
    nothing is left."""
    hub.add("org/base", ckpt)
    hub.faults.append(slowly(0.1))
    command = [
        *(sys.executable, "-m", "lorafuse", "convert", "org/base", str(lora), str(tmp_path / "out")),
        *("--stream", "--max-shard-size", "3000", "--json"),
    ]
    environ = os.environ | hub.environ(tmp_path / "home")
    resumed = 0
    # Finished files of the result before the signal, and what the process ends with.
    for wanted, number, status in ((2, signal.SIGKILL, -9), (4, signal.SIGTERM, 143)):
        process = subprocess.Popen(command, env=environ, stdout=subprocess.PIPE, text=True)
        assert process.stdout
        n = 0
        for line in process.stdout:
            n += '"shard"' in line
            resumed += '"resumed"' in line
            if n == wanted:
                process.send_signal(number)
                break
        process.stdout.close()
        assert process.wait(60) == status
        assert not (tmp_path / "out").exists()
    hub.faults.clear()
    events: list[Any] = []
    lorafuse.convert(
        "org/base", lora, tmp_path / "out", stream=True, max_shard_size=3000, on_event=events.append
    )
    [last] = [event["n_shards"] for event in events if event["event"] == "resumed"]
    assert resumed == 1 and last >= 6
    lorafuse.convert(ckpt, lora, tmp_path / "local", max_shard_size=3000)
    assert same(tmp_path / "out", tmp_path / "local")
    assert not list(tmp_path.glob(".out.lorafuse-*"))


def test_what_a_killed_run_had_fetched(
    hub: HubServer, ckpt: Path, lora: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file that is whole and comes first is not fetched again; one that is not whole is, and others go."""
    hub.add("org/base", ckpt)
    real = LocalOutDir.scratch
    whole, damaged, later = (build.shard_name(n, N_SHARDS) for n in (N_SHARDS, 1, 4))

    def left(out_dir: LocalOutDir) -> LocalFolder:
        folder = real(out_dir)
        for name in (whole, damaged, later):
            (folder.path / name).write_bytes((ckpt / name).read_bytes()[: -1 if name == damaged else None])
        return folder

    seen: list[set[str]] = []
    hub.faults.append(lambda *_: seen.append({path.name for path in streamed(tmp_path)}))
    monkeypatch.setattr(LocalOutDir, "scratch", left)
    lorafuse.convert("org/base", lora, tmp_path / "out", stream=True)
    assert seen[-1] and later not in next(names for names in seen if names)
    fetched = [name for name in hub.fetched() if name.endswith(".safetensors")]
    assert fetched == [build.shard_name(n + 1, N_SHARDS) for n in range(N_SHARDS)]  # the last for its end
    assert hub.fetched()[whole] == 1
    lorafuse.convert(ckpt, lora, tmp_path / "local")
    assert same(tmp_path / "out", tmp_path / "local")
