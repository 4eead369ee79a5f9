"""Ray as it is, on this machine: a cluster for all tests of this file, whose processes and machines are
killed while they work. What comes out is byte for byte what one process makes."""

import itertools
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil
import pytest
from build import adapter_tensors, checkpoint_tensors, write_adapter, write_checkpoint
from scenario import content

import lorafuse
from lorafuse.engines.engine import Task
from lorafuse.engines.ray_worker import carry_out, versions
from lorafuse.errors import AdapterError, StorageError, UsageError

os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
ENVIRONMENT = os.environ | {"PYTHONPATH": str(Path(lorafuse.__file__).parents[1])}
EXAMPLE = Path(__file__).parents[2] / "docs/examples/ray.sh"
SHARD = "300KB"
NAMES = ["a", "b", "c"]


@pytest.fixture(scope="module")
def cluster():
    """A machine that has two cores for the plans of this one, each of which wants all cores."""
    from ray.cluster_utils import Cluster

    cores = len(os.sched_getaffinity(0))
    made = Cluster(
        initialize_head=True,
        head_node_args={"num_cpus": 2 * cores, "memory": 8_000_000_000, "include_dashboard": False,
                        "object_store_memory": 80_000_000},
    )  # fmt: skip
    yield made
    made.shutdown()


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    """A model of a dozen files, and three adapters for it."""
    path = tmp_path_factory.mktemp("inputs")
    tensors = checkpoint_tensors(hidden=128, n_layers=12)
    for i, name in enumerate(NAMES):
        write_adapter(path / "jobs" / name, {k: t * (i + 1) for k, t in adapter_tensors(tensors).items()})
    return write_checkpoint(path / "ckpt", tensors, n_shards=3), path / "jobs"


@pytest.fixture(scope="module")
def clean(inputs, tmp_path_factory):
    """What one process makes of each adapter."""
    path = tmp_path_factory.mktemp("clean")
    for name in NAMES:
        lorafuse.convert(inputs[0], inputs[1] / name, path / name, max_shard_size=SHARD)
    return {name: content(path / name) for name in NAMES}


@pytest.fixture
def convert(cluster, inputs, tmp_path):
    """convert(**options) → the events of a merge into tmp_path/out by the cluster"""

    def run(**options):
        events = []
        options = {"max_shard_size": SHARD, "engine": "ray", "address": cluster.address} | options
        lorafuse.convert(inputs[0], inputs[1] / "a", tmp_path / "out", on_event=events.append, **options)
        return events

    return run


def of_kind(events, kind):
    return [event for event in events if event["event"] == kind]


def at_work():
    """The processes of the cluster's workers that are at work on a task of lorafuse. They are this process's
    own descendants."""
    found = []
    for process in psutil.Process().children(recursive=True):
        with suppress(psutil.Error):
            if (process.cmdline() or [""])[0].startswith(("ray::part", "ray::jobs", "ray::_run")):
                found.append(process)
    return found


@contextmanager
def killing(most, every_s, seed=0):
    """Kill a process that is at work, from time to time. Yields the list of what was killed."""
    rng, killed, over = random.Random(seed), [], threading.Event()

    def run():
        while not over.wait(rng.uniform(0, 2 * every_s)) and len(killed) < most:
            if victims := at_work():
                victim = rng.choice(victims)
                with suppress(psutil.Error):
                    victim.kill()
                    killed.append(victim.pid)

    thread = threading.Thread(target=run)
    thread.start()
    try:
        yield killed
    finally:
        over.set()
        thread.join()


# ---- one result


def test_a_result_of_many_workers(convert, clean, tmp_path):
    events = convert()
    assert content(tmp_path / "out") == clean["a"]
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    (plan,), (workers,), (done,) = (of_kind(events, kind) for kind in ("plan", "workers", "done"))
    assert sum(event["nbytes"] for event in of_kind(events, "progress")) == plan["nbytes"]
    files = [event["file"] for event in of_kind(events, "shard")]
    assert sorted(files) == [shard["file"] for shard in plan["shards"]] and len(files) > 10
    assert sum(worker["nbytes"] for worker in workers["workers"]) == plan["nbytes"]
    assert sum(worker["n_tasks"] for worker in workers["workers"]) == len(files)
    assert workers["n_again"] == 0 and done["out_dir"] == str(tmp_path / "out")
    assert not of_kind(events, "resumed") and len({e["message"] for e in of_kind(events, "warning")}) == len(
        of_kind(events, "warning")
    )


