"""The safetensors format: what is written is what the reference writes, and what is read is only what the
reference reads."""

import errno
import hashlib
import json
import os
import socket
import stat
import struct
import tracemalloc
from pathlib import Path

import pytest
import torch
from build import raw_file
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError, deserialize, safe_open
from safetensors.torch import load, save, save_file

from lorafuse.errors import CheckpointError, StorageError
from lorafuse.files.local_folder import LocalFolder
from lorafuse.files.safetensors_file import FormatError, Shard
from lorafuse.files.safetensors_writer import ShardWriter
from lorafuse.files.tensors import DTYPES, StoredTensor, TensorSpec
from lorafuse.outdir.local_file import LocalOutFile

# The order of safetensors' Rust enum Dtype, which its writer sorts by, largest first; then by name.
REFERENCE_ORDER = (
    "U64", "I64", "F64", "C64", "F32", "U32", "I32", "BF16", "F16", "U16", "I16", "F8_E5M2FNUZ",
    "F8_E4M3FNUZ", "F8_E8M0",
    "F8_E4M3", "F8_E5M2", "I8", "U8", "BOOL",
)  # fmt: skip
AWKWARD = [
    '"',
    "\\",
    "a\nb",
    "\x00",
    "\x1b[31m",
    "\u2028",
    "\u2029",
    "🙂",
    "é",
    "../../x",
    "__metadata",
    "\x7f",
    "\ufeff",
    "a/b",
]


