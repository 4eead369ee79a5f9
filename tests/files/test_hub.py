"""Inputs by name: a local directory, else a snapshot from the hub; the hub itself is replaced by a
function."""

import shutil
from pathlib import Path
from typing import Any

import build
import huggingface_hub
import pytest
from fake_hub import hub_error, wanted
from huggingface_hub import errors as hub_errors

import lorafuse
from lorafuse.errors import AdapterError, CheckpointError, LorafuseError, StorageError
from lorafuse.files.hub import folder_of
from lorafuse.files.local_folder import LocalFolder
from lorafuse.inputs.located import CHECKPOINT_FILES, UNWANTED, adapter_files, checkpoint_folder

SNAPSHOT = "/cache/models--org--name/snapshots/0"


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[tuple[str, dict[str, Any]]]:
    """What snapshot_download was called with; it answers SNAPSHOT."""
    calls = []

    def snapshot_download(repo_id: str, **options: Any) -> str:
        calls.append((repo_id, options))
        return SNAPSHOT

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    monkeypatch.chdir(tmp_path)
    return calls


def failing(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    def snapshot_download(repo_id: str, **options: Any) -> str:
        raise error

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)


def test_local_directory_wins(calls: list[Any], tmp_path: Path) -> None:
    """A directory of that name is used, and the hub is not asked."""
    (tmp_path / "org" / "name").mkdir(parents=True)
    assert checkpoint_folder("org/name") == LocalFolder(Path("org/name"))
    assert calls == []


@pytest.mark.parametrize(
    ("name", "repo", "revision"),
    [
        ("org/name", "org/name", None),
        ("org/name@main", "org/name", "main"),
        ("org/name@refs/pr/3", "org/name", "refs/pr/3"),
        ("org/name@0123abc", "org/name", "0123abc"),
        ("Org-1/Name_2.5-x", "Org-1/Name_2.5-x", None),
    ],
)
def test_hub_id(calls: list[Any], name: str, repo: str, revision: str | None) -> None:
    """`org/name@revision` is a repository and a revision; nothing else is asked for."""
    assert checkpoint_folder(name) == LocalFolder(Path(SNAPSHOT), name)
    ((repo_id, options),) = calls
    assert (repo_id, options["revision"]) == (repo, revision)


@pytest.mark.parametrize("kind", [CheckpointError, AdapterError])
@pytest.mark.parametrize(
    "name", ["name", "./org/name", "/org/name", "a/b/c", "org/name@", "org/name@a@b", "-org/name", "org/"]
)
def test_no_hub_id(calls: list[Any], name: str, kind: type[LorafuseError]) -> None:
    """What cannot be a hub id is a missing directory; the hub is not asked."""
    with pytest.raises(kind) as caught:
        folder_of(name, CHECKPOINT_FILES, kind, unwanted=UNWANTED)
    assert str(caught.value) == f"{name}: no such directory."
    assert calls == []


def test_file_of_that_name(calls: list[Any], tmp_path: Path) -> None:
    """A file where a directory is expected is said to be one."""
    (tmp_path / "org").mkdir()
    (tmp_path / "org" / "name").write_text("")
    with pytest.raises(AdapterError) as caught:
        folder_of("org/name", adapter_files(), AdapterError)
    assert str(caught.value) == "org/name: is not a directory."
    assert calls == []


def test_name_is_escaped(calls: list[Any]) -> None:
    """A name with terminal escapes is printed without them."""
    with pytest.raises(CheckpointError) as caught:
        checkpoint_folder("\x1b[31m")
    assert str(caught.value) == "\\x1b[31m: no such directory."


