"""What an engine makes must be seen by who called it: an engine whose workers write elsewhere."""

from contextlib import nullcontext
from pathlib import Path

import pytest

import lorafuse
from lorafuse.batching import spread, spread_jobs
from lorafuse.batching.jobs import JobState
from lorafuse.engines.engine import Tally
from lorafuse.errors import StorageError

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
