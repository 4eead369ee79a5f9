"""A checkpoint, an adapter, and a directory in which a result of theirs is made, disturbed and made again."""

import json
import shutil
from pathlib import Path

from build import CONFIG, adapter_tensors, checkpoint_tensors, files_of, write_adapter, write_checkpoint

import lorafuse
from lorafuse.files.names import RECEIPT
from lorafuse.outdir import commit

SHARD = "1400"
N_SHARDS = 5
TIMES = ("timing", "peak_rss", "tool")
WAYS = ["beside", "inside", "exchange", "renames"]


def five_shards(path: Path) -> tuple[Path, Path]:
    """A checkpoint and an adapter that make five shards and a tokenizer."""
    tensors = {
        name: t for name, t in checkpoint_tensors().items() if ".1." not in name and "gate" not in name
    }
    ckpt = write_checkpoint(path / "ckpt", tensors, config=CONFIG | {"num_hidden_layers": 1})
    (ckpt / "tokenizer.json").write_text("{}")
    (ckpt / "additional_chat_templates").mkdir()
    (ckpt / "additional_chat_templates" / "rag.jinja").write_text("rag")
    return ckpt, write_adapter(path / "adapter", adapter_tensors(tensors))


def content(out):
    """Every file of a result; of the receipt what does not differ from run to run."""
    files = files_of(out)
    return without_times({name: data for name, data in files.items() if not name.startswith(".lorafuse")})


def without_times(files):
    """The files of a result, of its receipt what does not differ from run to run."""
    if RECEIPT in files:
        receipt = json.loads(files[RECEIPT])
        files[RECEIPT] = json.dumps(
            {name: value for name, value in receipt.items() if name not in TIMES}
        ).encode()
    return files


def uninterrupted(inputs, out):
    """The content of what a run makes that nothing happens to."""
    lorafuse.convert(*inputs, out, max_shard_size=SHARD)
    result = content(out)
    assert sum(name.endswith(".safetensors") for name in result) == N_SHARDS
    return result


class Directory:
    """Where results are made on this machine: an OUT_DIR, `out`, and what a run for it leaves beside it."""

    def __init__(self, path):
        self.path, self.out = path, path / "out"

    @property
    def _hidden(self):
        (folder,) = (path for path in self.path.iterdir() if path.name.startswith(".out.lorafuse-"))
        return folder

    def top(self):
        """Every name that is there, hidden or not."""
        return sorted(path.name for path in self.path.iterdir())

    def content(self):
        return content(self.out)

    def staged(self):
        """The files of a result that is not complete."""
        return files_of(self._hidden / "out")

    def damage(self, file, data):
        """Replace a file that a run left, or with None remove it."""
        path = self._hidden / file
        path.unlink()
        if data is not None:
            path.write_bytes(data)

    def journal(self):
        return (self._hidden / "journal.jsonl").read_bytes()

    def clear(self):
        shutil.rmtree(self.path)


class Bucket:
    """The same in memory."""

    def __init__(self, store):
        self.store, self.out = store, "memory://out"

    def top(self):
        return sorted({name.partition("/")[0] for name in self.store.below("memory:/") if "out" in name})

    def _files(self, url):
        return {name: bytes(self.store.objects[f"{url}/{name}"]) for name in self.store.below(url)}

    def content(self):
        return without_times(self._files(self.out))

    def staged(self):
        return self._files("memory://.out.lorafuse/out")

    def damage(self, file, data):
        del self.store.objects[f"memory://.out.lorafuse/{file}"]
        if data is not None:
            self.store.objects[f"memory://.out.lorafuse/{file}"] = data

    def journal(self):
        return self.store.objects["memory://.out.lorafuse/journal.jsonl"]

    def clear(self):
        self.store.objects.clear()


class Work:
    """A directory with an OUT_DIR in it, which is committed one of four ways; `again` is the command."""

    def __init__(self, way, inputs, path, monkeypatch):
        self.way, self._inputs, self.path, self.out = way, inputs, path, path / "out"
        self.old = {}
        if way == "inside":
            monkeypatch.setattr(commit, "_is_mount", lambda path: path == self.out)
        if way == "renames":
            monkeypatch.setattr(commit.ctypes, "CDLL", lambda *args, **kw: object())
        self.reset()

    def reset(self):
        shutil.rmtree(self.path, ignore_errors=True)
        self.path.mkdir()
        if self.way != "beside":
            self.out.mkdir()
        if self.way in ("exchange", "renames"):
            self.old = {"config.json": b"old", "model.safetensors": b"old", "mine.txt": b"old"}
            for name, data in self.old.items():
                (self.out / name).write_bytes(data)

    def again(self, **options):
        return lorafuse.convert(
            *self._inputs, self.out, max_shard_size=SHARD, overwrite=bool(self.old), **options
        )

    def check_untouched(self, clean):
        """OUT_DIR as it was, or complete. Returns whether it is complete."""
        found = content(self.out)
        if found == clean:
            return True
        if self.way == "inside":  # the weaker promise: with a config.json all weights are there
            assert "config.json" not in found or clean.keys() - found.keys() <= {RECEIPT}
            assert all(clean[name] == data for name, data in found.items())
        elif self.way == "renames" and not self.out.exists():
            pass  # for the time between two renames; the next run gives it its name again, or finishes
        else:
            assert found == self.old
        return False

    def check_finished(self, clean):
        assert content(self.out) == clean and not (self.out / ".lorafuse.lock").exists()
        assert [p.name for p in self.path.iterdir()] == ["out"]
