"""docs/tests.md lists all cases, and every test that it names is there."""

import re
from pathlib import Path

import pytest

TESTS = {path.name: path for path in Path(__file__).parents[1].rglob("test_*.py")}
DOC = (Path(__file__).parents[2] / "docs" / "tests.md").read_text(encoding="utf-8")
ROWS = re.findall(r"^\| (\d+) \| (.+?) \| (.+?) \| (.+?) \|$", DOC, re.MULTILINE)
N_CASES = 52


def test_all_cases_are_listed() -> None:
    assert [int(number) for number, *_ in ROWS] == list(range(1, N_CASES + 1))


@pytest.mark.parametrize(("number", "tests"), [(number, tests) for number, _, _, tests in ROWS])
def test_the_tests_of_a_case_are_there(number: str, tests: str) -> None:
    """By file and name, and with its number among the inputs that are refused, where the list says so."""
    named = re.findall(r"`(test_\w+\.py)::(test_\w+)`", tests)
    assert named
    for file, name in named:
        assert re.search(rf"^def {name}\(", TESTS[file].read_text(encoding="utf-8"), re.MULTILINE), (
            f"{file}::{name}"
        )
    if ("test_faults_inputs.py", "test_refused") in named:
        assert f"\n    ({number}, " in TESTS["test_faults_inputs.py"].read_text(encoding="utf-8")
