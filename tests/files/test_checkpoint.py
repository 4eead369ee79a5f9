"""A checkpoint directory: what is read, what is refused, and in which words."""

import errno
import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from build import CONFIG, checkpoint_tensors, shard_name, write_checkpoint, write_json
from safetensors.torch import save_file

from lorafuse.errors import CheckpointError, StorageError
from lorafuse.files.checkpoint import Checkpoint
from lorafuse.files.json_yaml import MAX_JSON_NBYTES
from lorafuse.files.local_folder import LocalFolder
from lorafuse.files.names import INDEX, SINGLE
from lorafuse.files.stores import read_all

FIRST, SECOND = shard_name(1, 2), shard_name(2, 2)


@pytest.fixture
def single(tmp_path: Path) -> Path:
    return write_checkpoint(tmp_path / "ckpt")


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    return write_checkpoint(tmp_path / "ckpt", n_shards=2)


def refused(path: Path) -> str:
    """The message of the refusal, less the path."""
    before = len(os.listdir("/proc/self/fd"))
    with pytest.raises(CheckpointError) as caught:
        Checkpoint(LocalFolder(path))
    assert len(os.listdir("/proc/self/fd")) == before
    assert str(caught.value).isprintable()
    return str(caught.value).replace(str(path), "CKPT")


def edit_index(path: Path, **changes: object) -> None:
    """Change the index's weight_map; None removes a name."""
    index = json.loads((path / INDEX).read_text())
    index["weight_map"] = {k: v for k, v in (index["weight_map"] | changes).items() if v is not None}
    write_json(path / INDEX, index)


def assert_holds(checkpoint: Checkpoint, tensors: dict[str, torch.Tensor]) -> None:
    assert set(checkpoint.tensors) == set(tensors)
    for name, tensor in tensors.items():
        assert checkpoint.tensors[name].spec.shape == tuple(tensor.shape)
        assert read_all(checkpoint, name) == bytes(tensor.reshape(-1).view(torch.uint8).tolist())
    checkpoint.close()


# ---- what is read


@pytest.mark.parametrize("n_shards", [1, 2, 5])
def test_reads_every_tensor(tmp_path: Path, n_shards: int) -> None:
    """However many files a checkpoint has, it holds the same tensors and config."""
    path = write_checkpoint(tmp_path / "ckpt", n_shards=n_shards)
    checkpoint = Checkpoint(LocalFolder(path))
    assert checkpoint.config == CONFIG
    assert_holds(checkpoint, checkpoint_tensors())


def test_index_of_a_single_file(single: Path) -> None:
    """An index may name model.safetensors."""
    write_json(single / INDEX, {"weight_map": dict.fromkeys(checkpoint_tensors(), SINGLE)})
    assert_holds(Checkpoint(LocalFolder(single)), checkpoint_tensors())


def test_file_in_a_folder(sharded: Path) -> None:
    """An index may name files in a folder of the checkpoint."""
    (sharded / "parts").mkdir()
    (sharded / FIRST).rename(sharded / "parts" / FIRST)
    weight_map = json.loads((sharded / INDEX).read_text())["weight_map"]
    edit_index(sharded, **{n: f"parts/{FIRST}" for n, file in weight_map.items() if file == FIRST})
    assert_holds(Checkpoint(LocalFolder(sharded)), checkpoint_tensors())


def test_hub_cache_layout(sharded: Path, tmp_path: Path) -> None:
    """Files may be links out of the directory, as in the hub's cache."""
    blobs, snapshot = tmp_path / "models--a--b" / "blobs", tmp_path / "models--a--b" / "snapshots" / "0123abc"
    blobs.mkdir(parents=True)
    snapshot.mkdir(parents=True)
    for i, file in enumerate(sorted(sharded.iterdir())):
        file.rename(blobs / f"{i:040x}")
        (snapshot / file.name).symlink_to(Path("..", "..", "blobs", f"{i:040x}"))
    assert_holds(Checkpoint(LocalFolder(snapshot)), checkpoint_tensors())


