"""The formulas of bench/speed/fleet.py, on figures that can be counted by hand."""

import math

import pytest

from bench.speed.batch import LARGE, MOST, Llama
from bench.speed.fleet import BatchCoefficients, Coefficients, Size, doubtful

KNOWN = Coefficients(start_s=10, decoded_s=2, copied_s=1, commit_s=0.5)
SIZE = Size(decoded=90, copied=30)
KIND = "q_proj and v_proj"


@pytest.mark.parametrize(
    ("n_workers", "seconds"),
    # 12 files of 10 bytes, each a twelfth of 210 seconds: the worker with most has 12, 6, 3, 2 or 1 of them.
    [(1, 220), (2, 115), (4, 62.5), (7, 45), (12, 27.5), (64, 27.5)],
)
def test_files_are_whole(n_workers, seconds):
    assert KNOWN.files_s(SIZE, n_workers, 10) == pytest.approx(seconds)


def test_what_the_disk_takes_binds_all_workers():
    assert KNOWN.files_s(SIZE, 2, 10, disk=1) == 10 + 120
    assert KNOWN.files_s(SIZE, 12, 10, disk=1) == 10 + 120
    assert KNOWN.files_s(Size(90, 30, read=30), 12, 10, disk=1) == 10 + 150
    assert KNOWN.files_s(SIZE, 1, 10, disk=1) == 220  # a single one is slower than the disk


def test_a_commit_is_one_process():
    assert KNOWN.committed_s(SIZE, 1) == 10 + 60
    assert KNOWN.committed_s(SIZE, 4) == 10 + 15
    assert KNOWN.committed_s(SIZE, 4, disk=2) == 10 + 60


def test_a_batch_has_whole_jobs_and_passes():
    known = BatchCoefficients(start_s=10, pass_s=5, job_s=2, later=0.1)
    assert known.batch_s(1, 1) == 17
    assert known.batch_s(MOST, 1) == 10 + 5 + 2 * MOST
    assert known.batch_s(MOST + 1, 1) == pytest.approx(10 + 5 + 0.5 + 2 * (MOST + 1))
    assert known.batch_s(MOST + 1, 2) == 10 + 5 + 2 * math.ceil((MOST + 1) / 2)


def test_another_model():
    """The elements of the published models, less those of their norms."""
    small = Llama(2048, 8192, 512, 128256, 16)
    assert small.numel == 1_235_814_400 - 33 * 2048
    assert LARGE.numel == 70_553_706_496 - 161 * 8192
    known = BatchCoefficients(10, 5, 2, 0.1).scaled(small, LARGE, KIND)
    assert known.start_s == 10 and known.pass_s == pytest.approx(5 * LARGE.numel / small.numel)
    changed = {small: 16 * 2048 * (2048 + 512), LARGE: 80 * 8192 * (8192 + 1024)}
    assert known.job_s == pytest.approx(2 * changed[LARGE] / changed[small])
    assert known.later == pytest.approx(changed[LARGE] / LARGE.numel)


def test_what_only_others_can_have_made_is_said():
    assert doubtful(1, 2, 0.1) == "" and "not idle" in doubtful(1, -0.1, 2)
