"""Inputs by name: a local directory, else a repository on the hub, which is a server on this machine."""

import errno
import os
import shutil
from pathlib import Path
from typing import Any

import build
import pytest
from hub_server import HubServer

import lorafuse
from lorafuse.errors import AdapterError, CheckpointError, LorafuseError, StorageError
from lorafuse.files.hub import HubName, folder_of, hub_name
from lorafuse.files.local_folder import LocalFolder
from lorafuse.inputs.located import checkpoint_folder

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.mark.parametrize(
    ("name", "repo", "folder", "revision"),
    [
        ("org/name", "org/name", None, None),
        ("org/name@main", "org/name", None, "main"),
        ("org/name@refs/pr/3", "org/name", None, "refs/pr/3"),
        (f"org/name@{COMMIT}", "org/name", None, COMMIT),
        ("Org-1/Name_2.5-x", "Org-1/Name_2.5-x", None, None),
        ("org/name/checkpoint-4", "org/name", "checkpoint-4", None),
        ("org/name/runs/4/@v2", "org/name", "runs/4", "v2"),
        ("https://huggingface.co/org/name", "org/name", None, None),
        ("https://huggingface.co/org/name/", "org/name", None, None),
        ("https://hf.co/org/name?library=peft", "org/name", None, None),
        ("https://huggingface.co/org/name/tree/main", "org/name", None, "main"),
        ("https://huggingface.co/org/name/tree/v2/runs/4", "org/name", "runs/4", "v2"),
        ("https://huggingface.co/org/name/tree/refs%2Fpr%2F3", "org/name", None, "refs/pr/3"),
        ("https://huggingface.co/org/name/tree/refs/pr/3/a", "org/name", "a", "refs/pr/3"),
        ("https://huggingface.co/org/name/blob/main/config.json", "org/name", None, "main"),
        ("https://huggingface.co/org/name/resolve/v2/a/adapter_config.json", "org/name", "a", "v2"),
        ("https://huggingface.co/org/name/discussions", "org/name", None, None),
    ],
)
def test_hub_names(name: str, repo: str, folder: str | None, revision: str | None) -> None:
    """Ids and the addresses of pages, of a repository, a folder or a file in it, with a revision."""
    assert hub_name(name) == HubName(repo, folder, revision)
    assert hub_name(str(hub_name(name))) == HubName(repo, folder, revision)


NO_NAMES = [
    *("name", "./org/name", "/org/name", "org/name@", "org/name@a@b", "-org/name", "org/", "a/b/../c"),
    *("here/b/c", "https://example.com/org/name", "https://huggingface.co/name"),
]


@pytest.mark.parametrize("kind", [CheckpointError, AdapterError])
@pytest.mark.parametrize("name", NO_NAMES)
def test_no_hub_name(hub: HubServer, name: str, kind: type[LorafuseError]) -> None:
    """What cannot be a repository is a missing directory, and so is what lies in a directory that is here;
    the hub is not asked."""
    os.mkdir("here")
    with pytest.raises(kind) as caught:
        folder_of(name, kind)
    assert str(caught.value) == f"{name}: no such directory."
    assert hub.log == []


@pytest.mark.parametrize("kind", [CheckpointError, AdapterError])
def test_a_url_of_an_unknown_kind(hub: HubServer, kind: type[LorafuseError]) -> None:
    with pytest.raises(kind) as caught:
        folder_of("ftp://org/name", kind)
    assert str(caught.value) == (
        "ftp://org/name: no such directory, and no URL of an object store, as s3://, gs:// and az:// are."
    )
    assert hub.log == []


def test_local_directory_wins(hub: HubServer) -> None:
    """A directory of that name is used, and the hub is not asked."""
    os.makedirs("org/name")
    hub.add("org/name", build.write_checkpoint(Path("ckpt")))
    assert checkpoint_folder("org/name") == LocalFolder(Path("org/name"))
    assert hub.log == []


def test_file_of_that_name(hub: HubServer) -> None:
    """A file where a directory is expected is said to be one."""
    os.mkdir("org")
    Path("org/name").write_text("")
    with pytest.raises(AdapterError) as caught:
        folder_of("org/name", AdapterError)
    assert str(caught.value) == "org/name: is not a directory."
    assert hub.log == []


def test_name_is_escaped(hub: HubServer) -> None:
    """A name with terminal escapes is printed without them."""
    with pytest.raises(CheckpointError) as caught:
        checkpoint_folder("\x1b[31m")
    assert str(caught.value) == "\\x1b[31m: no such directory."


def filled(folder: Path, names: list[str]) -> Path:
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if not path.exists():  # files of the same content are fetched once
            path.write_text(f"x = 1  # {name}")
    return folder