@pytest.mark.soak
def test_workers_are_killed(convert, clean, tmp_path, share_s):
    until = time.monotonic() + share_s
    for seed in itertools.count():
        with killing(most=5, every_s=0.4, seed=seed) as killed:
            events = convert()
        (workers,), (plan,) = of_kind(events, "workers"), of_kind(events, "plan")
        assert content(tmp_path / "out") == clean["a"] and killed
        assert [path.name for path in tmp_path.iterdir()] == ["out"]
        assert workers["n_again"] <= len(killed)
        assert sum(event["nbytes"] for event in of_kind(events, "progress")) == plan["nbytes"]
        made = [event["file"] for event in of_kind(events, "shard")]
        assert len(made) - len({*made}) <= len(killed)
        shutil.rmtree(tmp_path / "out")
        if time.monotonic() >= until:
            break


def test_a_machine_is_lost(cluster, convert, clean, tmp_path):
    cores = len(os.sched_getaffinity(0))
    lost = cluster.add_node(num_cpus=2 * cores, memory=4_000_000_000, object_store_memory=80_000_000)
    cluster.wait_for_nodes()
    here, seen = tmp_path / "out", []

    def lose():
        while not any(path.name.startswith(".out.lorafuse.") for path in tmp_path.glob(".out*")):
            time.sleep(0.05)
        time.sleep(0.5)
        seen.append(len(at_work()))
        cluster.remove_node(lost, allow_graceful=False)

    thread = threading.Thread(target=lose)
    thread.start()
    events = convert()
    thread.join()
    assert content(here) == clean["a"] and seen
    assert len(of_kind(events, "workers")) == 1


def test_the_caller_is_killed_and_calls_again(cluster, inputs, convert, clean, tmp_path):
    command = [sys.executable, "-m", "lorafuse", "convert", "--json", "-q", str(inputs[0])]
    command += [str(inputs[1] / "a"), str(tmp_path / "out"), "--max-shard-size", SHARD]
    command += ["--engine", "ray", "--address", cluster.address]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=ENVIRONMENT) as process:
        for line in process.stdout:
            if json.loads(line)["event"] == "shard":
                break
        process.send_signal(signal.SIGKILL)
    assert not (tmp_path / "out").exists()
    events = convert()
    assert content(tmp_path / "out") == clean["a"]
    assert len(of_kind(events, "shard")) < len(of_kind(events, "plan")[0]["shards"])


def test_what_is_wrong_with_the_inputs_ends_it(cluster, inputs, tmp_path):
    """With the error of a single run; nothing is left."""
    shutil.copytree(inputs[1] / "a", tmp_path / "bad")
    config = tmp_path / "bad" / "adapter_config.json"
    config.write_text(config.read_text().replace('"LORA"', '"PREFIX_TUNING"'))
    with pytest.raises(AdapterError, match="PREFIX_TUNING"):
        lorafuse.convert(inputs[0], tmp_path / "bad", tmp_path / "out", engine="ray", address=cluster.address)
    assert [path.name for path in tmp_path.iterdir()] == ["bad"]


def test_workers_of_another_version(tmp_path):
    """Nothing is called; the caller raises the error that comes back."""
    task = Task("part 0 of 1", lambda on_event: 1 / 0, 1, 1, False, str(tmp_path))
    here, told = versions(), []
    ended = carry_out(task, here | {"torch": "1.0", "Python": "3.0"}, told.append)
    assert isinstance(ended.error, UsageError)
    assert re.search(r"has torch \S+, not 1\.0; Python \S+, not 3\.0: install the same", str(ended.error))
    with pytest.raises(ZeroDivisionError):
        carry_out(task, here, told.append)


def test_a_machine_that_does_not_see_the_folder(tmp_path):
    task = Task("part 0 of 1", lambda on_event: None, 1, 1, False, str(tmp_path / "nowhere"))
    ended = carry_out(task, versions(), lambda told: None)
    assert isinstance(ended.error, StorageError) and "need the same file system" in str(ended.error)


