"""What is said when the hub does not send what was asked for: what happened, and what to do; in one line,
with the name that the user gave."""

import socket
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import build
import pytest
from hub_server import HubServer
from huggingface_hub import errors as hub_errors

import lorafuse
from lorafuse.errors import AdapterError, CheckpointError, LorafuseError, StorageError

KINDS = [CheckpointError, AdapterError]
Fault = Callable[[Any, str], bool]


@pytest.fixture
def said(hub: HubServer, tmp_path: Path) -> Callable[..., str]:
    """said(kind of error, name) → the message, of a merge with that name as its checkpoint or adapter."""
    ckpt, lora = build.write_checkpoint(tmp_path / "ckpt"), build.write_adapter(tmp_path / "lora")

    def run(kind: type[LorafuseError], name: str, *, adapter: bool = False) -> str:
        with pytest.raises(kind) as caught:
            lorafuse.convert(ckpt if adapter else name, name if adapter else lora, tmp_path / "out")
        message = str(caught.value)
        assert "\n" not in message and "\\n" not in message and "snapshots" not in message
        assert not (tmp_path / "out").exists()
        return message

    return run


def answering(status: int, code: str = "", message: str = "", part: str = "/") -> Fault:
    """Every request of a path with `part` in it is refused so."""

    def fault(request: Any, path: str) -> bool:
        if part not in path or "agent-harnesses" in path:
            return False
        request.refuse(status, code, message)
        return True

    return fault


@pytest.mark.parametrize("kind", KINDS)
def test_no_such_repository(hub: HubServer, said: Any, kind: type[LorafuseError]) -> None:
    """The fault of the input that was named so."""
    message = said(kind, "org/nmae@v2", adapter=kind is AdapterError)
    assert message == "org/nmae: no such directory, and no such repository on the hub."