@pytest.mark.parametrize(
    "name", ["consolidated.safetensors", "pytorch_model.bin", "model-00003-of-00003.safetensors", "x.part"]
)
def test_files_that_the_index_does_not_name(sharded: Path, name: str) -> None:
    """Whatever else lies beside an index is not read, be it valid or not."""
    (sharded / name).write_bytes(b"not a checkpoint")
    assert_holds(Checkpoint(LocalFolder(sharded)), checkpoint_tensors())


@pytest.mark.parametrize("total_size", [0, 1, -5, 1e30, "much", None])
def test_total_size_is_not_believed(sharded: Path, total_size: object) -> None:
    """A wrong total_size does no harm: sizes come from the headers."""
    index = json.loads((sharded / INDEX).read_text())
    write_json(sharded / INDEX, index | {"metadata": {"total_size": total_size}})
    assert_holds(Checkpoint(LocalFolder(sharded)), checkpoint_tensors())


# ---- config.json


def test_no_config(single: Path) -> None:
    """Without config.json there is no checkpoint."""
    (single / "config.json").unlink()
    assert refused(single) == "CKPT/config.json: not found; CKPT is no complete checkpoint."


@pytest.mark.parametrize(
    ("value", "found"), [([1], "list"), ("text", "str"), (1.5, "float"), (None, "NoneType"), (True, "bool")]
)
def test_config_is_no_object(single: Path, value: object, found: str) -> None:
    """config.json holds an object."""
    write_json(single / "config.json", value)
    assert refused(single) == f"CKPT/config.json: holds {found}, expected an object."


@pytest.mark.parametrize(
    "data", [b"", b"{", b"\xff\xfe\xfd", b"{}x", b"[" * 100_000, b'{"a": ' + b"9" * 5000 + b"}"]
)
def test_config_is_no_json(single: Path, data: bytes) -> None:
    """A config.json that cannot be parsed is refused by name, however it is broken."""
    (single / "config.json").write_bytes(data)
    assert refused(single).startswith("CKPT/config.json: is not valid JSON: ")


@pytest.mark.parametrize(
    ("field", "value", "expected"),
    [
        ("model_type", ["llama"], "str"),
        ("model_type", {}, "str"),
        ("architectures", 5, "list"),
        ("architectures", "LlamaForCausalLM", "list"),
        ("text_config", "x", "dict"),
        ("text_config", [1], "dict"),
        ("quantization_config", "nf4", "dict"),
    ],
)
def test_config_field_of_another_type(single: Path, field: str, value: object, expected: str) -> None:
    """A field of config.json that is read and has another type than its own is refused."""
    write_json(single / "config.json", CONFIG | {field: value})
    assert refused(single).startswith(f"CKPT/config.json: {field} is ")
    assert refused(single).endswith(f"; expected {expected}.")


@pytest.mark.parametrize("field", ["model_type", "architectures", "text_config", "quantization_config"])
def test_config_field_is_null(single: Path, field: str) -> None:
    """A null field is as good as none."""
    write_json(single / "config.json", CONFIG | {field: None})
    assert_holds(Checkpoint(LocalFolder(single)), checkpoint_tensors())


def test_huge_config(single: Path) -> None:
    """A config.json larger than any real one is not read to its end."""
    with open(single / "config.json", "r+b") as f:
        f.truncate(MAX_JSON_NBYTES + 10**12)
    assert refused(single) == "CKPT/config.json: is larger than 64000000 bytes."


def test_config_is_a_fifo(single: Path) -> None:
    """Nothing waits for a FIFO."""
    (single / "config.json").unlink()
    os.mkfifo(single / "config.json")
    assert refused(single) == "CKPT/config.json: is not a regular file."


# ---- the index


def test_no_weights(single: Path) -> None:
    """A directory without safetensors files is refused, and so is an empty one."""
    (single / SINGLE).unlink()
    assert refused(single) == f"CKPT: holds neither {SINGLE} nor {INDEX}."


