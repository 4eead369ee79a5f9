"""A kind of OUT_DIR is added by one file and one word: a copy of the package gets a toy kind, and merges into
it."""

import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

from build import files_of, write_adapter, write_checkpoint

import lorafuse

# A zip archive, which appears when it is complete. What a run that was cut off has made is made again.
FILE = '''
"""A result that is a zip archive: zip://PATH."""

import hashlib
import os
import zipfile

from safetensors import deserialize

from lorafuse.errors import OutDirError
from lorafuse.files.folder import FileHash


def path_of(out_dir):
    return out_dir.removeprefix("zip://")


def check_out_dir(out_dir, inputs, *, overwrite):
    if os.path.exists(path_of(out_dir)) and not overwrite:
        raise OutDirError(f"{out_dir}: exists.")


def open_out_dir(out_dir, plan_id, attempt=None, *, overwrite=False, restart=False, on_event=None):
    return ZipOutDir(out_dir)


def held_nbytes(sizes, ckpt):
    return 0


def clean_up(out_dir):
    pass


def left_nbytes(out_dirs):
    return 0


def space_of(out_root):
    return None


class ZipOutDir:
    def __init__(self, out_dir):
        self.name = self.place = out_dir
        self.finished, self.data = {}, {}

    def __enter__(self):
        return self

    def __exit__(self, kind, error, trace):
        pass

    def create(self, file, nbytes):
        return ZipMember(self, file)

    def put(self, file, chunks):
        self.data[file] = b"".join(chunks)

    def files(self):
        return sorted(self.data)

    def hash(self, file):
        return FileHash(len(self.data[file]), hashlib.sha256(self.data[file]).hexdigest())

    def shapes(self, file):
        tensors = deserialize(bytes(self.data[file]))
        return len(self.data[file]), {name: tuple(tensor["shape"]) for name, tensor in tensors}

    def record(self, written, measures):
        pass

    def space(self):
        return None

    def commit(self):
        part = path_of(self.name) + ".part"
        with zipfile.ZipFile(part, "w") as archive:
            for file in self.files():
                archive.writestr(file, bytes(self.data[file]))
        os.replace(part, path_of(self.name))


class ZipMember:
    def __init__(self, out_dir, file):
        self.name, self.out_dir, self.data = file, out_dir, bytearray()

    def write(self, offset, data):
        self.data.extend(bytes(max(offset + len(data) - len(self.data), 0)))
        self.data[offset : offset + len(data)] = data

    def read(self, offset, nbytes):
        return bytes(self.data[offset : offset + nbytes])

    def passed(self, end):
        pass

    def finish(self, nbytes):
        self.out_dir.data[self.name] = self.data

    def close(self):
        pass
'''
IMPORT = "from lorafuse.outdir import local\n"
TABLE = '= {"": local,'
WORD = '= {"": local, "zip": zip_out_dir,'


def test_one_file_and_one_word(tmp_path: Path) -> None:
    package = tmp_path / "package" / "lorafuse"
    shutil.copytree(
        Path(lorafuse.__file__).parent, package, ignore=shutil.ignore_patterns("__pycache__", "*.pyc")
    )
    table = package / "outdir/kinds.py"
    text = table.read_text()
    assert text.count(IMPORT) == text.count(TABLE) == 1
    (package / "outdir/zip_out_dir.py").write_text(FILE)
    table.write_text(
        text.replace(IMPORT, "from lorafuse.outdir import local, zip_out_dir\n").replace(TABLE, WORD)
    )

    inputs = [str(write_checkpoint(tmp_path / "ckpt", n_shards=2)), str(write_adapter(tmp_path / "lora"))]
    (tmp_path / "ckpt/tokenizer.json").write_text("{}")
    lorafuse.convert(*inputs, tmp_path / "expected", max_shard_size="2KB")
    out = tmp_path / "out.zip"
    code = (
        f"import sys; sys.path.insert(0, {str(package.parent)!r}); import lorafuse; "
        f"assert lorafuse.__file__.startswith({str(package)!r}); "
        f"lorafuse.convert(*{inputs!r}, {f'zip://{out}'!r}, max_shard_size='2KB')"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
    again = subprocess.run([sys.executable, "-c", code], capture_output=True, timeout=120, check=False)
    assert f"OutDirError: zip://{out}: exists." in again.stderr.decode()
    with zipfile.ZipFile(out) as archive:
        archive.extractall(tmp_path / "made")
    made, expected = files_of(tmp_path / "made"), files_of(tmp_path / "expected")
    assert len(made) > 5 and made.pop("lorafuse_receipt.json")
    del expected["lorafuse_receipt.json"]
    assert made == expected
