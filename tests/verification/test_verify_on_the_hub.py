"""`lorafuse verify` of a result on the hub: by its receipt, and by its inputs."""

import json
import shutil
from pathlib import Path

import build
import pytest
import torch
from click.testing import CliRunner
from hub_server import HubServer
from safetensors.torch import load_file, save_file

import lorafuse
from lorafuse import cli
from lorafuse.errors import ResultError

SHARD = "model-00001-of-00003.safetensors"


@pytest.fixture
def published(hub: HubServer, tmp_path: Path) -> HubServer:
    """A hub with org/base, me/tuned and their merge, me/merged, in three files of weights."""
    hub.add("org/base", build.write_checkpoint(tmp_path / "ckpt", n_shards=2))
    hub.add("me/tuned", build.write_adapter(tmp_path / "lora", base_model_name_or_path="org/base"))
    lorafuse.convert("auto", "me/tuned", "x", stream=True, push_to_hub="me/merged", max_shard_size="8KB")
    hub.log.clear()
    return hub


def change(hub: HubServer, file: str, tmp_path: Path) -> Path:
    """A file of a further commit of me/merged, to be changed."""
    repo = hub.repos["me/merged"]
    shutil.copytree(repo.path(repo.refs["main"]), tmp_path / "changed")
    hub.add("me/merged", tmp_path / "changed")
    return repo.path(repo.refs["main"]) / file


def test_by_the_receipt(published: HubServer, tmp_path: Path) -> None:
    """All bytes are compared, and no weight is kept."""
    checked = lorafuse.verify("me/merged")
    outputs = json.loads((change(published, "lorafuse_receipt.json", tmp_path)).read_text())["outputs"]
    assert checked == {"files": len(outputs), "nbytes": sum(e["size"] for e in outputs), "weights": 0}
    assert any(entry["file"] == SHARD for entry in outputs)
    assert not [file for file in published.fetched("me/merged") if file.endswith(".safetensors")]
    assert list(Path().iterdir()) == []


def test_by_the_inputs(published: HubServer) -> None:
    ran = CliRunner().invoke(cli.lorafuse, ["verify", "me/merged", "--ckpt", "auto", "--adapter", "me/tuned"])
    assert ran.exit_code == 0, ran.output
    assert ran.stdout.splitlines()[1:] == ["21 weights are what the inputs make."]
    fetched = published.fetched()
    assert all(n == 1 for n in fetched.values()) and SHARD in fetched


def test_an_element_that_differs(published: HubServer, tmp_path: Path) -> None:
    path = change(published, SHARD, tmp_path)
    tensors = load_file(path)
    name = next(name for name in tensors if name.endswith("q_proj.weight"))
    tensors[name].view(torch.int16).flatten()[5] ^= 1
    save_file(tensors, path, {"format": "pt"})
    with pytest.raises(ResultError, match=rf"^me/merged/{SHARD}: was changed: its sha256 is"):
        lorafuse.verify("me/merged")


def test_what_another_tool_published(published: HubServer, tmp_path: Path) -> None:
    change(published, "lorafuse_receipt.json", tmp_path).unlink()
    checked = lorafuse.verify("me/merged", ckpt="org/base", adapters=["me/tuned"])
    assert checked["relations"] == {"equal": 21}


def test_what_is_not_there(published: HubServer) -> None:
    with pytest.raises(
        ResultError, match=r"^me/mergd: no such directory, and no such repository on the hub\.$"
    ):
        lorafuse.verify("me/mergd")
    with pytest.raises(ResultError, match=r"^org/base: has no lorafuse_receipt\.json; with the checkpoint"):
        lorafuse.verify("org/base")