@pytest.mark.parametrize(
    "file",
    [
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "model-00001-of-00002.safetensors",
        "model.safetensors.index.json",
        "tokenizer.json",
        "tokenizer.model",
        "tokenizer_config.json",
        "special_tokens_map.json",
        "merges.txt",
        "chat_template.jinja",
        "additional_chat_templates/tools.jinja",
        "preprocessor_config.json",
        "modeling_own.py",
        "LICENSE",
        "LICENSE.txt",
    ],
)
def test_checkpoint_files_wanted(calls: list[Any], file: str) -> None:
    """Of a checkpoint, everything that the result is made from is fetched."""
    checkpoint_folder("org/name")
    assert wanted(calls[0][1], file)


@pytest.mark.parametrize(
    "file",
    [
        "pytorch_model.bin",
        "pytorch_model-00001-of-00002.bin",
        "pytorch_model.bin.index.json",
        "original/consolidated.00.pth",
        "original/model.safetensors",
        "original/tokenizer.model",
        "consolidated.safetensors",
        "consolidated-00001-of-00002.safetensors",
        "onnx/model.onnx",
        "vae/model.safetensors",
        "examples/run.py",
        "model.gguf",
        "tf_model.h5",
        "flax_model.msgpack",
        "README.md",
    ],
)
def test_checkpoint_files_unwanted(calls: list[Any], file: str) -> None:
    """Of a checkpoint, other formats, other copies of the weights, and what lies in folders are not
    fetched."""
    checkpoint_folder("org/name")
    assert not wanted(calls[0][1], file)


@pytest.mark.parametrize(
    "file",
    [
        "adapter_config.json",
        "adapter_model.safetensors",
        "adapter_model.safetensors.index.json",
        "adapter_model-00001-of-00002.safetensors",
        "adapter_model.bin",
        "adapters.safetensors",
        "checkpoint-10/adapter_config.json",
        "tokenizer.json",
    ],
)
def test_adapter_files_wanted(calls: list[Any], file: str) -> None:
    """Of an adapter, its config, its weights and its tokenizer are fetched, and what tells the names of
    others."""
    folder_of("org/name", adapter_files(), AdapterError)
    assert wanted(calls[0][1], file)


@pytest.mark.parametrize(
    "file",
    [
        "checkpoint-10/adapter_model.safetensors",
        "checkpoint-10/adapter_model-00001-of-00002.safetensors",
        "checkpoint-10/tokenizer.json",
        "checkpoint-10/optimizer.pt",
        "0000100_adapters.safetensors",
        "optimizer.pt",
        "model.safetensors",
        "training_args.bin",
    ],
)
def test_adapter_files_unwanted(calls: list[Any], file: str) -> None:
    """Of an adapter, training state and intermediate checkpoints are not fetched."""
    folder_of("org/name", adapter_files(), AdapterError)
    assert not wanted(calls[0][1], file)


@pytest.mark.parametrize("kind", [CheckpointError, AdapterError])
def test_missing_repository(
    calls: list[Any], monkeypatch: pytest.MonkeyPatch, kind: type[LorafuseError]
) -> None:
    """A repository that is not there is the fault of the input that was named so."""
    failing(monkeypatch, hub_error(hub_errors.RepositoryNotFoundError))
    with pytest.raises(kind) as caught:
        folder_of("org/name", CHECKPOINT_FILES, kind, unwanted=UNWANTED)
    expected = (
        "org/name: no such directory, and no such repository on the hub (or it is private: log in first)."
    )
    assert str(caught.value) == expected


