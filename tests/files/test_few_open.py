"""A checkpoint may have more shards than a process may have open files."""

import os
import resource
import subprocess
import sys
import threading

import pytest
import torch
from build import checkpoint_tensors, write_adapter, write_checkpoint

import lorafuse
from lorafuse.errors import CheckpointError
from lorafuse.files import few_open
from lorafuse.files.few_open import FewOpen
from lorafuse.files.local_folder import LocalFolder


def n_open():
    return len(os.listdir("/proc/self/fd"))


@pytest.fixture
def folder(tmp_path):
    for i in range(20):
        (tmp_path / f"{i}").write_bytes(bytes([i]) * 8)
    return LocalFolder(tmp_path)


def read(files, i):
    buffer = bytearray(8)
    with files.opened(f"{i}") as file:
        assert file.read_into(0, buffer) == 8
    return buffer[0]


def test_few_are_open_at_once(folder, monkeypatch):
    monkeypatch.setattr(few_open, "MAX_OPEN", 4)
    files, before = FewOpen(folder), n_open()
    assert [read(files, i) for i in range(20)] == list(range(20))
    assert n_open() - before == 4
    assert [read(files, i) for i in reversed(range(20))] == list(reversed(range(20)))
    for i in range(20):
        files.close(f"{i}")
    assert n_open() == before


def test_what_is_read_stays_open(folder, monkeypatch):
    monkeypatch.setattr(few_open, "MAX_OPEN", 1)
    files = FewOpen(folder)
    with files.opened("3") as file, files.opened("3") as again:
        assert file is again and [read(files, i) for i in range(8)] == list(range(8))
        buffer = bytearray(8)
        assert file.read_into(0, buffer) == 8 and buffer[0] == 3


def test_many_threads(folder, monkeypatch):
    """None reads from a file that another one has closed, or from the file that got its number."""
    monkeypatch.setattr(few_open, "MAX_OPEN", 3)
    files, wrong = FewOpen(folder), []

    def work(seed):
        for i in range(2000):
            number = (i * 7 + seed * 3) % 20
            try:
                wrong.extend([number] * (read(files, number) != number))
            except Exception as e:
                wrong.append(e)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def test_a_file_that_was_replaced_while_it_was_closed(folder, monkeypatch):
    monkeypatch.setattr(few_open, "MAX_OPEN", 1)
    files = FewOpen(folder)
    read(files, 0), read(files, 1)
    (folder.path / "new").write_bytes(b"x" * 8)
    (folder.path / "new").rename(folder.path / "0")
    with pytest.raises(CheckpointError, match=r"/0: changed during the run, which"):
        read(files, 0)


def test_more_shards_than_the_process_may_open(tmp_path):
    """The result is that of one file."""
    ckpt, adapter = (
        write_checkpoint(tmp_path / "ckpt", checkpoint_tensors(n_layers=8)),
        write_adapter(tmp_path / "adapter"),
    )
    whole = lorafuse.convert(ckpt, adapter, tmp_path / "whole")
    n_shards = split_by_tensor(ckpt, tmp_path / "split")
    limit = n_shards // 2
    run = subprocess.run(
        [sys.executable, "-m", "lorafuse", "convert", "-q", tmp_path / "split", adapter, tmp_path / "out"],
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_NOFILE, (limit, limit)),
        capture_output=True,
        text=True,
        check=False,
    )
    assert (run.returncode, run.stderr) == (0, "")
    file = "model.safetensors"
    assert (tmp_path / "out" / file).read_bytes() == (tmp_path / "whole" / file).read_bytes()
    assert whole["outputs"]


def split_by_tensor(ckpt, to):
    """Writes a checkpoint with a shard for each tensor. Returns their number."""
    import json
    import shutil

    from safetensors.torch import load_file, save_file

    shutil.copytree(ckpt, to)
    tensors = {k: t for path in to.glob("*.safetensors") for k, t in load_file(path).items()}
    for path in to.glob("*.safetensors*"):
        path.unlink()
    weight_map = {}
    for i, (name, tensor) in enumerate(tensors.items()):
        weight_map[name] = f"model-{i:05d}.safetensors"
        save_file({name: torch.clone(tensor)}, to / weight_map[name], {"format": "pt"})
    (to / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return len(tensors)
