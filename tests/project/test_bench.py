"""bench/ beside what it measures: ratios and what is worse, sides in turns, the chart, the counts."""

import math
import os
import xml.etree.ElementTree as ET

import pytest

from bench import check
from bench.faithfulness.bars import SPAN
from bench.speed import cpu_profile, planning
from bench.speed.planning import n_stored
from bench.support import measure, ratios, sides
from bench.support.chart import Spread, bars
from bench.support.instructions import of_perf, of_valgrind
from bench.support.measure import table
from bench.support.mixture import write
from bench.support.ratios import Ratio, ratio, regressions

SVG = "{http://www.w3.org/2000/svg}"


def test_a_ratio_is_the_median_of_the_quotients():
    """Not the quotient of the medians: 2/1, 3/10 and 4/2 are measured in pairs."""
    assert ratio([2, 3, 4], [1, 10, 2]) == Ratio(2.0, 0.3, 2.0)
    assert str(ratio([2, 3, 4], [1, 10, 2])) == "2.00 (0.30 to 2.00)"
    with pytest.raises(ValueError):
        ratio([1, 2], [1])


def test_only_what_is_worse_by_more_than_a_quarter_is_a_regression():
    assert not regressions({"a": 0.8, "b": 4.0}, {"a": 1.0, "b": 0.1})
    assert regressions({"a": 0.8}, {"a": 1.001}) == {"a": "is 1.001, 1.25 times the committed 0.800"}


def test_a_ratio_that_one_side_lacks_is_told():
    wrong = regressions({"gone": 1.0}, {"new": 1.0})
    assert wrong == {"gone": "is not measured any more", "new": "is not in bench/ratios.json"}


def test_ratios_are_saved_sorted_and_read_again(tmp_path):
    ratios.save(tmp_path / "ratios.json", {"b": 1 / 3, "a": 2.0}, "a processor")
    assert ratios.load(tmp_path / "ratios.json") == {"a": 2.0, "b": 0.3333}
    assert (tmp_path / "ratios.json").read_text().index('"a"') < (tmp_path / "ratios.json").read_text().index(
        '"b"'
    )


@pytest.fixture
def measurements(tmp_path, monkeypatch):
    """Returns a function that takes the medians of one measurement after another, and runs `check`."""
    committed = tmp_path / "ratios.json"
    ratios.save(committed, {"a": 1.0, "b": 1.0}, "")
    monkeypatch.setattr(check, "COMMITTED", committed)

    def run(*measured):
        left = [{name: Ratio(value, value, value) for name, value in one.items()} for one in measured]
        monkeypatch.setattr(check, "measured", lambda work: left.pop(0))
        return check.check(tmp_path), len(left)

    return run


def test_a_check_that_passes_measures_once(measurements):
    assert measurements({"a": 1.2, "b": 0.5}, {}) == ({}, 1)


def test_noise_has_to_come_twice_in_the_same_ratio(measurements):
    assert measurements({"a": 1.3, "b": 1.0}, {"a": 1.0, "b": 1.3}) == ({}, 0)


def test_a_regression_fails(measurements):
    wrong, left = measurements({"a": 1.3, "b": 1.0}, {"a": 1.4, "b": 1.0})
    assert list(wrong) == ["a"] and "1.300" in wrong["a"] and left == 0


def test_a_check_without_ratios_says_what_writes_them(tmp_path, monkeypatch):
    monkeypatch.setattr(check, "COMMITTED", tmp_path / "ratios.json")
    monkeypatch.setattr("sys.argv", ["check", "--work", str(tmp_path)])
    with pytest.raises(SystemExit, match=r"bench\.run --docs"):
        check.main()


def test_each_round_begins_with_another_side():
    order = []
    runs = sides.in_turns({name: lambda name=name: order.append(name) or name for name in "abc"}, 4)
    assert "".join(order) == "abc" + "bca" + "cab" + "abc"
    assert runs == {name: [name] * 4 for name in "abc"}


