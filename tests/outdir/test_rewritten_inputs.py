"""An input that is rewritten during the run, with its size and mtime as they were."""

import os

import pytest
from build import write_adapter, write_checkpoint

import lorafuse
from lorafuse.errors import CheckpointError, StorageError

FILES = ["ckpt/model.safetensors", "ckpt/config.json", "adapter/adapter_model.safetensors",
         "adapter/adapter_config.json"]  # fmt: skip


@pytest.fixture
def inputs(tmp_path):
    return write_checkpoint(tmp_path / "ckpt"), write_adapter(tmp_path / "adapter")


def rewrite(path):
    """In place, as `touch -r` afterwards makes it look."""
    before = path.stat()
    with open(path, "r+b") as f:
        data = f.read()
        f.seek(0)
        f.write(data[:-1] + bytes([data[-1] ^ 1]))
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    after = path.stat()
    assert (after.st_size, after.st_mtime_ns, after.st_ino) == (
        before.st_size,
        before.st_mtime_ns,
        before.st_ino,
    )


@pytest.mark.parametrize("file", FILES)
def test_it_is_noticed(file, inputs, tmp_path):
    def on_event(event):
        if event["event"] == "shard":
            rewrite(tmp_path / file)

    with pytest.raises(CheckpointError) as e:
        lorafuse.convert(*inputs, tmp_path / "out", on_event=on_event)
    assert str(e.value) == (
        f"{tmp_path}/{file}: changed during the run, which may have read some of both; run it again."
    )
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter", "ckpt"]


def test_between_two_runs_a_change_of_mode_or_of_names_is_none(inputs, tmp_path):
    """A run that was cut off is resumed: the contents are the same."""
    n_shards = 0

    def cut_off(event):
        nonlocal n_shards
        n_shards += event["event"] == "shard"
        if n_shards == 2:
            raise OSError(5, "cut off")

    with pytest.raises(StorageError, match="cut off"):
        lorafuse.convert(*inputs, tmp_path / "out", max_shard_size=1400, on_event=cut_off)
    shard = inputs[0] / "model.safetensors"
    shard.chmod(0o640)
    (tmp_path / "second_name").hardlink_to(shard)
    events = []
    lorafuse.convert(*inputs, tmp_path / "out", max_shard_size=1400, on_event=events.append)
    [n_shards] = [event["n_shards"] for event in events if event["event"] == "resumed"]
    assert n_shards >= 2  # files that had all their bytes are finished, too
    assert not [event for event in events if event["event"] == "warning"]