KEPT = [
    *("generation_config.json", "tokenizer.model", "special_tokens_map.json", "merges.txt"),
    *("chat_template.jinja", "additional_chat_templates/tools.jinja", "preprocessor_config.json"),
    *("modeling_own.py", "LICENSE", "LICENSE.txt"),
]
LEFT = [
    *("pytorch_model.bin", "pytorch_model-00001-of-00002.bin", "original/consolidated.00.pth"),
    *("original/model.safetensors", "original/tokenizer.model", "consolidated.safetensors"),
    *("onnx/model.onnx", "vae/model.safetensors", "examples/run.py", "model.gguf", "tf_model.h5"),
    *("flax_model.msgpack", "README.md", ".gitattributes", "optimizer.pt"),
]


@pytest.mark.parametrize("n_shards", [1, 2])
def test_files_of_a_checkpoint(hub: HubServer, tmp_path: Path, n_shards: int) -> None:
    """Everything that a result is made from is fetched, once. Other formats, other copies of the weights, and
    what lies in folders are not."""
    ckpt = filled(build.write_checkpoint(tmp_path / "ckpt", n_shards=n_shards), [*KEPT, *LEFT])
    lora = build.write_adapter(tmp_path / "lora")
    hub.add("org/name", ckpt)
    lorafuse.convert("org/name", lora, tmp_path / "out")
    shards = [path.name for path in ckpt.glob("model*.safetensors*")]
    assert hub.fetched() == dict.fromkeys(["config.json", *KEPT, *shards], 1)
    lorafuse.convert(ckpt, lora, tmp_path / "local")
    assert without_inputs(tmp_path / "out") == without_inputs(tmp_path / "local")


def without_inputs(out: Path) -> dict[str, bytes]:
    files = build.files_of(out)
    files.pop("lorafuse_receipt.json")
    return files


def test_files_of_an_adapter(hub: HubServer, tmp_path: Path) -> None:
    """The adapter and its tokenizer are fetched; training state and intermediate checkpoints are not."""
    lora = build.write_adapter(tmp_path / "lora")
    build.write_adapter(lora / "checkpoint-10")
    left = ["checkpoint-10/tokenizer.json", "checkpoint-10/optimizer.pt", "optimizer.pt", "training_args.bin"]
    filled(lora, [*left, "0000100_adapters.safetensors", "model.safetensors", "README.md"])
    (lora / "tokenizer.json").write_text("{}")
    hub.add("org/name", lora)
    lorafuse.convert(build.write_checkpoint(tmp_path / "ckpt"), "org/name", tmp_path / "out")
    inner = "checkpoint-10/adapter_config.json"  # which tells that there is another one
    assert hub.fetched().keys() - {inner} == {
        "adapter_config.json",
        "adapter_model.safetensors",
        "tokenizer.json",
        "README.md",  # which may say how training loaded the base
    }


def test_a_folder_of_a_repository(hub: HubServer, tmp_path: Path) -> None:
    """`org/name/checkpoint-4` is an adapter in a repository, or a checkpoint; the receipt says so."""
    build.write_adapter(tmp_path / "repository" / "checkpoint-4")
    build.write_checkpoint(tmp_path / "repository" / "base")
    hub.add("org/name", tmp_path / "repository")
    url = f"{hub.url}/org/name/tree/main/checkpoint-4"
    for number, name in enumerate(["org/name/checkpoint-4", url]):
        receipt = lorafuse.convert("org/name/base", name, tmp_path / f"out{number}")
        read = "org/name/checkpoint-4" if number == 0 else "org/name/checkpoint-4@main"
        assert [entry["path"] for entry in receipt["inputs"]] == [
            *("org/name/base/config.json", "org/name/base/model.safetensors"),
            *(f"{read}/adapter_config.json", f"{read}/adapter_model.safetensors"),
        ]
    with pytest.raises(AdapterError) as caught:
        lorafuse.convert("org/name/base", "org/name/checkpoint-5", tmp_path / "out3")
    assert str(caught.value) == "org/name: has no folder checkpoint-5."


