"""The hash of a file that several threads write: that of the whole, however the bytes come."""

import hashlib
import random
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lorafuse.errors import StorageError
from lorafuse.files import trailing_hash
from lorafuse.files.safetensors_writer import ShardWriter
from lorafuse.files.spares import SPARES, Spares
from lorafuse.files.tensors import StoredTensor, TensorSpec
from lorafuse.outdir.local_file import LocalOutFile

MANY = 1 << 40


@st.composite
def pieces(draw: st.DrawFn) -> tuple[int, list[tuple[int, int]]]:
    """A size, and the parts of so many bytes in any order, most often nearly that of the file."""
    size = draw(st.integers(1, 60_000))
    cuts = sorted({0, size, *draw(st.lists(st.integers(1, size), max_size=40))})
    parts = list(pairwise(cuts))
    far = draw(st.sampled_from([0, 1, 4, len(parts)]))
    rng = random.Random(draw(st.integers(0, 1000)))
    order = sorted(range(len(parts)), key=lambda i: i + rng.uniform(0, far))
    return size, [parts[i] for i in order]


@settings(max_examples=60, deadline=None)
@given(
    pieces(),
    st.integers(1, 6),
    st.sampled_from([0, 500, 20_000, MANY]),
    st.sampled_from(["beside", "at once"]),
    st.integers(0, 4),
    st.integers(0, 1000),
)
def test_any_order_and_any_threads(
    tmp_path_factory, parts, n_threads, wait_nbytes, behind, n_spares, seed
) -> None:
    (size, order), n_usual = parts, SPARES.n
    data, rng = random.Random(seed).randbytes(size), random.Random(seed)
    pauses = {at: rng.choice([0, 0, 0.0005]) for at, _ in order}
    path = tmp_path_factory.mktemp("shard") / "x.safetensors"
    with ThreadPoolExecutor(n_threads) as writing, ThreadPoolExecutor(2) as others:
        submit = others.submit if behind == "beside" else None
        spec = StoredTensor("a", TensorSpec("U8", (size,)))
        SPARES.n = n_spares
        writer = ShardWriter(LocalOutFile(path), [spec], submit, wait_nbytes)

        def write(part: tuple[int, int]) -> None:
            time.sleep(pauses[part[0]])
            writer.write("a", part[0], memoryview(data)[slice(*part)])

        list(writing.map(write, order))
        digest = writer.finish()
        SPARES.n = n_usual
    content = path.read_bytes()
    assert content.endswith(data) and writer.nbytes == len(content)
    assert digest == hashlib.sha256(content).hexdigest()


class Slow:
    """A digest that takes its time, and says which bytes it got from which thread."""

    def __init__(self) -> None:
        self.got: list[tuple[bytes, str]] = []
        self.goes_on = threading.Event()

    def update(self, data: bytes) -> None:
        self.goes_on.wait(10)
        self.got.append((bytes(data), threading.current_thread().name))


@pytest.fixture
def slow(monkeypatch: pytest.MonkeyPatch) -> Slow:
    digest = Slow()
    monkeypatch.setattr(trailing_hash.hashlib, "sha256", lambda: digest)
    return digest


def no_reading(start: int, n: int) -> bytes:
    raise AssertionError("read back")


def in_threads(hashed: trailing_hash.TrailingHash, parts: list[tuple[int, bytes]]) -> dict[str, bool]:
    """What `add` returned to a thread for each part; each begins when the one before hashes or waits."""
    returned: dict[str, bool] = {}

    def add(start: int, data: bytes) -> None:
        returned[data.decode()] = hashed.add(start, data)

    threads = [threading.Thread(target=add, args=part, name=part[1].decode()) for part in parts]
    for n, thread in enumerate(threads):
        thread.start()
        until = time.monotonic() + 10
        while hashed.n_added < sum(len(data) for _, data in parts[: n + 1]) and time.monotonic() < until:
            time.sleep(0.001)
    return returned


@pytest.mark.parametrize("wait_nbytes", [MANY, 0])
def test_who_hashes(wait_nbytes: int, slow: Slow) -> None:
    """Threads whose bytes are the next ones do, in turn, without reading; what they do not wait for, and what
    came too early, is read back."""
    written = b"aabbccdd"
    hashed = trailing_hash.TrailingHash(
        lambda start, n: written[start : start + n], wait_nbytes, Spares(0, 0)
    )
    returned = in_threads(hashed, [(0, b"aa"), (2, b"bb"), (6, b"dd"), (4, b"cc")])
    slow.goes_on.set()
    until = time.monotonic() + 10
    while len(returned) < 4 and time.monotonic() < until:
        time.sleep(0.001)
    assert sum(returned.values()) == 1  # one of them is told that bytes wait
    hashed.catch_up()
    assert b"".join(data for data, _ in slow.got) == written
    by_writers = [data for data, name in slow.got if name == data.decode()]
    assert by_writers == ([b"aa", b"bb", b"cc"] if wait_nbytes else [b"aa"])