def test_gated_repository(calls: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """A repository whose terms were not accepted is not said to be missing."""
    failing(monkeypatch, hub_error(hub_errors.GatedRepoError))
    with pytest.raises(CheckpointError) as caught:
        checkpoint_folder("org/name")
    assert str(caught.value) == "org/name: is gated; ask for access on its page on the hub, and log in."


def test_missing_revision(calls: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """A revision that is not there is named."""
    failing(monkeypatch, hub_error(hub_errors.RevisionNotFoundError))
    with pytest.raises(AdapterError) as caught:
        folder_of("org/name@v9", adapter_files(), AdapterError)
    assert str(caught.value) == "org/name: has no revision v9."


def test_name_that_the_hub_refuses(calls: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """A name that looks like a hub id and is none by the hub's own rules is a missing directory."""
    failing(monkeypatch, hub_errors.HFValidationError("Cannot have -- or .. in repo_id: 'org/a--b'."))
    with pytest.raises(CheckpointError) as caught:
        checkpoint_folder("org/a--b")
    assert str(caught.value) == "org/a--b: no such directory."


def test_offline(calls: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the network, nothing is said about whether the repository exists."""
    failing(monkeypatch, hub_errors.LocalEntryNotFoundError("offline"))
    with pytest.raises(StorageError) as caught:
        checkpoint_folder("org/name")
    expected = (
        "org/name: no such directory, and the hub cannot be reached to look for a repository of that name."
    )
    assert str(caught.value) == expected


def test_really_offline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The same with the hub's own function, told to stay offline, and an empty cache."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    with pytest.raises(StorageError, match="the hub cannot be reached"):
        checkpoint_folder("org/name")


@pytest.mark.parametrize(
    "error",
    [
        hub_error(hub_errors.HfHubHTTPError, "500 Server\x1b[31m Error"),
        OSError("500 Server\x1b[31m Error"),
        RuntimeError(
            "500 Server\x1b[31m Error"
        ),  # the HTTP library's errors are OSErrors or not, by the hub's version
    ],
)
def test_download_fails(calls: list[Any], monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    """A download that breaks off is an I/O error with the hub's words, whatever the HTTP library raises."""
    failing(monkeypatch, error)
    with pytest.raises(StorageError) as caught:
        checkpoint_folder("org/name")
    assert str(caught.value) == "org/name: downloading failed: 500 Server\\x1b[31m Error"


@pytest.mark.parametrize(
    ("name", "fetched", "left"),
    [
        (
            "b",
            ["b/adapter_config.json", "b/adapter_model.safetensors", "b/tokenizer.json", "tokenizer.json"],
            ["a/adapter_model.bin"],
        ),
        (
            "b",
            ["adapter_config.json", "a/adapter_config.json"],
            ["adapter_model.safetensors", "bb/adapter_model.safetensors"],
        ),
        ("x[ab]", ["x[ab]/adapter_model.safetensors"], ["xa/adapter_model.safetensors"]),
        (
            "default",
            ["adapter_model.safetensors", "default/adapter_model.safetensors"],
            ["b/adapter_model.safetensors"],
        ),
    ],
)
def test_named_adapter_files(calls: list[Any], name: str, fetched: list[str], left: list[str]) -> None:
    """Of an adapter with a name, its own sub-folder is fetched, and of the others the configs."""
    folder_of("org/name", adapter_files(name), AdapterError)
    assert [file for file in [*fetched, *left] if wanted(calls[0][1], file)] == fetched


@pytest.fixture
def repository(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A hub with one repository, a directory to fill; files arrive in a cache of links, as the hub's do."""
    repository, cache = tmp_path / "repository", tmp_path / "hub" / "models--org--name"

    def snapshot_download(repo_id: str, **options: Any) -> str:
        for path in [p for p in repository.rglob("*") if p.is_file()]:
            file = path.relative_to(repository)
            link, blob = cache / "snapshots" / "0" / file, cache / "blobs" / str(file).replace("/", "-")
            if wanted(options, str(file)) and not link.exists():
                for parent in (link.parent, blob.parent):
                    parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(path, blob)
                link.symlink_to(blob)
        return str(cache / "snapshots" / "0")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    monkeypatch.chdir(tmp_path)
    return repository


@pytest.mark.parametrize("name", [None, "b"])
def test_adapter_in_a_sub_folder_of_a_repository(repository: Path, tmp_path: Path, name: str | None) -> None:
    """Only the adapter that is meant is fetched, with the tokenizer beside it; without a name, the only one
    there is."""
    ckpt, lora = build.write_checkpoint(tmp_path / "ckpt"), build.write_adapter(repository / "b")
    (lora / "tokenizer.json").write_text("b's")
    if name:
        build.write_adapter(repository / "a")
    events: list[dict[str, Any]] = []
    receipt = lorafuse.convert(
        ckpt, "org/name@main", tmp_path / "out", adapter_name=name, on_event=events.append
    )
    lorafuse.convert(ckpt, lora, tmp_path / "local")
    assert (tmp_path / "out/model.safetensors").read_bytes() == (
        tmp_path / "local/model.safetensors"
    ).read_bytes()
    assert (tmp_path / "out/tokenizer.json").read_text() == "b's"
    read = [file["path"] for file in receipt["inputs"] if file["role"] == "adapter"]
    assert read == ["org/name@main/b/adapter_config.json", "org/name@main/b/adapter_model.safetensors"]
    warnings = [event["message"] for event in events if event["event"] == "warning"]
    assert warnings == ([] if name else ["org/name@main: the adapter in it, b, is taken."])
    assert not [path for path in (tmp_path / "hub").rglob("a/*") if path.name != "adapter_config.json"]


def test_several_adapters_in_a_repository(repository: Path, tmp_path: Path) -> None:
    """They are named, with their configs alone fetched."""
    ckpt = build.write_checkpoint(tmp_path / "ckpt")
    for name in ("a", "b"):
        build.write_adapter(repository / name)
    with pytest.raises(
        AdapterError, match=r"holds several adapters: a, b; choose one by its name \(--adapter-name\)\."
    ):
        lorafuse.convert(ckpt, "org/name", tmp_path / "out")
    assert not list((tmp_path / "hub").rglob("*.safetensors"))


def test_files_that_the_first_ones_ask_for(repository: Path, tmp_path: Path) -> None:
    """What modules.json and auto_map name is fetched of the same commit; no other weights are."""
    config = build.CONFIG | {"auto_map": {"AutoModel": "code/modeling_own.Own"}}
    build.write_checkpoint(repository, config=config)
    modules = [{"path": path} for path in ("", "1_Pooling", "2_Dense", "3_Normalize")]
    build.write_json(repository / "modules.json", modules)
    kept = (
        *("qwen.tiktoken", "modules.json", "1_Pooling/config.json", "2_Dense/model.safetensors"),
        *("code/modeling_own.py", "code/ops/norm.py", "code/ops/__init__.py"),
    )
    left = (
        *("onnx/model.onnx", "model.gguf", "original/params.json", "pytorch_model.bin"),
        *("README.md", "other/x.py"),
    )
    for name in (*kept, *left):
        (repository / name).parent.mkdir(parents=True, exist_ok=True)
        if name != "modules.json":
            text = "from .ops.norm import x" if "modeling" in name else "x = 1"
            (repository / name).write_text(text)
    lora = build.write_adapter(tmp_path / "lora")
    lorafuse.convert("org/name", lora, tmp_path / "out")
    made = {"config.json", "model.safetensors", "lorafuse_receipt.json"}
    assert build.files_of(tmp_path / "out").keys() - made == set(kept)
    fetched = {name.partition("snapshots/0/")[2] for name in build.files_of(tmp_path / "hub")}
    assert not fetched & set(left)


def test_the_second_request_names_the_commit(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """So that files of two commits are never mixed."""
    snapshot = tmp_path / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    build.write_json(snapshot / "modules.json", [{"path": "1_Pooling"}])
    asked = []

    def snapshot_download(repo_id: str, **options: Any) -> str:
        asked.append((options["revision"], options["allow_patterns"]))
        return str(snapshot)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    monkeypatch.chdir(tmp_path)
    checkpoint_folder("org/name@main")
    assert asked == [("main", ["*"]), ("abc", ["1_Pooling/*"])]