@pytest.mark.parametrize("name", [None, "b"])
def test_adapter_in_a_sub_folder_of_a_repository(hub: HubServer, tmp_path: Path, name: str | None) -> None:
    """Only the adapter that is meant is fetched, with the tokenizer beside it; without a name, the only one
    there is."""
    repository = tmp_path / "repository"
    ckpt, lora = build.write_checkpoint(tmp_path / "ckpt"), build.write_adapter(repository / "b")
    (lora / "tokenizer.json").write_text("b's")
    if name:
        build.write_adapter(repository / "a")
    hub.add("org/name", repository)
    events: list[dict[str, Any]] = []
    receipt = lorafuse.convert(
        ckpt, "org/name@main", tmp_path / "out", adapter_name=name, on_event=events.append
    )
    lorafuse.convert(ckpt, lora, tmp_path / "local")
    assert without_inputs(tmp_path / "out") == without_inputs(tmp_path / "local")
    assert (tmp_path / "out/tokenizer.json").read_text() == "b's"
    read = [file["path"] for file in receipt["inputs"] if file["role"] == "adapter"]
    assert read == ["org/name@main/b/adapter_config.json", "org/name@main/b/adapter_model.safetensors"]
    warnings = [event["message"] for event in events if event["event"] == "warning"]
    assert warnings == ([] if name else ["org/name@main: the adapter in it, b, is taken."])
    assert "a/adapter_model.safetensors" not in hub.fetched()


def test_several_adapters_in_a_repository(hub: HubServer, tmp_path: Path) -> None:
    """They are named, with no weights fetched."""
    ckpt = build.write_checkpoint(tmp_path / "ckpt")
    for name in ("a", "b"):
        build.write_adapter(tmp_path / "repository" / name)
    hub.add("org/name", tmp_path / "repository")
    with pytest.raises(
        AdapterError, match=r"holds several adapters: a, b; choose one by its name \(adapter_name\)\."
    ):
        lorafuse.convert(ckpt, "org/name", tmp_path / "out")
    assert not [name for name in hub.fetched() if name.endswith(".safetensors")]


def test_files_that_the_first_ones_ask_for(hub: HubServer, tmp_path: Path) -> None:
    """What modules.json and auto_map name is fetched; no other weights are."""
    config = build.CONFIG | {"auto_map": {"AutoModel": "code/modeling_own.Own"}}
    ckpt = build.write_checkpoint(tmp_path / "ckpt", config=config)
    build.write_json(ckpt / "modules.json", [{"path": "1_Pooling"}])
    kept = [
        *("modules.json", "1_Pooling/config.json", "1_Pooling/model.safetensors"),
        *("code/modeling_own.py", "code/ops/norm.py", "code/ops/__init__.py"),
    ]
    left = ["onnx/model.onnx", "model.gguf", "original/params.json", "README.md", "other/x.py"]
    filled(ckpt, [*kept, *left])
    (ckpt / "code/modeling_own.py").write_text("from .ops.norm import x")
    hub.add("org/name", ckpt)
    lorafuse.convert("org/name", build.write_adapter(tmp_path / "lora"), tmp_path / "out")
    made = {"config.json", "model.safetensors", "lorafuse_receipt.json"}
    assert build.files_of(tmp_path / "out").keys() - made == set(kept)
    assert not hub.fetched().keys() & set(left)


def test_one_commit(hub: HubServer, tmp_path: Path) -> None:
    """All files are of the commit that the branch named first, whatever is committed meanwhile; the receipt
    says which."""
    ckpt, lora = build.write_checkpoint(tmp_path / "ckpt", n_shards=2), build.write_adapter(tmp_path / "lora")
    repo = hub.add("org/name", ckpt)
    first = repo.refs["main"]
    tensors = {name: -tensor for name, tensor in build.checkpoint_tensors().items()}
    other = build.write_checkpoint(tmp_path / "other", tensors, n_shards=2)

    def commits(_: Any, path: str) -> bool:
        if "/resolve/" in path and len(repo.commits) == 1:
            hub.add("org/name", other)
        return False

    hub.faults.append(commits)
    receipt = lorafuse.convert("org/name", lora, tmp_path / "out")
    assert len(repo.commits) == 2
    assert {entry.get("commit") for entry in receipt["inputs"]} == {first, None}
    assert all(("commit" in entry) == (entry["role"] == "checkpoint") for entry in receipt["inputs"])
    lorafuse.convert(ckpt, lora, tmp_path / "local")
    assert without_inputs(tmp_path / "out") == without_inputs(tmp_path / "local")


def test_revisions(hub: HubServer, tmp_path: Path) -> None:
    """A branch, a tag, a pull request or a commit."""
    repo = hub.add("org/name", build.write_checkpoint(tmp_path / "ckpt"))
    hub.add(
        "org/name", build.write_checkpoint(tmp_path / "v2", build.checkpoint_tensors(n_layers=1)), "refs/pr/1"
    )
    for revision in ("refs/pr/1", repo.refs["refs/pr/1"]):
        assert lorafuse.inspect(f"org/name@{revision}")["n_weights"] == 12
    assert lorafuse.inspect("org/name@main")["n_weights"] == 21


