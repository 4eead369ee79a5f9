"""What an engine makes must be seen by who called it: an engine whose workers write elsewhere."""

from contextlib import nullcontext
from pathlib import Path

import pytest
from click.testing import CliRunner

import lorafuse
from lorafuse import cli
from lorafuse.batching import spread, spread_jobs
from lorafuse.batching.jobs import JobState
from lorafuse.engines.engine import Tally
from lorafuse.errors import OutDirError, StorageError

FIXTURES = Path(__file__).parents[2] / "fixtures"
BASE, ADAPTER = FIXTURES / "llama-nf4", FIXTURES / "llama-adapter"


class Elsewhere:
    """An engine whose workers say that they have done what they were asked for."""

    def __init__(self, result=None):
        self.tally, self.tasks, self.result = Tally(), [], result

    def cores(self, wanted):
        return wanted

    def slots(self, n_cpus):
        return 1

    def submit(self, task):
        self.tasks.append(task)

    def results(self):
        return ((task, self.result) for task in self.tasks)


def test_parts_that_are_made_on_another_file_system(tmp_path, monkeypatch):
    engine = Elsewhere()
    monkeypatch.setattr(spread, "engine_named", lambda *_: nullcontext(engine))
    with pytest.raises(StorageError, match=r"part 0 of \d+ of .*out: a worker has made it, and this machine"):
        lorafuse.convert(BASE, ADAPTER, tmp_path / "new/out", max_shard_size="50KB", engine="ray")
    assert len(engine.tasks) > 1 and not list(tmp_path.rglob("*"))
    assert {*engine.tasks[0].sees} == {str(BASE), str(ADAPTER), str(tmp_path)}


def test_results_that_are_made_on_another_file_system(tmp_path, monkeypatch):
    engine = Elsewhere([JobState("llama-adapter", "done", tmp_path / "root/llama-adapter")])
    monkeypatch.setattr(spread_jobs, "engine_named", lambda *_: nullcontext(engine))
    jobs = tmp_path / "jobs.jsonl"
    jobs.write_text(f'{{"adapter": "{ADAPTER}"}}\n')
    with pytest.raises(StorageError, match=r"root/llama-adapter: a worker has made it, and this machine"):
        lorafuse.batch(BASE, jobs, tmp_path / "root", engine="ray")
    assert {*engine.tasks[0].sees} == {str(BASE), str(ADAPTER), str(tmp_path)}


def list_jobs(path, n):
    path.write_text("".join(f'{{"adapter": "{ADAPTER}", "name": "job-{i}"}}\n' for i in range(n)))
    return path


def test_a_task_has_its_own_jobs_alone(tmp_path, monkeypatch):
    """Ten thousand jobs are looked at once, not by each worker."""
    engine = Elsewhere()
    monkeypatch.setattr(spread_jobs, "engine_named", lambda *_: nullcontext(engine))
    monkeypatch.setattr(engine, "slots", lambda n_cpus: 3)
    monkeypatch.setattr(engine, "results", list)
    with pytest.raises(KeyError, match="job-0"):  # nobody has done it
        lorafuse.batch(BASE, list_jobs(tmp_path / "jobs.jsonl", 9), tmp_path / "root", engine="ray")
    names = [[[job.name for job in jobs] for jobs in task.call.args[1:]] for task in engine.tasks]
    assert names == [[[f"job-{i}" for i in range(first, first + 3)]] * 2 for first in (0, 3, 6)]


def test_a_result_in_the_place_of_an_input(tmp_path, monkeypatch):
    """Before an engine is asked for."""
    monkeypatch.setattr(spread_jobs, "engine_named", lambda *_: 1 / 0)
    (tmp_path / "job-8").symlink_to(ADAPTER)
    with pytest.raises(OutDirError, match="would take the place of the input"):
        lorafuse.batch(BASE, list_jobs(tmp_path / "jobs.jsonl", 9), tmp_path, engine="ray")


def test_the_number_of_a_pod_is_not_for_an_engine(tmp_path):
    """Which divides the jobs itself: nothing is asked of Kubernetes."""
    words = ["batch", str(BASE), str(list_jobs(tmp_path / "jobs.jsonl", 1)), str(tmp_path / "root")]
    words += ["--engine", "ray", "--address", "127.0.0.1:1"]
    ran = CliRunner().invoke(cli.lorafuse, words, env={"JOB_COMPLETION_INDEX": "0"})
    assert ran.exit_code == 5 and "127.0.0.1:1: Ray cannot be reached" in ran.output
