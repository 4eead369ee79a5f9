"""What the driver and a worker of an engine do by themselves, without Ray: versions, paths, signals, what
many workers say as the events of one run, and machines that a task does not fit."""

import os
import pickle
import re
import signal
import socket
import sys
import threading
from contextlib import nullcontext
from functools import partial

import pytest

from lorafuse.batching.spread_jobs import Heard
from lorafuse.engines import ray_cluster
from lorafuse.engines.engine import Task
from lorafuse.engines.ray_engine import _refuse_unfit
from lorafuse.engines.ray_worker import carry_out, versions
from lorafuse.engines.relay import Relay, Teller
from lorafuse.engines.signals import signals_wait
from lorafuse.errors import StorageError, UsageError


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    """A worker goes to the folder of its task; the tests after it start where they did."""
    monkeypatch.chdir(tmp_path)


def unforeseen(on_event):
    return 1 / 0


def without_memory(on_event):
    raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 64 bytes")


def fine(on_event):
    on_event({"event": "progress", "nbytes": 3})
    on_event({"event": "progress", "nbytes": 4})
    return "made"


def task(path, call=fine, **options):
    return Task("part 0 of 1", call, 1, 1, on_gpu=False, folder=str(path), **options)


def ended(task, expected=None):
    told = []
    return carry_out(pickle.dumps(task), expected or versions(), told.append), [
        e for some in told for e in some
    ]


# ---- a worker


def test_workers_of_another_version(tmp_path):
    """Nothing is called; the caller raises the error that comes back."""
    here = versions()
    made, told = ended(task(tmp_path, unforeseen), here | {"torch": "1.0", "Python": "3.0"})
    assert isinstance(made.error, UsageError) and not told
    assert re.search(r"has torch \S+, not 1\.0; Python \S+, not 3\.0: install the same", str(made.error))
    with pytest.raises(ZeroDivisionError):
        ended(task(tmp_path, unforeseen))


def test_a_task_that_another_version_cannot_unpickle():
    """Versions are looked at before."""
    pickled = b"clorafuse.engines.engine\nNoSuchClass\n."
    with pytest.raises(AttributeError):
        carry_out(pickled, versions(), lambda told: None)
    made = carry_out(pickled, versions() | {"lorafuse": "99"}, lambda told: None)
    assert isinstance(made.error, UsageError) and "not 99: install the same" in str(made.error)


def test_a_machine_that_does_not_see_the_folder(tmp_path):
    made, _ = ended(task(tmp_path / "nowhere"))
    assert isinstance(made.error, StorageError) and "need the same file system" in str(made.error)


def test_a_machine_that_does_not_see_the_inputs(tmp_path):
    (tmp_path / "base").mkdir()
    made, told = ended(task(tmp_path, sees=("base", str(tmp_path / "adapter"))))
    assert isinstance(made.error, StorageError) and [event["event"] for _, event in told] == ["begun"]
    assert re.search(r"does not see \S+adapter\. All machines", str(made.error))
    assert ended(task(tmp_path, sees=("base",)))[0].result == "made"


def test_a_worker_without_memory(tmp_path):
    """What the system does not give is no bug."""
    made, _ = ended(task(tmp_path, without_memory))
    assert isinstance(made.error, StorageError) and "out of memory" in str(made.error)


# ---- what workers say


def test_progress_is_summed_up(tmp_path):
    made, told = ended(task(tmp_path))
    assert (made.result, made.error) == ("made", None)
    assert [event.get("nbytes") for _, event in told] == [None, 7]


def test_a_task_that_begins_again_is_said():
    events, told = [], []
    relay = Relay(events.append)
    for _ in range(3):
        Teller("part 1 of 2", told.extend)
    Teller("part 0 of 2", told.extend)
    relay.pass_on(told)
    messages = [event["message"] for event in events]
    assert relay.n_again == 2 and len({*messages}) == 2  # `warned_once` passes both on
    assert all(
        re.match(r"part 1 of 2 begins again on .*\(try [23]\): its process", text) for text in messages
    )


def test_what_is_said_of_a_job_is_said_once():
    """The task of these jobs begins again: it finds what is done, and fails where it failed."""
    said = []
    heard = Heard(said.append)
    first = [
        {"event": "job", "job": "a", "state": "done", "nbytes": 5},
        {"event": "job", "job": "b", "state": "failed"},
        {"event": "job", "job": "c", "state": "skipped"},
    ]
    for event in first:
        heard(event)
    for job, state in (("a", "skipped"), ("b", "failed"), ("c", "skipped")):
        heard({"event": "job", "job": job, "state": state})
    assert said == first and (heard.done, heard.nbytes) == ({"a"}, 5)


