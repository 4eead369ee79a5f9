"""The parts of one result, made by Ray's workers in an object store: Ray as it is, on this machine."""

from scenario import SHARD, five_shards, uninterrupted, without_times

import lorafuse
from lorafuse.files.names import RECEIPT


def test_a_result_of_many_workers(s3, tmp_path):
    """Each has its own process, its own part and its own lock."""
    inputs, events = five_shards(tmp_path), []
    clean = uninterrupted(inputs, tmp_path / "clean")
    out = "s3://models/merged"
    lorafuse.convert(*inputs, out, max_shard_size=SHARD, engine="ray", on_event=events.append)
    (workers,) = [event for event in events if event["event"] == "workers"]
    assert sum(worker["n_tasks"] for worker in workers["workers"]) == 5
    locks = {path.partition("?")[0] for method, path in s3.log if method == "PUT" and path.endswith("/lock")}
    assert {f"/models/.merged.lorafuse/part-{index}of5/lock" for index in range(5)} < locks
    found = without_times(s3.files(out))
    assert found.keys() == clean.keys()
    assert all(found[name] == data for name, data in clean.items() if name != RECEIPT)
    assert not [key for key in s3.keys("models") if ".lorafuse" in key]