def test_cache(hub: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was fetched before is not fetched again, and is enough without a network."""
    hub.add("org/base", build.write_checkpoint(tmp_path / "ckpt", n_shards=2))
    hub.add("me/tuned", build.write_adapter(tmp_path / "lora"))
    lorafuse.convert("org/base", "me/tuned@main", tmp_path / "out")
    n = len(hub.fetched())
    lorafuse.convert("org/base", "me/tuned@main", tmp_path / "out2")
    assert len(hub.fetched()) == n and not [name for name, times in hub.fetched().items() if times > 1]
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    hub.log.clear()
    receipt = lorafuse.convert("org/base", "me/tuned@main", tmp_path / "out3")
    assert hub.log == []
    assert build.files_of(tmp_path / "out").keys() == build.files_of(tmp_path / "out3").keys()
    assert without_inputs(tmp_path / "out") == without_inputs(tmp_path / "out3")
    assert all(len(entry["commit"]) == 40 for entry in receipt["inputs"])


def test_part_of_the_cache_without_a_network(
    hub: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a dry run fetched is not enough: the file that is missing is named, by the id."""
    hub.add("org/base", build.write_checkpoint(tmp_path / "ckpt", n_shards=2))
    lora = build.write_adapter(tmp_path / "lora")
    lorafuse.convert("org/base", lora, tmp_path / "out", dry_run=True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(StorageError) as caught:
        lorafuse.convert("org/base", lora, tmp_path / "out")
    assert str(caught.value) == (
        f"org/base/{build.shard_name(1, 2)}: is not in the hub's cache; HF_HUB_OFFLINE is set: unset it to "
        "ask the hub."
    )


def test_out_dir_in_the_cache(hub: HubServer, tmp_path: Path) -> None:
    """A result is not written into the cache of its input."""
    hub.add("org/base", build.write_checkpoint(tmp_path / "ckpt"))
    out = tmp_path / "home/hub/models--org--base/out"
    lora = build.write_adapter(tmp_path / "lora")
    lorafuse.convert("org/base", lora, tmp_path / "out", dry_run=True)
    with pytest.raises(lorafuse.OutDirError, match="lies inside the input"):
        lorafuse.convert("org/base", lora, out)


def test_user_agent(hub: HubServer, tmp_path: Path) -> None:
    """Whoever runs the hub sees that it is lorafuse, and which version."""
    hub.add("org/base", build.write_checkpoint(tmp_path / "ckpt"))
    lorafuse.convert("org/base", build.write_adapter(tmp_path / "lora"), tmp_path / "out")
    agents = {headers["user-agent"].partition(";")[0] for _, path, headers in hub.log if "base" in path}
    assert agents == {f"lorafuse/{lorafuse.__version__}"}


def test_a_damaged_copy_in_the_cache(hub: HubServer, tmp_path: Path) -> None:
    """It is not merged: its hash is another than the one that the hub lists."""
    hub.add("org/base", build.write_checkpoint(tmp_path / "ckpt"))
    lora = build.write_adapter(tmp_path / "lora")
    lorafuse.convert("org/base", lora, tmp_path / "out")
    [cached] = (tmp_path / "home").rglob("model.safetensors")
    data = bytearray(cached.read_bytes())
    data[-1] ^= 1
    cached.resolve().write_bytes(data)
    with pytest.raises(StorageError) as caught:
        lorafuse.convert("org/base", lora, tmp_path / "out2")
    assert str(caught.value).startswith(
        "org/base/model.safetensors: the copy in the hub's cache is not the file that the hub lists: its "
    )
    assert not (tmp_path / "out2").exists()
    cached.resolve().write_bytes(data[:-1])
    with pytest.raises(StorageError, match="bytes in the hub's cache and 13000 on the hub; remove it"):
        lorafuse.convert("org/base", lora, tmp_path / "out2")


def test_full_disk(hub: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the cache has no room, it is said so, with the repository."""
    hub.add("org/base", build.write_checkpoint(tmp_path / "ckpt"))

    def move(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("huggingface_hub.file_download._chmod_and_move", move)
    with pytest.raises(StorageError) as caught:
        lorafuse.convert("org/base", build.write_adapter(tmp_path / "lora"), tmp_path / "out")
    assert str(caught.value) == "org/base: cannot be fetched: No space left on device."


def test_names_of_files_that_lead_out(hub: HubServer, tmp_path: Path) -> None:
    """An index that names a file elsewhere finds none."""
    ckpt = build.write_checkpoint(tmp_path / "ckpt", n_shards=2)
    hub.add("org/name", ckpt)
    folder = checkpoint_folder("org/name").sub_folder("a")
    assert not folder.exists("../../config.json") and folder.exists("../config.json")
    with pytest.raises(FileNotFoundError):
        folder.open("../../../etc/passwd")
    shutil.rmtree(ckpt)
