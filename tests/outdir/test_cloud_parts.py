"""The bytes of a file on their way into a store: whole parts in order, whatever order they come in."""

import errno
import os
import tempfile
from threading import Thread

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lorafuse.errors import StorageError
from lorafuse.outdir import cloud_parts
from lorafuse.outdir.cloud_parts import MIB, MOST_PARTS, N_PARTS, Parts, part_nbytes_of


class Store:
    """What is sent; nothing that was sent may change."""

    def __init__(self):
        self.parts, self.copies = [], []

    def send(self, part):
        self.parts.append(part)
        self.copies.append(bytes(part))

    @property
    def data(self):
        assert [bytes(part) for part in self.parts] == self.copies
        return b"".join(self.copies)


@st.composite
def writes(draw):
    """(size of a part, bytes of a file, pieces of it in any order)."""
    part, data = draw(st.integers(1, 9)), draw(st.binary(min_size=1, max_size=60))
    cuts = sorted(draw(st.sets(st.integers(1, max(len(data) - 1, 1)), max_size=12)) - {len(data)})
    pieces = list(zip([0, *cuts], [*cuts, len(data)], strict=True))
    return part, data, draw(st.permutations(pieces))


@given(writes(), st.randoms(use_true_random=False))
@settings(max_examples=300, deadline=None)
def test_any_order(case, random):
    """Every byte is sent once, in parts of the same size; what was written and not passed can be read."""
    part_nbytes, data, pieces = case
    store = Store()
    parts = Parts(len(data), part_nbytes, store.send)
    written, passed = set(), 0
    for start, end in pieces:
        parts.write(start, data[start:end])
        written.update(range(start, end))
        assert len(parts._in_memory) <= N_PARTS
        at = random.choice(sorted(written))
        if at >= passed:
            found = parts.read(at, random.randint(1, 20))
            n = next(n for n in range(len(data) + 1) if at + n not in written)
            assert found and found[:n] == data[at : at + len(found)][:n]
        front = next(n for n in range(len(data) + 1) if n not in written)
        passed = random.randint(passed, front)
        parts.passed(passed)
    assert parts.is_complete and store.data == data
    assert {len(part) for part in store.parts[:-1]} <= {part_nbytes}
    parts.close()


def test_in_order_nothing_lies_on_disk(monkeypatch):
    monkeypatch.setattr(tempfile, "TemporaryFile", lambda **_: pytest.fail("a file"))
    store, data = Store(), os.urandom(100)
    parts = Parts(100, 10, store.send)
    for at in range(0, 100, 4):
        parts.write(at, data[at : at + 4])
        parts.passed(at + 4)
    assert parts.is_complete and store.data == data


def test_what_is_read_late_lies_on_disk():
    """A hash that lags behind what is sent reads it all the same."""
    store, data = Store(), os.urandom(100)
    parts = Parts(100, 10, store.send)
    parts.write(0, data)
    found = bytearray()
    while len(found) < 100:
        found += parts.read(len(found), 7)
    assert found == data == store.data


def test_reading_does_not_wait_for_the_store():
    """The hash goes on while a part is on its way."""
    data, found = os.urandom(20), []

    def send(part):
        thread = Thread(target=lambda: found.append(parts.read(3, 5)))
        thread.start()
        thread.join(5)

    parts = Parts(20, 10, send)
    parts.write(0, data)
    assert found[0] == data[3:8]


def test_sizes():
    """Few enough parts for a file of 5 TB, and none smaller than S3 takes."""
    assert part_nbytes_of(1) == part_nbytes_of(5 * 10**9) == 5 * MIB
    for nbytes in (50 * 10**9, 5 * 10**12):
        assert part_nbytes_of(nbytes) % MIB == 0
        assert nbytes / part_nbytes_of(nbytes) <= MOST_PARTS < 10_000


def test_bytes_beyond_the_end():
    with pytest.raises(StorageError, match=r"^12 bytes were written, the plan has 10\.$"):
        Parts(10, 4, lambda part: None).write(8, b"1234")


def test_a_full_disk(monkeypatch, tmp_path):
    """Is named, with what helps."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    error = cloud_parts.named(OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)))
    assert str(error) == (
        f"{tmp_path}: No space left on device; what comes out of order lies there until it is uploaded. Free "
        "some space, or set TMPDIR."
    )