def test_a_machine_that_is_too_small(convert):
    with pytest.raises(UsageError, match=r"part 0 of .* needs 20\.4 GB of memory"):
        convert(memory_limit="20GB")


# ---- a batch


@pytest.fixture
def batch(cluster, inputs, tmp_path):
    def run(**options):
        events = []
        options = {"max_shard_size": SHARD, "engine": "ray", "address": cluster.address} | options
        states = lorafuse.batch(*inputs, tmp_path / "root", on_event=events.append, **options)
        return {state.name: state.state for state in states}, events

    return run


def test_a_batch_whose_workers_are_killed(batch, clean, tmp_path):
    with killing(most=3, every_s=0.5, seed=1):
        states, events = batch()
    assert {*states} == {*NAMES} and {*states.values()} == {"done"}
    assert {name: content(tmp_path / "root" / name) for name in NAMES} == clean
    told = [event["job"] for event in of_kind(events, "job") if event["state"] == "done"]
    assert len(told) == len({*told})
    (total,) = of_kind(events, "total")
    assert total["states"] == {"done": len(NAMES)}
    n_bytes = sum(event["nbytes"] for event in of_kind(events, "progress"))
    assert n_bytes == sum(event["nbytes"] for event in of_kind(events, "pass"))


def test_the_job_of_the_examples(cluster, inputs, clean, tmp_path):
    """It finds the cluster as a job of Ray does."""
    program = tmp_path / "bin" / "lorafuse"
    program.parent.mkdir()
    program.write_text(f'#!/bin/sh\nexec {sys.executable} -m lorafuse "$@" --max-shard-size {SHARD}\n')
    program.chmod(0o755)
    path = f"{program.parent}:{os.environ['PATH']}"
    out = tmp_path / "out"
    command = ["bash", EXAMPLE, inputs[0], inputs[1] / "a", inputs[1], out]
    ran = subprocess.run(
        command, env=ENVIRONMENT | {"PATH": path, "RAY_ADDRESS": cluster.address}, capture_output=True,
        text=True, check=False,
    )  # fmt: skip
    assert (ran.returncode, ran.stderr) == (0, "")
    assert ran.stdout.splitlines()[0] == f"{out}/merged"
    assert sorted(ran.stdout.splitlines()[1:]) == [f"{out}/batch/{name}" for name in NAMES]
    assert content(out / "merged") == clean["a"]
    assert {name: content(out / "batch" / name) for name in NAMES} == clean


# ---- what can be wrong with Ray


def refused(error, inputs, tmp_path, **options):
    with pytest.raises(error) as caught:
        lorafuse.convert(inputs[0], inputs[1] / "a", tmp_path / "out", engine="ray", **options)
    assert list(tmp_path.iterdir()) == []
    return str(caught.value)


def test_nobody_answers(inputs, tmp_path):
    assert "127.0.0.1:1: Ray cannot be reached" in refused(
        StorageError, inputs, tmp_path, address="127.0.0.1:1"
    )


def test_the_client_of_ray(inputs, tmp_path):
    assert "Ray's client" in refused(UsageError, inputs, tmp_path, address="ray://127.0.0.1:10001")


def test_ray_is_not_installed(inputs, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    assert "pip install 'lorafuse[ray]'" in refused(UsageError, inputs, tmp_path)


def test_another_version_of_ray(inputs, tmp_path, monkeypatch):
    import ray

    def init(*args, **options):
        raise RuntimeError("Version mismatch: The cluster was started with:\n    Ray: 2.9.0")

    monkeypatch.setattr(ray, "init", init)
    assert "Ray: 2.9.0 Install the same versions" in refused(UsageError, inputs, tmp_path)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"engine": "dask"}, "expected one of local, ray"),
        ({"engine": "local", "address": "auto"}, "goes with engine ray"),
        ({"engine": "ray", "index": 0, "of": 2}, "of: not with engine ray"),
        ({"engine": "ray", "commit": True}, "commit=True: not with engine ray"),
        ({"engine": "ray", "stream": True}, "stream=True: not with engine ray"),
    ],
)
def test_options_that_contradict_each_other(options, words, inputs, tmp_path):
    with pytest.raises(UsageError, match=words):
        lorafuse.convert(inputs[0], inputs[1] / "a", tmp_path / "out", **options)
