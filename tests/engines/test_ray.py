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
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil
import pytest
from build import adapter_tensors, checkpoint_tensors, write_adapter, write_checkpoint
from scenario import content

import lorafuse
from lorafuse.batching import spread
from lorafuse.engines import ray_engine
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
        common = {"max_shard_size": SHARD, "engine": "ray", "address": cluster.address}
        options = common | {"on_event": events.append} | options
        lorafuse.convert(inputs[0], inputs[1] / "a", tmp_path / "out", **options)
        return events

    return run


def of_kind(events, kind):
    return [event for event in events if event["event"] == kind]


def processes(*titles):
    """The processes of the cluster that Ray calls so. They are this process's own descendants."""
    found = []
    for process in psutil.Process().children(recursive=True):
        with suppress(psutil.Error):
            if (process.cmdline() or [""])[0].startswith(titles):
                found.append(process)
    return found


def at_work():
    """The processes of the cluster's workers that are at work on a task of lorafuse."""
    return processes("ray::part", "ray::jobs", "ray::_run")


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
        again = [event for event in of_kind(events, "warning") if " begins again on " in event["message"]]
        assert len(again) == workers["n_again"]
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


@pytest.fixture
def interrupted(cluster, inputs, tmp_path):
    """interrupted(command, jobs, out, number) → the events of a call that gets a signal when a file is
    complete"""

    def run(command, adapter, out, number):
        words = [sys.executable, "-m", "lorafuse", command, "--json", "-q", inputs[0], adapter, out]
        words += ["--max-shard-size", SHARD, "--engine", "ray", "--address", cluster.address]
        events = []
        with subprocess.Popen(words, stdout=subprocess.PIPE, text=True, env=ENVIRONMENT) as process:
            for line in process.stdout:
                events.append(json.loads(line))
                if events[-1]["event"] == "shard" and len(of_kind(events, "shard")) == 1:
                    process.send_signal(number)
        assert process.returncode == (-9 if number == signal.SIGKILL else 128 + number)
        until = time.monotonic() + 30  # Ray ends what the call had begun
        while at_work() and time.monotonic() < until:
            time.sleep(0.05)
        assert not at_work()
        return events

    return run


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM], ids=lambda number: number.name)
def test_the_caller_is_ended_and_calls_again(interrupted, inputs, convert, clean, tmp_path, number):
    events = interrupted("convert", inputs[1] / "a", tmp_path / "out", number)
    assert not (tmp_path / "out").exists()
    if number != signal.SIGKILL:
        assert events[-1]["event"] == "error" and events[-1]["exit_code"] == 128 + number
        assert "the same command goes on from what is finished" in events[-1]["message"]
    events = convert()
    assert content(tmp_path / "out") == clean["a"]
    assert len(of_kind(events, "shard")) < len(of_kind(events, "plan")[0]["shards"])


def test_a_batch_is_interrupted_and_called_again(interrupted, inputs, batch, clean, tmp_path):
    events = interrupted("batch", inputs[1], tmp_path / "root", signal.SIGINT)
    assert events[-1]["event"] == "error" and events[-1]["exit_code"] == 130
    states, _ = batch()
    assert {*states} == {*NAMES} and {*states.values()} <= {"done", "skipped"}
    assert {name: content(tmp_path / "root" / name) for name in NAMES} == clean


def test_what_passes_messages_on_is_lost(convert, clean, tmp_path):
    """The process of Ray that workers tell how far they are; the head of the cluster may as well be."""

    over = threading.Event()

    def lose():
        while not over.wait(0.05):
            for process in processes("ray::_QueueActor") if at_work() else ():
                with suppress(psutil.Error):
                    process.kill()

    thread = threading.Thread(target=lose)
    thread.start()
    with pytest.raises(StorageError, match=r"is gone: .* The same command goes on"):
        convert()
    over.set()
    thread.join()
    convert()
    assert content(tmp_path / "out") == clean["a"]


def test_all_cores_are_taken(cluster, convert, clean, tmp_path, monkeypatch):
    """The user is told, and the call goes on when others end. Ray is the caller's here, and stays."""
    import ray

    n_cpus = 2 * len(os.sched_getaffinity(0))
    monkeypatch.setattr(ray_engine, "SILENCE_S", 0.5)
    ray.init(cluster.address, logging_level="ERROR", log_to_driver=False)
    try:
        others = ray.remote(lambda: time.sleep(600)).options(num_cpus=n_cpus).remote()
        while ray.available_resources().get("CPU"):
            time.sleep(0.05)
        said = []

        def on_event(event):
            if "No worker has said anything" in event.get("message", ""):
                said.append(event["message"])
                ray.cancel(others, force=True)

        convert(on_event=on_event)
        assert ray.is_initialized()
    finally:
        ray.shutdown()
    assert content(tmp_path / "out") == clean["a"]
    assert re.search(r"CPUs of this Ray 0 are free, and .* lorafuse waits", said[0])


def test_what_is_wrong_with_the_inputs_ends_it(cluster, inputs, tmp_path):
    """With the error of a single run; nothing is left."""
    shutil.copytree(inputs[1] / "a", tmp_path / "bad")
    config = tmp_path / "bad" / "adapter_config.json"
    config.write_text(config.read_text().replace('"LORA"', '"PREFIX_TUNING"'))
    with pytest.raises(AdapterError, match="PREFIX_TUNING"):
        lorafuse.convert(inputs[0], tmp_path / "bad", tmp_path / "out", engine="ray", address=cluster.address)
    assert [path.name for path in tmp_path.iterdir()] == ["bad"]


def test_a_machine_that_is_too_small(convert):
    with pytest.raises(UsageError, match=r"part 0 of .* needs 20\.4 GB of memory"):
        convert(memory_limit="20GB")


def test_a_machine_that_does_not_see_the_inputs(convert, tmp_path, monkeypatch):
    """As the error of the call, which is made by a thread that cannot have signals."""
    monkeypatch.setattr(spread, "seen_here", lambda names: (str(tmp_path / "nowhere"),))
    with ThreadPoolExecutor() as executor, pytest.raises(StorageError, match=r"does not see .*nowhere"):
        executor.submit(convert).result()
    assert list(tmp_path.iterdir()) == []


def test_a_cluster_without_cores(convert, tmp_path, monkeypatch):
    import ray

    head = {"Alive": True, "Resources": {"memory": 8e9, "node:here": 1.0}}
    monkeypatch.setattr(ray, "nodes", lambda: [head])
    with pytest.raises(UsageError, match="no machine of this Ray offers CPUs"):
        convert()
    assert not ray.is_initialized() and list(tmp_path.iterdir()) == []


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


def test_another_version_of_ray_on_the_cluster(cluster, inputs, tmp_path):
    """Ray itself compares them."""
    program = "import ray; ray.__version__ = '2.9.0'; from lorafuse.cli import main; main()"
    words = [sys.executable, "-c", program, "convert", inputs[0], inputs[1] / "a", tmp_path / "out"]
    words += ["--engine", "ray", "--address", cluster.address]
    ran = subprocess.run(words, env=ENVIRONMENT, capture_output=True, text=True, check=False)
    assert (ran.returncode, ran.stdout) == (2, "") and "Traceback" not in ran.stderr
    assert "Ray here and on the cluster differ" in ran.stderr and "2.9.0" in ran.stderr


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
