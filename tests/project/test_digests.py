"""bench/faithfulness/digests.py says which file of which merge differs, and compares what decides bytes."""

import json

import pytest

from bench.faithfulness.digests import compare, joined
from bench.faithfulness.logged_lorafuse import RECEIPT, results_of


@pytest.fixture
def merge(tmp_path, monkeypatch):
    """Returns a function that stands for one run of `convert` and returns its log entry."""
    where = tmp_path / "merge.01"
    where.mkdir()
    monkeypatch.chdir(where)
    for name in ("ckpt", "adapter", "out"):
        (where / name).mkdir()
        (where / name / "model.safetensors").write_bytes(name.encode())

    def run(*options, weights=b"weights", status=0, **receipt):
        (where / "out" / "model.safetensors").write_bytes(weights)
        (where / "out" / RECEIPT).write_text(json.dumps({"schema": 1, "plan_id": "0", **receipt}))
        return results_of("convert", ["ckpt", "adapter", "out", *options], status)

    return run


def test_equal_results_compare_equal(merge):
    lines, equal = compare(
        merge(timing={"wall_s": 1.0}, peak_rss=1), merge(timing={"wall_s": 2.0}, peak_rss=2)
    )
    assert equal
    assert lines == [
        "1 results compared (0 of them refusals): 1 equal",
        "0 different; plan_id differs in 0",
        "only the record has 0: ",
        "only this run has 0: ",
    ]


def test_a_flipped_byte_is_named(merge):
    lines, equal = compare(merge(), merge(weights=b"weighTs"))
    assert not equal
    assert lines[0].endswith(" of merge.01: model.safetensors")


def test_the_receipt_and_its_plan_id_are_named_apart(merge):
    lines, equal = compare(merge(), merge(plan_id="1"))
    assert not equal
    assert lines[0].endswith(" of merge.01: plan_id")
    assert lines[2] == "1 different; plan_id differs in 1"
    assert compare(merge(), merge(base_semantics="stored"))[0][0].endswith(f" of merge.01: {RECEIPT}")


def test_a_file_on_one_side_only_is_named(merge, tmp_path):
    recorded = merge()
    (tmp_path / "merge.01" / "out" / "more.json").write_text("{}")
    assert compare(recorded, merge())[0][0].endswith(" of merge.01: more.json")


def test_a_merge_that_is_now_refused_is_a_difference(merge):
    lines, equal = compare(merge(), merge(status=4))
    assert not equal
    assert "refused" in lines[0]


def test_a_digest_that_was_seen_once_only_is_a_difference(merge):
    recorded = joined([merge(), merge(weights=b"weighTs")])
    assert compare(recorded, joined([merge(weights=b"weighTs"), merge()]))[1]
    assert not compare(recorded, merge())[1]


def test_the_key_holds_what_decides_bytes(merge, tmp_path):
    """Options in either spelling and the content of the inputs; not how much memory there is."""
    (key,) = merge("--dtype", "float16")
    assert list(merge("--dtype=float16", "--memory-limit", "90MB", "-q")) == [key]
    assert list(merge("--dtype", "float32")) != [key]
    assert list(merge("--dtype", "float16", "--adapter", "adapter:0.5")) != [key]
    (tmp_path / "merge.01" / "adapter" / "model.safetensors").write_bytes(b"Adapter")
    assert list(merge("--dtype", "float16")) != [key]


def test_results_of_a_batch_are_told_apart(merge, tmp_path):
    merge()
    where = tmp_path / "merge.01"
    (where / "root").mkdir()
    (where / "out").rename(where / "root" / "one")
    (where / "jobs.jsonl").write_text('{"adapter": "adapter", "name": "one"}\n\n')
    (result,) = results_of("batch", ["ckpt", "jobs.jsonl", "root"], 9).values()
    assert result["check"] == ["merge.01"]
    assert set(result) == {"check", "plan_id", "model.safetensors", RECEIPT}


def test_nothing_in_common_is_not_equal(merge):
    lines, equal = compare(merge(), merge("--dtype", "float16"))
    assert not equal
    assert lines[-2:] == ["only the record has 1: merge.01", "only this run has 1: merge.01"]


def test_what_was_interrupted_and_what_only_printed_is_left_out(merge):
    assert not merge(status=143)
    assert not results_of("verify", ["out"], 0)