@pytest.fixture(scope="module")
def scratch(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A path for one file after another, as Hypothesis asks for many."""
    return tmp_path_factory.mktemp("scratch") / "x.safetensors"


A = StoredTensor("a", TensorSpec("U8", (3,)))


def writer_of(path: Path, *tensors: StoredTensor) -> ShardWriter:
    return ShardWriter(LocalOutFile(path), tensors)


def write(path: Path, tensors: dict[str, tuple[TensorSpec, bytes]]) -> str:
    writer = writer_of(path, *(StoredTensor(name, spec) for name, (spec, _) in tensors.items()))
    for name, (_, data) in tensors.items():
        writer.write(name, 0, memoryview(data))
    return writer.finish()


def refused(tmp_path: Path, data: bytes) -> str:
    """The message of the refusal, less the path; it must come without much memory."""
    path = tmp_path / "x.safetensors"
    path.write_bytes(data)
    tracemalloc.start()
    try:
        with pytest.raises(FormatError) as caught:
            Shard(LocalFolder(path.parent), path.name)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 40 * len(data) + 300_000
    message = str(caught.value)
    assert len(message) < 1000
    assert message.isprintable()
    assert message.startswith(f"{path}: ")
    return message.removeprefix(f"{path}: ")


def one(name: str = "x", **changes: object) -> dict[str, object]:
    return {name: {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]} | changes}


# ---- writing


def test_pieces_of_columns_are_remembered_as_few(tmp_path: Path) -> None:
    """A matrix that comes by columns has as many entries as rows, and each row one at its end."""
    n_rows, n_cols = 40, 500
    spec = TensorSpec("U8", (n_rows, n_cols))
    data = bytes(i % 251 for i in range(spec.numel))
    writer, most = writer_of(tmp_path / "x", StoredTensor("a", spec)), 0
    hashed = writer._hash
    for col in range(n_cols - 1, -1, -1):
        for row in range(0, spec.numel, n_cols):
            writer.write("a", row + col, memoryview(data[row + col : row + col + 1]))
            most = max(most, len(hashed._ahead), len(hashed._starts_by_end))
    assert most == n_rows
    digest = writer.finish()
    assert not hashed._ahead and not hashed._starts_by_end
    assert digest == hashlib.sha256((tmp_path / "x").read_bytes()).hexdigest()
    assert load((tmp_path / "x").read_bytes())["a"].numpy().tobytes() == data


@st.composite
def tensors_in_reference_order(draw: st.DrawFn) -> dict[str, tuple[TensorSpec, bytes]]:
    names = draw(st.lists(st.text(max_size=12) | st.sampled_from(AWKWARD), max_size=6, unique=True))
    tensors = {}
    for name in names:
        if name != "__metadata__":
            spec = TensorSpec(
                draw(st.sampled_from(REFERENCE_ORDER)), tuple(draw(st.lists(st.integers(0, 4), max_size=3)))
            )
            data = draw(st.binary(min_size=spec.nbytes, max_size=spec.nbytes))
            tensors[name] = (spec, bytes(b & 1 for b in data) if spec.dtype == "BOOL" else data)
    order = sorted(tensors, key=lambda name: (REFERENCE_ORDER.index(tensors[name][0].dtype), name))
    return {name: tensors[name] for name in order}


def as_torch(spec: TensorSpec, data: bytes) -> torch.Tensor:
    flat = torch.frombuffer(bytearray(data), dtype=torch.uint8) if data else torch.empty(0, dtype=torch.uint8)
    return flat.view(getattr(torch, spec.torch_name)).reshape(spec.shape)


@settings(max_examples=150, deadline=None)
@given(tensors=tensors_in_reference_order())
def test_writer_equals_reference(scratch: Path, tensors: dict[str, tuple[TensorSpec, bytes]]) -> None:
    """For any names, dtypes and shapes, the file is byte for byte what safetensors writes for that order."""
    sha256 = write(scratch, tensors)
    assert scratch.read_bytes() == save({name: as_torch(*t) for name, t in tensors.items()}, {"format": "pt"})
    assert sha256 == hashlib.sha256(scratch.read_bytes()).hexdigest()


def test_reference_order_is_complete() -> None:
    """The property above covers every dtype of the table."""
    assert set(REFERENCE_ORDER) == set(DTYPES)


@settings(max_examples=60, deadline=None)
@given(tensors=tensors_in_reference_order(), data=st.data())
def test_read_back(scratch: Path, tensors: dict[str, tuple[TensorSpec, bytes]], data: st.DataObject) -> None:
    """In any order of tensors, what was written is read back, whole and in ranges, by lorafuse and by
    safetensors."""
    order = data.draw(st.permutations(list(tensors)))
    write(scratch, {name: tensors[name] for name in order})
    shard = Shard(LocalFolder(scratch.parent), scratch.name)
    assert [(name, info.spec) for name, info in shard.tensors.items()] == [
        (name, tensors[name][0]) for name in order
    ]
    assert shard.metadata == {"format": "pt"}
    reference = dict(deserialize(scratch.read_bytes()))
    for name, (spec, content) in tensors.items():
        start = data.draw(st.integers(0, len(content)))
        stop = data.draw(st.integers(start, len(content)))
        buffer = bytearray(stop - start)
        shard.read_into(shard.tensors[name], start, buffer)
        assert bytes(buffer) == content[start:stop]
        assert (reference[name]["dtype"], reference[name]["shape"]) == (spec.dtype, list(spec.shape))
        assert bytes(reference[name]["data"]) == content
    shard.close()


@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o077, 0o600), (0o002, 0o664)])
def test_mode_follows_umask(tmp_path: Path, umask: int, mode: int) -> None:
    """Files have the mode that the umask gives, as every other program's."""
    before = os.umask(umask)
    try:
        write(tmp_path / "x.safetensors", {})
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "x.safetensors").stat().st_mode) == mode


def test_part_until_finished(tmp_path: Path) -> None:
    """Nothing has the final name before finish, and nothing has the temporary one after."""
    writer = writer_of(tmp_path / "x.safetensors", A)
    writer.write("a", 0, memoryview(b"abc"))
    assert [p.name for p in tmp_path.iterdir()] == ["x.safetensors.part"]
    writer.finish()
    assert [p.name for p in tmp_path.iterdir()] == ["x.safetensors"]
    writer.close()


@pytest.mark.parametrize(("data", "found"), [(b"ab", 82), (b"abcd", 84)])
def test_wrong_amount_is_not_finished(tmp_path: Path, data: bytes, found: int) -> None:
    """A file that got more or fewer bytes than its header says never gets its name."""
    path = tmp_path / "x.safetensors"
    writer = writer_of(path, A)
    header_nbytes = writer.nbytes
    writer.write("a", 0, memoryview(data))
    with pytest.raises(StorageError) as caught:
        writer.finish()
    writer.close()
    assert (
        str(caught.value)
        == f"{path}: {header_nbytes + len(data)} bytes were written, the plan has {header_nbytes + 3}."
    )
    assert not path.exists()


