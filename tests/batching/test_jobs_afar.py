"""Files of jobs in an object store: what is in them, what may be wrong, and shares of them."""

import shutil
from pathlib import Path

import pytest
from click.testing import CliRunner
from scenario import content

import lorafuse
from lorafuse import cli
from lorafuse.batching import jobs_afar
from lorafuse.batching.jobs_afar import listed_jobs
from lorafuse.errors import UsageError

FIXTURES = Path(__file__).parents[2] / "fixtures"
NAMES = ["a", "b", "c"]


@pytest.fixture
def store(tmp_path):
    """A store in a directory: three adapters, and a file of jobs beside them."""
    for name in NAMES:
        shutil.copytree(FIXTURES / "llama-adapter", tmp_path / "store" / name)
    (tmp_path / "store/jobs.jsonl").write_text("".join(f'{{"adapter": "{name}"}}\n' for name in NAMES))
    return f"file://{tmp_path}/store"


def batch(*words):
    ran = CliRunner().invoke(cli.lorafuse, ["batch", str(FIXTURES / "llama-nf4"), *words, "--quiet"])
    return ran.exit_code, ran.output


def test_shares_of_a_file_of_jobs(store, tmp_path):
    """Each job by one of two machines, whose results lie in the store, too; the second call finds them."""
    root, at = f"{store}/merged", tmp_path / "store/merged"
    shares = [("--index", "0", "--of", "2"), ("--index", "1", "--of", "2")]
    listed = [batch(f"{store}/jobs.jsonl", root, *share) for share in shares]
    assert listed == [(0, f"{at}/a\n{at}/c\n"), (0, f"{at}/b\n")]
    lorafuse.convert(FIXTURES / "llama-nf4", FIXTURES / "llama-adapter", tmp_path / "alone")
    made = {name: content(at / name) for name in NAMES}
    assert made == dict.fromkeys(NAMES, content(tmp_path / "alone"))
    assert batch(f"{store}/jobs.jsonl", root, *shares[0]) == listed[0]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (b"", r"jobs\.jsonl: has no line; expected"),
        (b"\n \n", r"jobs\.jsonl: has no line; expected"),
        (b'{"adapter": "a"}\n{"adapter": 3}\n', r"jobs\.jsonl, line 2: the adapter is 3"),
        (b'{"adapter": "a"}\n{"adapter": "b", "name": "a"}\n', r"line 2: the name a is also that of line 1"),
        (b'{"adapter": "a"}\n' * 100, r"jobs\.jsonl: has 1\.70 KB; a file of jobs may have 1\.00 KB at most"),
    ],
)
def test_files_of_jobs_that_are_refused(store, tmp_path, monkeypatch, text, words):
    """An empty one, too: no job was lost by an earlier step of whoever made it."""
    monkeypatch.setattr(jobs_afar, "MOST_NBYTES", 1000)
    (tmp_path / "store/jobs.jsonl").write_bytes(text)
    with pytest.raises(UsageError, match=words):
        listed_jobs(f"{store}/jobs.jsonl")
    code, output = batch(f"{store}/jobs.jsonl", f"{store}/merged")
    assert code == 2 and "Error: " in output and not (tmp_path / "store/merged").exists()


def test_a_file_of_jobs_that_is_not_there(store):
    code, output = batch(f"{store}/others.jsonl", f"{store}/merged")
    assert code == 2 and "others.jsonl: no such file or directory" in output