def test_not_logged_in(hub: HubServer, said: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """To who is not logged in, the hub says of a private repository what it says of none."""
    hub.add("org/name", Path("../ckpt")).private = True
    monkeypatch.delenv("HF_TOKEN")
    assert said(CheckpointError, "org/name") == (
        "org/name: no such directory, and no such repository on the hub that you may see; if it is private, "
        "log in with `hf auth login`."
    )


def test_token_that_is_not_accepted(hub: HubServer, said: Any) -> None:
    hub.faults.append(answering(401, "", "Invalid credentials in Authorization header"))
    expected = "org/name: the hub does not accept your token (401); log in with `hf auth login`."
    assert said(CheckpointError, "org/name") == expected


def test_gated(hub: HubServer, said: Any) -> None:
    """A repository whose terms were not accepted is not said to be missing."""
    hub.add("org/name", Path("../ckpt")).gated = True
    assert said(CheckpointError, "org/name@main") == (
        f"org/name: is gated; ask for access at {hub.url}/org/name, and log in with `hf auth login`."
    )


def test_forbidden(hub: HubServer, said: Any) -> None:
    hub.faults.append(answering(403, "", "Your plan\x1b is over"))
    expected = "org/name: the hub refuses access (403): Your plan is over."
    assert said(AdapterError, "org/name", adapter=True).replace("\\x1b", "").replace("\x1b", "") == expected


def test_no_such_revision(hub: HubServer, said: Any) -> None:
    hub.add("org/name", Path("../ckpt"))
    assert said(CheckpointError, "org/name@v9") == "org/name: has no revision v9."


def test_name_that_the_hub_refuses(hub: HubServer, said: Any) -> None:
    """A name that looks like a hub id and is none by the hub's own rules is a missing directory."""
    assert said(CheckpointError, "org/a--b") == "org/a--b: no such directory."


@pytest.mark.parametrize("variable", ["HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"])
def test_offline(hub: HubServer, said: Any, monkeypatch: pytest.MonkeyPatch, variable: str) -> None:
    """The variable that is set is named."""
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.setenv(variable, "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert said(StorageError, "org/name") == (
        f"org/name: no such directory, and it is not in the hub's cache; {variable} is set: unset it to ask "
        "the hub."
    )
    assert hub.log == []


@pytest.mark.parametrize("part", ["/api/", "/resolve/", "model.safetensors"])
@pytest.mark.parametrize("status", [503, 429])
def test_busy(hub: HubServer, said: Any, monkeypatch: pytest.MonkeyPatch, part: str, status: int) -> None:
    """The hub is asked again; where that does not help, it is said."""
    monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", lambda _: None)
    hub.add("org/name", Path("../ckpt"))
    hub.faults.append(answering(status, "", "busy", part))
    assert said(StorageError, "org/name") == f"org/name: the hub answered {status}, 3 times; try again later."
    n = len(hub.requests("GET", part) + hub.requests("HEAD", part))
    assert n >= 3


def test_busy_for_a_while(hub: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is asked again is answered, and the result is what it is without all that."""
    monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", lambda _: None)
    ckpt, lora = build.write_checkpoint(tmp_path / "ckpt", n_shards=2), build.write_adapter(tmp_path / "lora")
    hub.add("org/name", ckpt)
    seen: dict[tuple[str, str], int] = {}

    def every_first(request: Any, path: str) -> bool:
        key = request.command, path
        seen[key] = seen.get(key, 0) + 1
        if seen[key] > 1 or "agent-harnesses" in path:
            return False
        request.refuse(503, "")
        return True

    hub.faults.append(every_first)
    lorafuse.convert("org/name", lora, tmp_path / "out")
    lorafuse.convert(ckpt, lora, tmp_path / "local")
    for shard in ("model.safetensors", "config.json"):
        assert (tmp_path / "out" / shard).read_bytes() == (tmp_path / "local" / shard).read_bytes()


def test_no_network(hub: HubServer, said: Any) -> None:
    """Nothing is said about whether the repository exists."""
    hub.close()
    message = said(StorageError, "org/name")
    assert message.startswith(f"org/name: no such directory, and the hub at {hub.url} cannot be reached: ")


def raw(answer: Callable[[Any, bytes], None], part: str, n_times: int = 1 << 30) -> Fault:
    """A file with `part` in its name is answered by a function of the request and the right bytes, the first
    n times; only GET."""
    left = [n_times]

    def fault(request: Any, path: str) -> bool:
        if part not in path or "/resolve/" not in path or request.command != "GET" or not left[0]:
            return False
        left[0] -= 1
        repo = next(iter(request.hub.repos.values()))
        data = (repo.path(repo.commits[-1]) / path.rpartition("/")[2]).read_bytes()
        answer(request, data)
        return True

    return fault


def cut_off(request: Any, data: bytes) -> None:
    """Half of what was promised, then nothing."""
    request.send_response(200)
    request.send_header("Content-Length", str(len(data)))
    request.end_headers()
    request.wfile.write(data[: len(data) // 2])
    request.close_connection = True
    request.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))


def other_bytes(request: Any, data: bytes) -> None:
    """As many, but others at the end, where the header of weights is not."""
    request.send(data[:-1] + bytes([data[-1] ^ 1]))


def in_a_whole(request: Any, data: bytes) -> None:
    """All of it, where a range was asked for."""
    request.send(data)


def shorter(request: Any, data: bytes) -> None:
    """A range, but less of it than was asked for."""
    request.send(data[:10], 206)


@pytest.mark.parametrize("part", ["config.json", "model.safetensors"])
@pytest.mark.parametrize("answer", [cut_off, other_bytes])
def test_answers_that_are_broken_once(hub: HubServer, tmp_path: Path, part: str, answer: Any) -> None:
    """They are asked for again."""
    ckpt, lora = build.write_checkpoint(tmp_path / "ckpt"), build.write_adapter(tmp_path / "lora")
    hub.add("org/name", ckpt)
    hub.faults.append(raw(answer, part, 2 if part == "model.safetensors" else 1))
    lorafuse.convert("org/name", lora, tmp_path / "out")
    lorafuse.convert(ckpt, lora, tmp_path / "local")
    for name in ("model.safetensors", "config.json"):
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "local" / name).read_bytes()


@pytest.mark.parametrize("part", ["config.json", "model.safetensors"])
def test_other_bytes_each_time(hub: HubServer, said: Any, part: str) -> None:
    """What does not have the hash that the hub lists is not merged, and not kept."""
    hub.add("org/name", Path("../ckpt"))
    hub.faults.append(raw(other_bytes, part))
    message = said(StorageError, "org/name@main")
    assert message.startswith(f"org/name@main/{part}: what the hub sends is not what it lists: the hash is ")
    hub.faults.clear()
    lorafuse.convert("org/name@main", Path("../lora"), Path("../out"))


def test_ranges(hub: HubServer, said: Any, tmp_path: Path) -> None:
    """A hub that knows no ranges will do; a range that is too short will not."""
    ckpt, lora = build.write_checkpoint(tmp_path / "large"), build.write_adapter(tmp_path / "a")
    hub.add("org/name", ckpt)
    hub.faults.append(raw(in_a_whole, "model.safetensors"))
    plan = lorafuse.convert("org/name", lora, tmp_path / "out", dry_run=True)
    assert plan["nbytes"] == lorafuse.convert(ckpt, lora, tmp_path / "out", dry_run=True)["nbytes"]
    hub.faults[:] = [raw(shorter, "model.safetensors")]
    assert said(StorageError, "org/name") == (
        "org/name/model.safetensors: the hub sent 10 bytes where 13000 were asked for; try again later."
    )


def test_file_that_is_listed_and_not_there(hub: HubServer, said: Any) -> None:
    hub.add("org/name", Path("../ckpt"))
    hub.faults.append(answering(404, "EntryNotFound", "", "model.safetensors"))
    assert said(StorageError, "org/name").startswith("org/name: the hub's answer cannot be used: 404")


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("500\n\nServer\x1b[31m Error"),
        hub_errors.NotASafetensorsRepoError("500 Server\x1b[31m Error"),
    ],
)
def test_what_nobody_foresaw(
    hub: HubServer, said: Any, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    """It has the library's words, in one line."""

    def snapshot_download(*_: object, **__: object) -> str:
        raise error

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    expected = "org/name: the hub's answer cannot be used: 500 Server\\x1b[31m Error."
    assert said(StorageError, "org/name") == expected


def test_what_the_library_prints(hub: HubServer, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Its bars and warnings do not come between lorafuse's own lines; what was set before is set after."""
    from huggingface_hub.utils import are_progress_bars_disabled, logging

    before = are_progress_bars_disabled(), logging.get_verbosity()
    hub.add("org/name", build.write_checkpoint(tmp_path / "ckpt"))
    hub.faults.append(raw(cut_off, "model.safetensors", 2))
    lorafuse.convert("org/name", build.write_adapter(tmp_path / "lora"), tmp_path / "out")
    assert capfd.readouterr() == ("", "")
    assert before == (are_progress_bars_disabled(), logging.get_verbosity())