def test_lost_bytes_are_noticed(tmp_path: Path) -> None:
    """A file that is shorter on disk than what was written to it is not finished."""
    path = tmp_path / "x.safetensors"
    writer = writer_of(path, A)
    writer.write("a", 0, memoryview(b"abc"))
    os.truncate(tmp_path / "x.safetensors.part", 5)
    with pytest.raises(StorageError, match="bytes were written"):
        writer.finish()
    writer.close()


def test_a_writer_that_cannot_write_its_header_leaves_nothing_open(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A disk that is full from the start: the constructor closes what it opened."""

    def no_space(fd: int, data: memoryview, at: int) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    before = len(os.listdir("/proc/self/fd"))
    monkeypatch.setattr(os, "pwrite", no_space)
    with pytest.raises(OSError, match="No space left") as caught:
        writer_of(tmp_path / "x.safetensors", A)
    monkeypatch.undo()
    assert caught.value.errno == errno.ENOSPC
    assert len(os.listdir("/proc/self/fd")) == before


def test_short_writes_go_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A write that the kernel cuts short is continued, not lost."""
    real_write = os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda fd, data, at: real_write(fd, memoryview(data)[:7], at))
    content = bytes(range(100))
    write(tmp_path / "x.safetensors", {"a": (TensorSpec("U8", (100,)), content)})
    assert load((tmp_path / "x.safetensors").read_bytes())["a"].tolist() == list(content)


