"""What is read ahead of objects: the right bytes for any number of readers, in few requests and bounded
memory."""

import os
from random import Random
from threading import Lock, Thread

import pytest

from lorafuse.files import cloud_spans
from lorafuse.files.cloud_spans import Spans


class Object:
    """An object that counts its requests."""

    def __init__(self, nbytes):
        self.data, self.requests, self._lock = os.urandom(nbytes), [], Lock()
        self.error = None

    def fetch(self, start, buffer):
        with self._lock:
            self.requests.append((start, len(buffer)))
            if self.error:
                raise self.error
        buffer[:] = self.data[start : start + len(buffer)]


@pytest.fixture(autouse=True)
def small(monkeypatch):
    monkeypatch.setattr(cloud_spans, "SHORT_NBYTES", 64)
    monkeypatch.setattr(cloud_spans, "LONG_NBYTES", 512)


def read(spans, source, start, nbytes):
    data = bytearray(nbytes)
    n = 0
    while n < nbytes and (
        k := spans.read_into(source.fetch, len(source.data), start + n, memoryview(data)[n:])
    ):
        n += k
    return bytes(data[:n])


def test_many_readers_of_many_objects():
    spans, sources = Spans(), [Object(3000) for _ in range(3)]
    wrong = []

    def work(seed):
        random = Random(seed)
        for _ in range(300):
            source = random.choice(sources)
            start, nbytes = random.randrange(3100), random.choice([1, 10, 700])
            if random.random() < 0.3:
                spans.will_need(source.fetch, 3000, start, nbytes)
            if read(spans, source, start, nbytes) != source.data[start : start + nbytes]:
                wrong.append((start, nbytes))
            if random.random() < 0.05:
                spans.forget(source.fetch)

    threads = [Thread(target=work, args=(seed,)) for seed in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not any(thread.is_alive() for thread in threads) and not wrong
    assert len(spans._spans) + len(spans._buffers) <= cloud_spans.N_SPANS


def test_what_follows_is_asked_for_at_once():
    """A header takes a short request; whoever goes on reading gets long ones, and nothing twice."""
    spans, source = Spans(), Object(4000)
    assert read(spans, source, 0, 10) == source.data[:10]
    assert source.requests == [(0, 64)]
    for start in range(10, 4000, 10):
        assert read(spans, source, start, 10) == source.data[start : start + 10]
    starts = [start for start, _ in source.requests]
    assert len(source.requests) == 9 and sum(nbytes for _, nbytes in source.requests) == 4000
    assert starts == sorted(starts)


def test_a_hint_is_a_request_ahead():
    spans, source = Spans(), Object(4000)
    spans.will_need(source.fetch, 4000, 1000, 300)
    spans.will_need(source.fetch, 4000, 1100, 300)
    assert read(spans, source, 1000, 500) == source.data[1000:1500]
    assert source.requests == [(1000, 512)]


def test_an_error_is_told_to_each_who_reads():
    """Also one of what was asked for ahead; then it is asked for again."""
    spans, source = Spans(), Object(100)
    source.error = OSError("gone")
    spans.will_need(source.fetch, 100, 0, 50)
    for _ in range(20):  # as many as there are buffers, and more
        with pytest.raises(OSError, match="gone"):
            read(spans, source, 0, 50)
    source.error = None
    assert read(spans, source, 0, 100) == source.data