def test_only_bin_that_is_none(single: Path) -> None:
    """Files of torch.save are read where there are no others: test_torch_file.py."""
    (single / SINGLE).rename(single / "pytorch_model.bin")
    assert refused(single) == (
        "CKPT/pytorch_model.bin: is no whole archive of torch.save (torch before 1.6 wrote others): File is "
        "not a zip file. Load it with transformers and save it with save_pretrained, which makes safetensors."
    )


@pytest.mark.parametrize(
    "index", [{}, {"weight_map": {}}, {"weight_map": []}, {"weight_map": None}, {"weight_map": "x"}]
)
def test_no_weight_map(sharded: Path, index: object) -> None:
    """An index has a weight_map."""
    write_json(sharded / INDEX, index)
    assert refused(sharded) == f"CKPT/{INDEX}: has no weight_map."


@pytest.mark.parametrize("index", [[], "x", 1])
def test_index_is_no_object(sharded: Path, index: object) -> None:
    """The index holds an object."""
    write_json(sharded / INDEX, index)
    assert refused(sharded) == f"CKPT/{INDEX}: holds {type(index).__name__}, expected an object."


@pytest.mark.parametrize("data", [b"", b"{", b"[" * 100_000, b"\x80"])
def test_index_is_no_json(sharded: Path, data: bytes) -> None:
    """An index that cannot be parsed is refused by name."""
    (sharded / INDEX).write_bytes(data)
    assert refused(sharded).startswith(f"CKPT/{INDEX}: is not valid JSON: ")


@pytest.mark.parametrize(
    "file",
    [
        "/etc/passwd.safetensors",
        "../x.safetensors",
        "sub/../../x.safetensors",
        "..",
        "C:\\x.safetensors",
        "C:x.safetensors",
        "..\\x.safetensors",
        "\\\\srv\\x.safetensors",
        "x\0.safetensors",
        "x\n.safetensors",
        "\x1b[31m.safetensors",
        "\ud800.safetensors",
        "x" * 250 + ".safetensors",
        "é" * 130 + ".safetensors",
        "pytorch_model.bin",
        "",
        5,
        None,
        ["model.safetensors"],
        {},
    ],
)
def test_index_names_no_file_of_the_directory(sharded: Path, file: object) -> None:
    """A name that leaves the directory, that is no safetensors file, or that a terminal should not see, is
    refused unopened."""
    index = json.loads((sharded / INDEX).read_text())
    index["weight_map"]["lm_head.weight"] = file
    write_json(sharded / INDEX, index)
    message = refused(sharded)
    assert message.startswith(f"CKPT/{INDEX}: maps lm_head.weight to ")
    assert message.endswith(", which is no safetensors file of this directory.")


def test_shard_missing(sharded: Path) -> None:
    """A file that the index names and that is not there is named."""
    (sharded / SECOND).unlink()
    assert refused(sharded) == f"CKPT/{SECOND}: not found; CKPT is no complete checkpoint."


def test_shard_in_a_file(sharded: Path) -> None:
    """A path through something that is no folder leads nowhere."""
    edit_index(sharded, **{"lm_head.weight": "config.json/x.safetensors"})
    assert refused(sharded) == "CKPT/config.json/x.safetensors: not found; CKPT is no complete checkpoint."


def test_dangling_link(sharded: Path) -> None:
    """A link to nothing, as an interrupted download leaves it, is a missing file."""
    (sharded / SECOND).unlink()
    (sharded / SECOND).symlink_to("../blobs/0")
    assert refused(sharded) == f"CKPT/{SECOND}: not found; CKPT is no complete checkpoint."


def test_link_to_itself(sharded: Path) -> None:
    """A link that leads to itself is no file."""
    (sharded / SECOND).unlink()
    (sharded / SECOND).symlink_to(SECOND)
    assert refused(sharded) == f"CKPT/{SECOND}: is not a regular file."