def test_synced_before_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The data is on the disk before the name is."""
    calls: list[str] = []
    for name in ("fsync", "rename"):
        real = getattr(os, name)
        monkeypatch.setattr(os, name, lambda *a, name=name, real=real: (calls.append(name), real(*a))[1])
    write(tmp_path / "x.safetensors", {})
    assert calls == ["fsync", "rename"]


# ---- reading


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "0 bytes are too few for a safetensors file."),
        (b"\0\0\0\0", "4 bytes are too few for a safetensors file."),
        (
            b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 5\n",
            "is a git-LFS pointer, not the file itself; fetch it with `git lfs pull`.",
        ),
        (raw_file(b""), "the header does not start with '{'; it is no safetensors file."),
        (raw_file(b" {}"), "the header does not start with '{'; it is no safetensors file."),
        (raw_file(b"\xef\xbb\xbf{}"), "the header does not start with '{'; it is no safetensors file."),
        (raw_file(b"[1]"), "the header does not start with '{'; it is no safetensors file."),
        *(
            (
                raw_file(b"{}", length=n),
                f"says that its header has {n} bytes, but the file has 10; it is truncated or no safetensors "
                "file.",
            )
            for n in (3, 11, 100_000_001, 2**63, 2**64 - 1)
        ),
    ],
)
def test_no_header(tmp_path: Path, data: bytes, message: str) -> None:
    """A file without a plausible header is refused by what it is, before anything of that size is
    allocated."""
    assert refused(tmp_path, data) == message


@pytest.mark.parametrize(
    "header",
    [
        b"{",
        b"{}\0\0",
        b"{}{}",
        b"{} x",
        b'{"\xff": 1}',
        b'{"a\nb": {}}',
        b"{" * 100_000,
        b'{"a":' + b"[" * 100_000,
        b'{"a":' + b'{"a":' * 50_000,
        b'{"a":' + b"9" * 5000,
    ],
)
def test_header_is_no_json(tmp_path: Path, header: bytes) -> None:
    """Invalid JSON, NUL padding, a second value, endless nesting and endless numbers are refused, not crashed
    on."""
    assert refused(tmp_path, raw_file(header, b"12345678")).startswith("the header is not valid: ")


@pytest.mark.parametrize(
    ("header", "message"),
    [
        (b'{"x":1,"x":2}', "the header is not valid: the name x occurs twice."),
        (b'{"x":{"dtype":"U8","dtype":"U8"}}', "the header is not valid: the name dtype occurs twice."),
        (
            b'{"__metadata__":{},"__metadata__":{}}',
            "the header is not valid: the name __metadata__ occurs twice.",
        ),
        (b'{"__metadata__":{"a":"b","a":"c"}}', "the header is not valid: the name a occurs twice."),
        (b'{"\\u001b[31m":1,"\\u001b[31m":1}', "the header is not valid: the name \\x1b[31m occurs twice."),
    ],
)
def test_duplicate_names(tmp_path: Path, header: bytes, message: str) -> None:
    """A name that occurs twice is refused, where the reference takes the last."""
    assert refused(tmp_path, raw_file(header)) == message


def test_many_names_and_a_duplicate(tmp_path: Path) -> None:
    """Finding the duplicate takes time in proportion to the header, not to its square."""
    names = ",".join(f'"{i}":0' for i in range(200_000))
    assert (
        refused(tmp_path, raw_file(f'{{{names},"199999":0}}'.encode()))
        == "the header is not valid: the name 199999 occurs twice."
    )


@pytest.mark.parametrize(
    "metadata", [[], 0, "", False, 1, "pt", ["pt"], {"a": 1}, {"a": None}, {"a": {}}, {"a": ["b"]}]
)
def test_metadata_is_strings(tmp_path: Path, metadata: object) -> None:
    """Metadata that is not a dictionary of strings is refused, as by the reference."""
    assert (
        refused(tmp_path, raw_file({"__metadata__": metadata}))
        == "__metadata__ is not a dictionary of strings."
    )


@pytest.mark.parametrize("metadata", [None, {}, {"format": "pt"}, {"": "🙂"}])
def test_metadata(tmp_path: Path, metadata: dict[str, str] | None) -> None:
    """Metadata may be there or not."""
    path = tmp_path / "x.safetensors"
    path.write_bytes(raw_file({"__metadata__": metadata}))
    assert agrees(path)
    assert Shard(LocalFolder(path.parent), path.name).metadata == (metadata or {})


@pytest.mark.parametrize(
    "entry",
    [1, None, "dtype", [], ["F32", [2], [0, 8]], {}, {"dtype": "F32", "shape": [2]}, one(more=1)["x"]],
)
def test_entry_has_three_fields(tmp_path: Path, entry: object) -> None:
    """An entry has its three fields and no other, in which something could hide that the reference
    refuses."""
    assert (
        refused(tmp_path, raw_file({"x": entry}, b"12345678"))
        == "the entry of x must have dtype, shape and two data_offsets, nothing else."
    )


@pytest.mark.parametrize("offsets", [[], [0], [0, 8, 8], None, 8, "08", {"0": 0, "8": 8}])
def test_entry_without_two_offsets(tmp_path: Path, offsets: object) -> None:
    """An entry has two offsets."""
    data = raw_file(one(data_offsets=offsets), b"12345678")
    assert (
        refused(tmp_path, data) == "the entry of x must have dtype, shape and two data_offsets, nothing else."
    )


@pytest.mark.parametrize(
    "changes",
    [
        {"shape": [True, 2]},
        {"shape": [2.0]},
        {"shape": [-2]},
        {"shape": ["2"]},
        {"shape": [[2]]},
        {"shape": 2},
        {"shape": "2"},
        {"shape": {"2": 2}},
        {"shape": None},
        {"shape": [2**63]},
        {"shape": [10**4000]},
        {"data_offsets": [False, 8]},
        {"data_offsets": [0.0, 8]},
        {"data_offsets": [0, 8.0]},
        {"data_offsets": [-8, 0]},
        {"shape": [float("nan")]},
        {"shape": [float("inf")]},
    ],
)
def test_impossible_numbers(tmp_path: Path, changes: dict[str, object]) -> None:
    """Dimensions and offsets are whole numbers from 0 to 2^63: no bool, float, string or negative number
    passes."""
    assert refused(tmp_path, raw_file(one(**changes), b"12345678")) == "x has an impossible shape or offset."


@pytest.mark.parametrize("shape", [[2**62, 2**62], [2**62, 2**62, 0], [2**62] * 300, [2] * 200_000])
def test_too_many_elements(tmp_path: Path, shape: list[int]) -> None:
    """A product of dimensions that overflows is refused at once, a zero after it or not."""
    assert (
        refused(tmp_path, raw_file(one(shape=shape), b"12345678")) == "x has an impossible shape or offset."
    )


@pytest.mark.parametrize(
    "dtype", ["F4", "F6_E2M3", "f32", "", "\x1b[31m", None, 1, [], {}, ["F32"], "F" * 10_000]
)
def test_unknown_dtype(tmp_path: Path, dtype: object) -> None:
    """An unknown dtype is refused by name, whatever its type."""
    message = refused(tmp_path, raw_file(one(dtype=dtype), b"12345678"))
    assert message.startswith("x has the dtype ")
    assert message.endswith(", which is not known here.")


@pytest.mark.parametrize(
    ("shape", "offsets", "message"),
    [
        ([2], [0, 4], "x is F32 [2], 8 bytes, but has 4 bytes of data."),
        ([3], [0, 8], "x is F32 [3], 12 bytes, but has 8 bytes of data."),
        ([], [0, 8], "x is F32 [], 4 bytes, but has 8 bytes of data."),
        ([0], [0, 8], "x is F32 [0], 0 bytes, but has 8 bytes of data."),
        ([2], [8, 0], "x is F32 [2], 8 bytes, but has -8 bytes of data."),
        ([2], [8, 16], "the data of x starts at 8, expected 0; tensors overlap or leave a hole."),
    ],
)
def test_size_against_shape(tmp_path: Path, shape: list[int], offsets: list[int], message: str) -> None:
    """The bytes of a tensor are those that its shape needs, in order, from 0 on."""
    assert refused(tmp_path, raw_file(one(shape=shape, data_offsets=offsets), b"12345678")) == message


@pytest.mark.parametrize(
    ("begin", "at"), [(4, "4, expected 8"), (12, "12, expected 8"), (0, "0, expected 8")]
)
def test_overlap_and_hole(tmp_path: Path, begin: int, at: str) -> None:
    """Two tensors neither overlap nor leave a hole."""
    header = one("a") | one("b", data_offsets=[begin, begin + 8])
    message = f"the data of b starts at {at}; tensors overlap or leave a hole."
    assert refused(tmp_path, raw_file(header, bytes(begin + 8))) == message


@pytest.mark.parametrize("missing", [1, 8, 4096])
def test_truncated(tmp_path: Path, missing: int) -> None:
    """A file that lost its end, by a byte or by a page, is refused with both sizes."""
    whole = raw_file(one(shape=[2048], data_offsets=[0, 8192]), bytes(8192))
    message = (
        f"has {len(whole) - missing} bytes, its header describes {len(whole)}; it is truncated or damaged."
    )
    assert refused(tmp_path, whole[:-missing]) == message


def test_trailing_byte(tmp_path: Path) -> None:
    """A byte after the last tensor is refused."""
    whole = raw_file(one(), b"12345678")
    message = f"has {len(whole) + 1} bytes, its header describes {len(whole)}; it is truncated or damaged."
    assert refused(tmp_path, whole + b"\0") == message


@pytest.mark.parametrize(
    "header",
    [b'{"\\ud800":%s}', b'{"__metadata__":{"\\udfff":""},"x":%s}', b'{"__metadata__":{"":"\\ud83d"},"x":%s}'],
)
def test_lone_surrogates(tmp_path: Path, header: bytes) -> None:
    """A name or metadata that no UTF-8 can spell is refused; it could not be written again."""
    entry = json.dumps(one()["x"]).encode()
    assert "is not valid Unicode" in refused(tmp_path, raw_file(header % entry, b"12345678"))


@pytest.mark.parametrize("name", [*AWKWARD, "", "x" * 10_000])
def test_any_name_is_a_name(tmp_path: Path, name: str) -> None:
    """Names are data: whatever Unicode allows is read and written unchanged."""
    write(tmp_path / "x.safetensors", {name: (TensorSpec("U8", (1,)), b"a")})
    assert list(Shard(LocalFolder(tmp_path), "x.safetensors").tensors) == [name]


@pytest.mark.parametrize("pad", range(8))
def test_unaligned_data(tmp_path: Path, pad: int) -> None:
    """Data may start at any byte."""
    path = tmp_path / "x.safetensors"
    path.write_bytes(raw_file(json.dumps(one()).encode() + b" " * pad, b"12345678"))
    shard, buffer = Shard(LocalFolder(path.parent), path.name), bytearray(4)
    shard.read_into(shard.tensors["x"], 3, buffer)
    assert buffer == b"4567"


def make_fifo(path: Path) -> None:
    os.mkfifo(path)


def make_socket(path: Path) -> None:
    socket.socket(socket.AF_UNIX).bind(os.path.relpath(path))


@pytest.mark.parametrize(
    "make", [Path.mkdir, make_fifo, make_socket, lambda path: path.symlink_to("/dev/null")]
)
def test_not_a_regular_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, make: object) -> None:
    """A directory, a FIFO, a socket or a device is refused; nothing waits for it."""
    monkeypatch.chdir(tmp_path)  # a socket's path may not be long
    path = tmp_path / "x.safetensors"
    make(path)
    with pytest.raises(FormatError) as caught:
        Shard(LocalFolder(path.parent), path.name)
    assert str(caught.value) == f"{path}: is not a regular file."


def test_symlink_loop(tmp_path: Path) -> None:
    """A link that leads to itself is the directory's fault, not the disk's."""
    path = tmp_path / "x.safetensors"
    path.symlink_to(path)
    with pytest.raises(FormatError, match="not a regular file"):
        Shard(LocalFolder(path.parent), path.name)


def test_truncated_while_reading(tmp_path: Path) -> None:
    """A file that gets shorter after it was opened is an error that says where, never data that was not
    there."""
    path = tmp_path / "x.safetensors"
    path.write_bytes(raw_file(one(), b"12345678"))
    shard = Shard(LocalFolder(path.parent), path.name)
    end = path.stat().st_size - 3
    os.truncate(path, end)
    with pytest.raises(CheckpointError) as caught:
        shard.read_into(shard.tensors["x"], 0, bytearray(8))
    assert str(caught.value) == f"{path}: ends at byte {end}; it was changed or truncated during the run."


def test_read_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An I/O error names the file and the byte."""
    path = tmp_path / "x.safetensors"
    path.write_bytes(raw_file(one(), b"12345678"))
    shard = Shard(LocalFolder(path.parent), path.name)
    data_start = path.stat().st_size - 8

    def fail(*_: object) -> int:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(os, "preadv", fail)
    with pytest.raises(StorageError) as caught:
        shard.read_into(shard.tensors["x"], 4, bytearray(2))
    assert str(caught.value) == f"{path}: reading at byte {data_start + 4} failed: Input/output error."


