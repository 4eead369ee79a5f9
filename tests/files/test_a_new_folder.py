"""A kind of folder is added by one file and one word: a toy kind in a copy of the package is merged from."""

import shutil
import subprocess
import sys
from pathlib import Path

from build import files_of, write_adapter, write_checkpoint

import lorafuse

# A tar archive whose members are the files.
FILE = '''
"""A folder that is a tar archive: tar://PATH."""

import tarfile
from fnmatch import fnmatchcase

from lorafuse.files.folder import FileFacts


class TarFolder:
    commit, held_nbytes = None, 0

    def __init__(self, url, prefix=""):
        self.url, self.prefix = url, prefix
        with tarfile.open(url.removeprefix("tar://")) as archive:
            members = {m.name.removeprefix("./"): archive.extractfile(m) for m in archive if m.isfile()}
            self.members = {name: f.read() for name, f in members.items() if name.startswith(prefix)}
        self.address, self.local_path = url + prefix, None

    def __str__(self):
        return self.url

    def __truediv__(self, name):
        return f"{self.url}!{self.prefix}{name}"

    def is_there(self):
        return True

    def exists(self, name):
        return self.prefix + name in self.members

    def names(self, pattern):
        names = [name.removeprefix(self.prefix) for name in self.members]
        return sorted(n for n in names if n.count("/") == pattern.count("/") and fnmatchcase(n, pattern))

    def sub_folders(self):
        return sorted({name.split("/")[0] for name in self.members if "/" in name})

    def sub_folder(self, name):
        return TarFolder(self.url, f"{self.prefix}{name}/")

    def facts(self, name):
        return self.open(name).facts

    def is_unchecked(self, name):
        return True

    def known_hash(self, name):
        return None

    def open(self, name, *, inside=False):
        if not self.exists(name):
            raise FileNotFoundError(2, "No such file or directory", self / name)
        return TarFile(self.members[self.prefix + name])


class TarFile:
    def __init__(self, data):
        self.data, self.facts = data, FileFacts(len(data), (len(data),))

    def read_into(self, start, buffer):
        piece = self.data[start : start + len(buffer)]
        buffer[: len(piece)] = piece
        return len(piece)

    def will_need(self, start, nbytes):
        pass

    def close(self):
        pass
'''
IMPORT = "from lorafuse.files.local_folder import LocalFolder\n"
TABLE = '= {"": LocalFolder.at,'
WORD = '= {"": LocalFolder.at, "tar": TarFolder,'


def test_one_file_and_one_word(tmp_path: Path) -> None:
    package = tmp_path / "package" / "lorafuse"
    shutil.copytree(
        Path(lorafuse.__file__).parent, package, ignore=shutil.ignore_patterns("__pycache__", "*.pyc")
    )
    table = package / "files/folders.py"
    text = table.read_text()
    assert text.count(IMPORT) == text.count(TABLE) == 1
    (package / "files/tar_folder.py").write_text(FILE)
    table.write_text(
        text.replace(IMPORT, f"{IMPORT}from lorafuse.files.tar_folder import TarFolder\n").replace(
            TABLE, WORD
        )
    )

    inputs = [write_checkpoint(tmp_path / "ckpt", n_shards=2), write_adapter(tmp_path / "lora/style")]
    (tmp_path / "ckpt/tokenizer.json").write_text("{}")
    lorafuse.convert(inputs[0], inputs[1], tmp_path / "expected")
    archives = [
        shutil.make_archive(str(tmp_path / name), "tar", tmp_path / name) for name in ("ckpt", "lora")
    ]
    names = [f"tar://{archive}" for archive in archives]
    out = tmp_path / "out"
    code = (
        f"import sys; sys.path.insert(0, {str(package.parent)!r}); import lorafuse; "
        f"assert lorafuse.__file__.startswith({str(package)!r}); "
        f"receipt = lorafuse.convert(*{names!r}, {str(out)!r}); "
        f"assert receipt['inputs'][0]['path'] == {names[0]!r} + '/config.json'; "
        f"lorafuse.verify({str(out)!r}, ckpt={names[0]!r}, adapters=[{names[1]!r}]); "
        f"assert lorafuse.inspect({names[0]!r})['kind'] == 'checkpoint'"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
    made, expected = files_of(out), files_of(tmp_path / "expected")
    del made["lorafuse_receipt.json"], expected["lorafuse_receipt.json"]
    assert made == expected
