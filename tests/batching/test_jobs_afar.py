"""Files of jobs in an object store: what is in them, what may be wrong, and shares of them by machines that
know nothing of each other."""

from pathlib import Path

import pytest
from click.testing import CliRunner

import lorafuse
from lorafuse import cli
from lorafuse.batching import jobs_afar
from lorafuse.outdir.kinds import kind_of

FIXTURES = Path(__file__).parents[2] / "fixtures"
BASE, ADAPTER = FIXTURES / "llama-nf4", FIXTURES / "llama-adapter"
NAMES = ["a", "b", "c"]
JOBS, ROOT = "s3://models/jobs.jsonl", "s3://models/merged"
WEIGHTS = "model.safetensors"


@pytest.fixture
def store(s3):
    """Three adapters, and a file of jobs beside them."""
    for name in NAMES:
        for path in ADAPTER.iterdir():
            s3.client.put_object(Bucket="models", Key=f"{name}/{path.name}", Body=path.read_bytes())
    list_jobs(s3, "".join(f'{{"adapter": "{name}"}}\n' for name in NAMES).encode())
    return s3


def list_jobs(store, text):
    store.client.put_object(Bucket="models", Key="jobs.jsonl", Body=text)


def batch(jobs, *options):
    ran = CliRunner().invoke(cli.lorafuse, ["batch", str(BASE), jobs, ROOT, *options, "--quiet"])
    return ran.exit_code, ran.output


def test_shares_of_a_file_of_jobs(store, tmp_path):
    """Each job by one of two machines; a call that comes again finds what they made."""
    shares = [("--index", "0", "--of", "2"), ("--index", "1", "--of", "2")]
    listed = [batch(JOBS, *share) for share in (*shares, shares[0])]
    both = (0, f"{ROOT}/a\n{ROOT}/c\n")
    assert listed == [both, (0, f"{ROOT}/b\n"), both]
    lorafuse.convert(BASE, ADAPTER, tmp_path / "alone")
    made = {name: store.files(f"{ROOT}/{name}")[WEIGHTS] for name in NAMES}
    assert made == dict.fromkeys(NAMES, (tmp_path / "alone" / WEIGHTS).read_bytes())


def test_two_machines_that_take_the_same_job(store):
    """That which comes second leaves it to the other, and does the rest."""
    with kind_of(ROOT).open_out_dir(f"{ROOT}/b", "0" * 64):
        code, output = batch(JOBS)
        assert code == 9 and "1 of 3 jobs failed; the others are complete." in output
        assert f"b: failed with exit code 6: {ROOT}/b: another run is writing it; wait for it" in output
    code, output = batch(JOBS)
    assert (code, sorted(output.split())) == (0, [f"{ROOT}/{name}" for name in NAMES])


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (b"", "jobs.jsonl: has no line; expected"),
        (b"\n \n", "jobs.jsonl: has no line; expected"),
        (b'{"adapter": "a"}\n{"adapter": 3}\n', "jobs.jsonl, line 2: the adapter is 3"),
        (b'{"adapter": "a"}\n{"adapter": "b", "name": "a"}\n', "line 2: the name a is also that of line 1"),
        (b'{"adapter": "a"}\n' * 100, "jobs.jsonl: has 1.70 KB; a file of jobs may have 1.00 KB at most"),
    ],
)
def test_files_of_jobs_that_are_refused(store, monkeypatch, text, words):
    """An empty one, too: a batch of nothing is no success, but what an earlier step of somebody lost."""
    monkeypatch.setattr(jobs_afar, "MOST_NBYTES", 1000)
    list_jobs(store, text)
    code, output = batch(JOBS)
    assert code == 2 and words in output
    assert not store.keys("models", "merged")


@pytest.mark.parametrize(
    ("jobs", "code", "words"),
    [
        ("s3://models/others.jsonl", 2, "others.jsonl: no such file or directory"),
        ("s3://elsewhere/jobs.jsonl", 5, "no such bucket"),
    ],
)
def test_files_of_jobs_that_are_not_there(store, jobs, code, words):
    found, output = batch(jobs, "--index", "0", "--of", "2")
    assert found == code and words in output