def test_shard_lacks_a_tensor(sharded: Path) -> None:
    """A tensor that the index lists and no file has is named, with the file that should have it."""
    edit_index(sharded, **{"more.weight": FIRST})
    assert refused(sharded) == f"CKPT/{FIRST}: lacks more.weight, which {INDEX} expects there."


def test_tensor_in_another_shard(sharded: Path) -> None:
    """A tensor is where the index says, not in another file."""
    weight_map = json.loads((sharded / INDEX).read_text())["weight_map"]
    name = next(n for n, file in weight_map.items() if file == FIRST)
    edit_index(sharded, **{name: SECOND})
    assert refused(sharded) == f"CKPT/{SECOND}: lacks {name}, which {INDEX} expects there."


def test_tensor_that_the_index_does_not_list(sharded: Path) -> None:
    """A tensor that the index does not list is refused, not dropped: the index belongs to another version of
    the file."""
    weight_map = json.loads((sharded / INDEX).read_text())["weight_map"]
    name = next(n for n, file in weight_map.items() if file == SECOND)
    edit_index(sharded, **{name: None})
    assert refused(sharded) == f"CKPT/{SECOND}: holds {name}, which {INDEX} does not list."


def test_tensor_in_two_shards(sharded: Path) -> None:
    """A tensor that two files hold is refused with both files."""
    for file in (FIRST, SECOND):
        save_file({"a.weight": torch.zeros(2), f"{file[:11]}.weight": torch.zeros(2)}, sharded / file)
    weight_map = {"a.weight": FIRST, "model-00001.weight": FIRST, "model-00002.weight": SECOND}
    write_json(sharded / INDEX, {"weight_map": weight_map})
    assert refused(sharded) == f"CKPT/{SECOND}: a.weight is also in {FIRST}; a tensor must be in one file."


def test_stale_single_file(sharded: Path) -> None:
    """A model.safetensors beside an index that does not name it is refused: other programs would read that
    one."""
    shutil.copy(sharded / FIRST, sharded / SINGLE)
    assert (
        refused(sharded)
        == f"CKPT: holds both {INDEX} and {SINGLE}, which it does not name; remove the stale one."
    )


def test_damaged_shard(sharded: Path) -> None:
    """What is wrong with the format of one file is a fault of the checkpoint."""
    os.truncate(sharded / SECOND, (sharded / SECOND).stat().st_size - 1)
    assert refused(sharded).endswith("; it is truncated or damaged.")
    assert refused(sharded).startswith(f"CKPT/{SECOND}: has ")


def test_lfs_pointer(sharded: Path) -> None:
    """A clone without its large files is recognised."""
    (sharded / SECOND).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
    assert (
        refused(sharded)
        == f"CKPT/{SECOND}: is a git-LFS pointer, not the file itself; fetch it with `git lfs pull`."
    )


@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir])
def test_shard_is_no_file(sharded: Path, make: object) -> None:
    """A shard that is a FIFO or a directory is refused; nothing waits for it."""
    (sharded / FIRST).unlink()
    make(sharded / FIRST)
    assert refused(sharded) == f"CKPT/{FIRST}: is not a regular file."


@pytest.mark.parametrize(
    ("code", "reason"), [(errno.EACCES, "Permission denied"), (errno.EIO, "Input/output error")]
)
def test_unreadable(sharded: Path, monkeypatch: pytest.MonkeyPatch, code: int, reason: str) -> None:
    """A file that is there and cannot be read is an I/O error, and is not said to be missing."""
    real_open = os.open

    def fail(path: object, *args: int) -> int:
        if str(path).endswith(SECOND):
            raise OSError(code, os.strerror(code), str(path))
        return real_open(path, *args)

    monkeypatch.setattr(os, "open", fail)
    with pytest.raises(StorageError) as caught:
        Checkpoint(LocalFolder(sharded))
    assert str(caught.value) == f"{sharded / SECOND}: cannot be read: {reason}."
