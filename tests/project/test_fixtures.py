"""The files that the demo and the tests merge are the ones that fixtures/make.py wrote."""

import hashlib
from pathlib import Path

FIXTURES = Path(__file__).resolve().parents[2] / "fixtures"


def listed() -> dict[str, str]:
    """{file: sha256} of fixtures/DIGESTS, which is in the format of sha256sum."""
    lines = (FIXTURES / "DIGESTS").read_text().splitlines()
    return {name: digest for digest, name in (line.split("  ", 1) for line in lines)}


def test_every_fixture_has_the_bytes_that_digests_lists():
    """A fixture that changed, by a filter of git or by a hand, is found here and not in another test."""
    found = {name: hashlib.sha256((FIXTURES / name).read_bytes()).hexdigest() for name in listed()}
    assert found == listed()


def test_digests_lists_every_file_of_every_fixture():
    """No file joins a fixture unlisted; prose is free to change."""
    files = {
        p.relative_to(FIXTURES).as_posix() for d in FIXTURES.iterdir() if d.is_dir() for p in d.rglob("*")
    }
    assert {name for name in files if not name.endswith(".md") and "__pycache__" not in name} == set(listed())