def test_nobody_waits_and_nothing_is_read_back_while_there_are_spare_buffers(slow: Slow) -> None:
    """Who hashes first goes on with copies of what others brought, be it too early; all are free then."""
    written, buffers = b"aabbccddee", Spares(3, 2)
    hashed = trailing_hash.TrailingHash(no_reading, MANY, buffers)
    returned = in_threads(hashed, [(0, b"aa"), (2, b"bb"), (6, b"dd"), (4, b"cc")])
    assert returned == {"bb": False, "dd": False, "cc": False}  # they are back before "aa" is hashed
    slow.goes_on.set()
    until = time.monotonic() + 10
    while len(returned) < 4 and time.monotonic() < until:
        time.sleep(0.001)
    assert not returned["aa"] and not hashed.add(8, b"ee")
    assert b"".join(data for data, _ in slow.got) == written
    assert {name for _, name in slow.got[:4]} == {"aa"}
    assert all(buffers.copy(b"xx") is not None for _ in range(3))


def test_who_is_next_hashes_before_the_write_unless_another_thread_hashes(slow: Slow) -> None:
    """Bytes that are not written yet are never read back, whatever was written behind them."""
    written = b"..bb..dd"
    hashed = trailing_hash.TrailingHash(lambda start, n: written[start : start + n], MANY, Spares(0, 0))
    assert hashed.add_early(2, b"bb") is None and hashed.n_added == 0  # not the next ones
    assert hashed.add(2, b"bb") is False
    returned: list[bool | None] = []
    thread = threading.Thread(target=lambda: returned.append(hashed.add_early(0, b"aa")))
    thread.start()
    until = time.monotonic() + 10
    while hashed.n_added < 4 and time.monotonic() < until:
        time.sleep(0.001)
    assert hashed.add_early(4, b"cc") is None and hashed.n_added == 4  # "aa" is being hashed
    slow.goes_on.set()
    thread.join()
    assert returned == [True]  # "bb" waits
    hashed.catch_up()
    assert hashed.add_early(4, b"cc") is False and hashed.n_added == hashed.nbytes == 6
    assert b"".join(data for data, _ in slow.got) == b"aabbcc"


def test_bytes_that_were_hashed_and_not_written_are_missing(tmp_path: Path) -> None:
    """The hash is right, and so is the size: the file is refused all the same."""
    file = LocalOutFile(tmp_path / "x.safetensors")
    writer, write = ShardWriter(file, [StoredTensor("a", TensorSpec("U8", (8,)))]), file.write

    def fail(offset: int, data: bytes | memoryview) -> None:
        raise OSError("broken")

    file.write = fail  # type: ignore[method-assign]
    with pytest.raises(OSError, match="broken"):
        writer.write("a", 0, memoryview(b"abcd"))
    file.write = write  # type: ignore[method-assign]
    writer.write("a", 4, memoryview(b"efgh"))
    with pytest.raises(StorageError, match="were written"):
        writer.finish()
    writer.close()
    assert not (tmp_path / "x.safetensors").exists()


def test_a_file_that_is_given_up_leaves_no_spare_buffer_behind() -> None:
    buffers = Spares(1, 2)
    hashed = trailing_hash.TrailingHash(no_reading, MANY, buffers)
    hashed.add(2, b"bb")
    assert buffers.copy(b"xx") is None
    hashed.stop()
    hashed.add(4, b"cc")
    assert buffers.copy(b"xx") is not None


@pytest.mark.parametrize(("n", "nbytes"), [(0, 4), (1, 3)])
def test_what_no_buffer_has_room_for_is_not_copied(n: int, nbytes: int) -> None:
    assert Spares(n, nbytes).copy(b"abcd") is None


def test_who_waits_is_let_go_when_reading_fails(slow: Slow) -> None:
    def fail(start: int, n: int) -> bytes:
        slow.goes_on.wait(10)
        raise OSError(5, "no such block")

    hashed = trailing_hash.TrailingHash(fail, MANY, Spares(0, 0))
    hashed.add(2, b"bb")
    slow.goes_on.set()
    assert hashed.add(0, b"aa")  # "bb" waits
    slow.goes_on.clear()

    def catch_up() -> None:
        with suppress(OSError):
            hashed.catch_up()

    catching = threading.Thread(target=catch_up)
    catching.start()
    returned = in_threads(hashed, [(4, b"cc")])
    slow.goes_on.set()
    catching.join(10)
    until = time.monotonic() + 10
    while not returned and time.monotonic() < until:
        time.sleep(0.001)
    assert returned == {"cc": False}


def test_what_cannot_be_read_back_is_told_at_the_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(self: LocalOutFile, offset: int, nbytes: int) -> bytes:
        raise StorageError("gone")

    monkeypatch.setattr(LocalOutFile, "read", fail)
    monkeypatch.setattr(SPARES, "n", 0)
    path, spec = tmp_path / "x", StoredTensor("a", TensorSpec("U8", (4,)))
    with ThreadPoolExecutor(1) as pool:
        writer = ShardWriter(LocalOutFile(path), [spec], pool.submit)
        writer.write("a", 2, memoryview(b"cd"))
        writer.write("a", 0, memoryview(b"ab"))
        with pytest.raises(StorageError, match="gone"):
            writer.finish()
        writer.close()
    assert not path.exists()
