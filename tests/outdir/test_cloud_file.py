"""A file of several parts on its way to a real S3 server: written by many threads, disturbed, given up."""

import os
from concurrent.futures import ThreadPoolExecutor
from random import Random

import pytest
from disturbing_proxy import SLOW_DOWN, times

from lorafuse.errors import StorageError
from lorafuse.files.cloud_store import CloudPlace
from lorafuse.outdir.cloud_file import CloudOutFile

PART, NBYTES = 5 << 20, (11 << 20) + 7


@pytest.fixture(scope="module")
def data():
    return os.urandom(NBYTES)


@pytest.fixture
def file(s3):
    file = CloudOutFile(CloudPlace.at("s3://models/out"), "big", NBYTES)
    yield file
    file.close()


def test_threads_write_it_in_any_order(file, data, s3):
    """Nothing shows before it is complete; it then has three parts."""
    step = 1 << 18
    starts = [*range(0, NBYTES, step)]
    near = Random(0)  # as workers do that take tiles in order
    starts.sort(key=lambda start: start + near.randrange(12) * step)
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda start: file.write(start, data[start : start + step]), starts))
    assert s3.keys("models") == [] and s3.uploads("models") == ["out/big"]
    assert file.read(NBYTES - 7, 100) == data[-7:]
    file.finish(NBYTES)
    assert s3.files("s3://models/out") == {"big": data} and s3.uploads("models") == []
    assert sum("partNumber" in path for method, path in s3.log if method == "PUT") == 3


FAULTS = [(503, SLOW_DOWN), (500, b""), "cut", "lost"]


@pytest.mark.parametrize("fault", FAULTS, ids=str)
def test_a_part_that_fails_is_sent_again(fault, file, data, s3):
    with s3.disturbed(times(2, fault, "PUT", "partNumber"), times(1, fault, "POST", "uploadId")):
        file.write(0, data)
        file.finish(NBYTES)
    assert s3.files("s3://models/out") == {"big": data} and s3.uploads("models") == []


def test_a_part_that_stays_wrong(file, data, s3):
    """The upload is given up, and nothing of it is left."""
    with s3.disturbed(times(99, (503, SLOW_DOWN), "PUT", "partNumber=2")):
        with pytest.raises(StorageError) as caught:
            file.write(0, data)
            file.finish(NBYTES)
        file.close()
    says = "s3://models/out/big: the store answered 503 SlowDown, 4 times; try again later."
    assert str(caught.value) == says
    assert s3.keys("models") == [] and s3.uploads("models") == []


def test_given_up(file, data, s3):
    file.write(0, data[: PART + 1])
    assert s3.uploads("models") == ["out/big"]
    file.close()
    assert s3.keys("models") == [] and s3.uploads("models") == []


def test_bytes_that_are_missing(file, data, s3):
    file.write(0, data[:-1])
    with pytest.raises(StorageError) as caught:
        file.finish(NBYTES)
    assert str(caught.value) == f"s3://models/out/big: bytes are missing, the plan has {NBYTES}."
    file.close()
    assert s3.keys("models") == [] and s3.uploads("models") == []