def test_short_reads_go_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A read that the kernel cuts short is continued."""
    path = tmp_path / "x.safetensors"
    path.write_bytes(raw_file(one(), b"12345678"))
    real_preadv = os.preadv
    monkeypatch.setattr(os, "preadv", lambda fd, views, at: real_preadv(fd, [views[0][:3]], at))
    shard, buffer = Shard(LocalFolder(path.parent), path.name), bytearray(8)
    shard.read_into(shard.tensors["x"], 0, buffer)
    assert buffer == b"12345678"


def test_nothing_stays_open(tmp_path: Path) -> None:
    """A refused file is closed again."""
    path = tmp_path / "x.safetensors"
    path.write_bytes(raw_file(b"{"))
    before = os.listdir("/proc/self/fd")
    for _ in range(3):
        with pytest.raises(FormatError):
            Shard(LocalFolder(path.parent), path.name)
    assert len(os.listdir("/proc/self/fd")) == len(before)


# ---- against the reference


def agrees(path: Path) -> bool | None:
    """Whether lorafuse accepts the file; then safetensors must, and see the same in it."""
    try:
        shard = Shard(LocalFolder(path.parent), path.name)
    except FormatError:
        return False
    try:
        with safe_open(path, framework="np") as f:
            found = {
                name: (f.get_slice(name).get_dtype(), tuple(f.get_slice(name).get_shape()))
                for name in f.keys()  # noqa: SIM118 (not a dict)
            }
            assert (f.metadata() or {}) == shard.metadata
    except SafetensorError as e:
        raise AssertionError(f"safetensors refuses what lorafuse accepts: {e}") from None
    assert found == {name: (info.spec.dtype, info.spec.shape) for name, info in shard.tensors.items()}
    shard.close()
    return True


VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-9, 9)
    | st.sampled_from([2**62, 2**63, 2**64, 0.0, 2.0, 1e999, float("nan")])
    | st.sampled_from(["F32", "F16", "U8", "BOOL", "F8_E8M0", "F4", "a", "\ud800", "🙂"]),
    lambda inner: st.lists(inner, max_size=3)
    | st.dictionaries(st.sampled_from(["dtype", "shape", "data_offsets", "a"]), inner),
    max_leaves=6,
)  # fmt: skip


@st.composite
def mutated_headers(draw: st.DrawFn) -> bytes:
    """A valid file of three tensors with one or two values of its header replaced, added or removed."""
    header: dict[str, object] = {
        "__metadata__": {"format": "pt"},
        "a": {"dtype": "F32", "shape": [2, 2], "data_offsets": [0, 16]},
        "b": {"dtype": "U8", "shape": [], "data_offsets": [16, 17]},
        "c": {"dtype": "BF16", "shape": [0, 3], "data_offsets": [17, 17]},
    }
    for _ in range(draw(st.integers(1, 2))):
        where: object = header
        while isinstance(where, dict | list) and where:
            key = draw(st.sampled_from(sorted(where) if isinstance(where, dict) else range(len(where))))
            inner = where[key]
            if isinstance(inner, dict | list) and inner and draw(st.booleans()):
                where = inner
                continue
            action = draw(st.sampled_from(["replace", "add", "remove"]))
            if action == "replace":
                where[key] = draw(VALUES)
            elif action == "remove":
                del where[key]
            elif isinstance(where, dict):
                where[draw(st.sampled_from(["d", "x", "dtype", "__metadata__"]))] = draw(VALUES)
            else:
                where.append(draw(VALUES))
            break
    return raw_file(json.dumps(header).encode(), bytes(17))


@settings(max_examples=400, deadline=None)
@given(data=mutated_headers())
def test_accepted_headers_are_valid(scratch: Path, data: bytes) -> None:
    """Whatever header lorafuse accepts, safetensors accepts and reads alike; what it refuses, it refuses as a
    FormatError."""
    scratch.write_bytes(data)
    agrees(scratch)


@settings(max_examples=400, deadline=None)
@given(data=st.data())
def test_accepted_bytes_are_valid(scratch: Path, data: st.DataObject) -> None:
    """The same for a file in which bytes were changed, removed or put in anywhere."""
    file = bytearray(
        raw_file({"__metadata__": {"a": "b"}} | one("a") | one("b", data_offsets=[8, 16]), bytes(16))
    )
    for _ in range(data.draw(st.integers(1, 2))):
        at = data.draw(st.integers(0, len(file) - 1))
        put = data.draw(
            st.sampled_from(
                [b"", b"-", b'"', b" ", b"0", b"1", b"e", b"\\", b"\t", b"\0", b"\xff", b"{", b","]
            )
        )
        file[at : at + data.draw(st.integers(0, 2))] = put
    if data.draw(st.booleans()):  # repair the length, so that the header is looked at
        end = file.rfind(b"}", 0, len(file)) + 1
        if end > 8:
            file[:8] = struct.pack("<Q", end - 8)
    scratch.write_bytes(bytes(file))
    agrees(scratch)


@pytest.mark.parametrize("header", [
    b'{"x":{"dtype":"F32","shape":[2],"data_offsets":[-0,8]}}',
    b'{"x":{"dtype":"F32","shape":[-0],"data_offsets":[0,0]}}',
    b'{"x":{"dtype":"F32","shape":[2],"data_offsets":[0,8],"more":NaN}}',
    b'{"x":{"dtype":"F32","shape":[2],"data_offsets":[0,8],"more":' + b"[" * 300 + b"]" * 300 + b"}}",
    b'{"x":{"dtype":"F32","shape":[2],"data_offsets":[0,8],"more":"\\ud800"}}',
    b'{"x":{"dtype":"F32","shape":[02],"data_offsets":[0,8]}}',
    b'{"x":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}} \t\r\n',
    b'{"\\ud83d\\ude42":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}',
    b'{"x":{"dtype":"F32","shape":[2],"data_offsets":[0,8]},"y":{"dtype":"F32","shape":[0,3],"data_offsets":[8,8]}}',
])  # fmt: skip
def test_odd_spellings(tmp_path: Path, header: bytes) -> None:
    """What Python's JSON lets through and Rust's does not is refused too."""
    path = tmp_path / "x.safetensors"
    path.write_bytes(raw_file(header, b"12345678" if b"[0,0]" not in header else b""))
    agrees(path)


def test_names_that_look_like_an_entry_are_only_names(tmp_path):
    """Three tensors may be called dtype, shape and data_offsets, and so may three keys of the metadata."""
    names = ("dtype", "shape", "data_offsets")
    save_file(
        {name: torch.arange(3) for name in names},
        tmp_path / "a.safetensors",
        metadata=dict.fromkeys(names, "x"),
    )
    shard = Shard(LocalFolder(tmp_path), "a.safetensors")
    assert sorted(shard.tensors) == sorted(names) and shard.metadata == dict.fromkeys(names, "x")