def test_bars_are_as_long_as_their_medians():
    drawn = ET.fromstring(bars("A & B", {"s": [Spread("a", [1, 2, 4]), Spread("b", [8, 1, 3])]}))
    assert drawn.find(f"{SVG}title").text == "A & B"
    widths = [float(bar.get("width")) for bar in drawn.iter(f"{SVG}rect") if bar.get("x")]
    assert widths == pytest.approx([SPAN * 2 / 8, SPAN * 3 / 8], abs=0.1)
    lines = [(float(line.get("x1")), float(line.get("x2"))) for line in drawn.iter(f"{SVG}line")]
    lengths = [right - left for left, right in lines]
    assert lengths == pytest.approx([SPAN * 3 / 8, SPAN * 7 / 8], abs=0.2)
    texts = [text.text for text in drawn.iter(f"{SVG}text")]
    assert texts == ["A & B", "s", "a", "2", "b", "3"]


def test_a_table_has_words_on_the_left():
    assert table(("a", "b"), [("x", "1")]) == "| a | b |\n| --- | ---: |\n| x | 1 |"


PERF = "# started on a day\n\n123456,,instructions:u,98765,100.00,,\n"
NO_PERF = "# started on a day\n\n<not supported>,,instructions:u,0,100.00,,\n"
VALGRIND = "==7== Cachegrind\n==7== \n==7== I   refs:      1,234,567\n"


def test_instructions_are_read_from_what_counts_them():
    assert of_perf(PERF) == 123456 and of_perf(NO_PERF) is None
    assert of_valgrind(VALGRIND) == 1234567 and of_valgrind("==7== killed") is None


def test_samples_are_counted_by_what_ran():
    listing = """# Overhead
 620       ;libcrypto.so.3
 600       ;[kernel.kallsyms]
 15        ;[vdso]
 321       ;libtorch_cpu.so
 90        ;_kernel.abi3.so
 48        ;libtorch_python.so
 7         ;_hashlib.cpython-311-x86_64-linux-gnu.so
"""
    assert cpu_profile.by_part(listing) == {
        "SHA-256": 620,
        "operating system": 615,
        "torch": 321,
        "compiled kernel": 90,
        "Python and the rest": 55,
    }


def test_the_mixture_has_as_many_tensors_as_asked_for(tmp_path):
    write(tmp_path, 600)
    assert n_stored(tmp_path / "base") == 601  # six of each weight, and the embedding
    assert n_stored(tmp_path / "attention") + n_stored(tmp_path / "experts") == 2 * 100


def test_what_reads_the_headers_of_a_mixture_is_a_process_of_its_own(tmp_path, monkeypatch):
    """The bench's own would grow with them, and end: a child's peak includes its parent's."""
    write(tmp_path, 600)
    stored = n_stored(tmp_path / "base") + n_stored(tmp_path / "experts")
    monkeypatch.setattr(planning, "RUNS", 1)
    monkeypatch.setattr(planning, "n_stored", None)
    monkeypatch.setattr(measure, "LARGEST_PARENT", math.inf)  # this one's peak does not count
    n, row = planning.planned(tmp_path, "experts")
    assert n == stored and row[:2] == ["experts", str(stored)]


@pytest.mark.parametrize(
    ("flags", "said"),
    [("sse2 avx2 avx512f", ", AVX-512"), ("sse2 avx2", ", AVX2"), ("sse2", ""), (None, "")],
)
def test_a_processor_is_told_by_its_vectors_too(flags, said, monkeypatch):
    """Providers give several processors one name."""
    lines = ["model name\t: AMD EPYC", *([f"flags\t\t: {flags}"] if flags else []), ""]
    monkeypatch.setattr(measure, "_lines", lambda path: lines * 2)
    assert measure.processor() == f"AMD EPYC, {os.cpu_count()} cores{said}"
