"""bench.run writes a page of all benchmarks or of some; with --quick each does the least, and ratios stay."""

import sys
from pathlib import Path

import pytest

from bench import check, run
from bench.support import measure
from bench.support.ratios import Ratio


@pytest.fixture
def told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many layers each benchmark was told to take: none of them runs."""
    layers: list[int] = []

    def report(work: Path, n_layers: int) -> str:
        layers.append(n_layers)
        (work / "benchmarks.svg").write_text("<svg/>")
        return "its table"

    for name, module in run.BENCHMARKS.items():
        monkeypatch.setattr(module, "report", report)
        for constant in run.QUICK[name]:
            monkeypatch.setattr(module, constant, getattr(module, constant))  # as it was, in the end
    for constant in ("LAYERS", "TENSORS"):
        monkeypatch.setattr(check, constant, getattr(check, constant))
    monkeypatch.setattr(measure, "watched", lambda report, *given: report(*given))
    monkeypatch.setattr(check, "COMMITTED", tmp_path / "committed.json")
    monkeypatch.setattr(check, "measured", lambda work, rounds: {"a": Ratio(rounds, rounds, rounds)})
    return layers


def written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, *options: str) -> str:
    """The page that it writes."""
    docs = tmp_path / "new" / "page.md"
    monkeypatch.setattr(sys, "argv", ["run", "--work", str(tmp_path), "--docs", str(docs), *options])
    run.main()
    assert docs.with_suffix(".svg").read_text() == "<svg/>"
    return docs.read_text()


def test_the_page_has_every_benchmark_and_the_picture(told, tmp_path, monkeypatch) -> None:
    page = written(tmp_path, monkeypatch)
    assert told == [run.LAYERS] * len(run.BENCHMARKS) and page.count("its table") == len(told)
    assert page.index("measured on") < page.index("](page.svg)") < page.index("## The whole merge")
    assert all(f"## {run.TITLES[name]}\n" in page for name in run.BENCHMARKS)
    assert str(run.CHECKED_ROUNDS) in (tmp_path / "committed.json").read_text()


def test_in_a_hurry_everything_is_small_and_the_ratios_stay(told, tmp_path, monkeypatch) -> None:
    written(tmp_path, monkeypatch, "--quick")
    assert set(told) == {run.QUICK_LAYERS} and run.QUICK.keys() == run.BENCHMARKS.keys()
    assert run.BENCHMARKS["peers"].ROUNDS == 1
    assert not (tmp_path / "committed.json").exists() and (tmp_path / "ratios.json").exists()


def test_a_constant_that_is_gone_is_told(told, monkeypatch) -> None:
    monkeypatch.setitem(run.QUICK, "peers", {"GONE": 1})
    with pytest.raises(AttributeError, match="peers has no GONE"):
        run.hurry()


def test_a_page_of_some_says_which_and_the_ratios_stay(told, tmp_path, monkeypatch) -> None:
    page = written(tmp_path, monkeypatch, "--only", "start", "peers")
    command = f"bench.run --work build/bench --only start peers --docs {tmp_path / 'new' / 'page.md'}`"
    assert command in page and "](page.svg)" in page and page.count("its table") == 2
    assert page.index("## The start\n") < page.index("## The whole merge\n")
    assert not (tmp_path / "committed.json").exists()


def test_a_page_without_the_peers_has_no_picture(told, tmp_path, monkeypatch) -> None:
    """One that an earlier run has left would be of other figures."""
    (tmp_path / "benchmarks.svg").write_text("<svg>old</svg>")
    docs = tmp_path / "page.md"
    monkeypatch.setattr(sys, "argv", ["run", "--work", str(tmp_path), "--only", "start", "--docs", str(docs)])
    run.main()
    assert "svg" not in docs.read_text() and not docs.with_suffix(".svg").exists()