# ---- signals


@pytest.fixture
def called():
    """The signals whose handler was called; the handlers of before come back."""
    came, before = [], {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    for number in before:
        signal.signal(number, lambda number, frame: came.append(number))
    yield came
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_waits(called, number):
    with signals_wait():
        os.kill(os.getpid(), number)
        assert not called
    assert called == [number]
    os.kill(os.getpid(), number)  # the handlers are in their place again
    assert called == [number] * 2


def test_a_second_signal_does_not_wait(called):
    with signals_wait():
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGTERM)
        assert called == [signal.SIGTERM]


def test_the_handler_of_a_signal_raises_what_ends_the_run(called):
    """Whatever the code inside makes of it, as Ray makes a SystemError."""

    class StopError(Exception):
        pass

    def stop(number, frame):
        raise StopError

    signal.signal(signal.SIGTERM, stop)
    with pytest.raises(StopError), signals_wait():
        os.kill(os.getpid(), signal.SIGTERM)
        raise SystemError("returned a result with an exception set")


def test_handlers_that_code_inside_installs_do_not_stay(called):
    with signals_wait():
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    os.kill(os.getpid(), signal.SIGTERM)
    assert called == [signal.SIGTERM]


def test_a_signal_while_ray_starts(called):
    """Ray's own handler ends the process by SystemExit: that of the caller is called after it."""

    class Ray:
        class exceptions:  # noqa: N801 (as Ray has it)
            RayError = RuntimeError

        class _private:  # noqa: N801
            class worker:  # noqa: N801
                pass

        @staticmethod
        def init(*args, **options):
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            sys.exit(1)

    ray_cluster.connect(Ray, "local")
    assert called == [signal.SIGTERM]


def test_other_threads_leave_signals_alone(called):
    inside = []

    def run():
        with signals_wait():
            inside.append(signal.getsignal(signal.SIGTERM))

    before = signal.getsignal(signal.SIGTERM)
    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert inside == [before]


# ---- machines and addresses


GB = 1e9


@pytest.mark.parametrize(
    ("machines", "on_gpu", "words"),
    [
        ([], False, "needs 4 CPUs, and the largest machine offers Ray 0"),
        ([{"CPU": 2.0, "memory": 9 * GB}], False, "needs 4 CPUs, and the largest machine offers Ray 2"),
        ([{"CPU": 4.0, "memory": 9 * GB}], True, "needs a GPU"),
        ([{"CPU": 2.0, "memory": 9 * GB}, {"CPU": 4.0, "memory": 1 * GB}], False, "offers Ray 1.00 GB"),
        ([{"CPU": 2.0, "memory": 9 * GB, "GPU": 1.0}, {"CPU": 4.0, "memory": 9 * GB}], True, "needs a GPU"),
        ([{"CPU": 4.0, "memory": 9 * GB, "GPU": 1.0}, {"CPU": 8.0}], True, None),
    ],
)
def test_a_task_that_no_single_machine_has_room_for(machines, on_gpu, words):
    wanted = Task("part 0 of 1", fine, 4, int(2 * GB), on_gpu, "/")
    with pytest.raises(UsageError, match=words) if words else nullcontext():
        _refuse_unfit(wanted, machines)


@pytest.fixture
def listening():
    """listening(answer) → the address of a server that answers so, or says nothing"""
    with socket.create_server(("127.0.0.1", 0)) as server:

        def serve(answer):
            connection, _ = server.accept()
            with connection:
                connection.recv(100)
                if answer is None:
                    connection.recv(1)  # until the other side goes
                else:
                    connection.sendall(answer)

        def start(answer):
            threading.Thread(target=partial(serve, answer), daemon=True).start()
            return f"127.0.0.1:{server.getsockname()[1]}"

        yield start


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        (b"HTTP/1.1 400 Bad Request\r\n\r\n", "whoever answers there is not Ray"),
        (b"", "whoever answers there is not Ray"),
        (None, "cannot be reached there: timed out"),
    ],
)
def test_who_answers_is_not_ray(listening, monkeypatch, answer, words):
    monkeypatch.setattr(ray_cluster, "ANSWER_S", 0.2)
    with pytest.raises(StorageError, match=words):
        ray_cluster._refuse_silent(listening(answer))
    ray_cluster._refuse_silent(listening(bytes([0, 0, 0, 4, 0, 0, 0, 0, 0])))
