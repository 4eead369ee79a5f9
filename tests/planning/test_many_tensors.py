"""A mixture of experts has a quarter of a million stored tensors: what is done with them is counted in calls
and bytes, which are the same on every machine. bench/speed/planning.py has the seconds."""

import gc
import platform
import sys
import threading
import tracemalloc
from contextlib import closing

import pytest

import lorafuse
from bench.support import mixture
from lorafuse.adapters import open_adapter
from lorafuse.files.checkpoint import Checkpoint
from lorafuse.files.local_folder import LocalFolder
from lorafuse.files.uncollected import uncollected
from lorafuse.naming.resolve import Resolver
from lorafuse.outdir import sidecars
from lorafuse.planning.combine import WeightedAdapter
from lorafuse.planning.make_plan import make_plan
from lorafuse.settings import Settings

SIZES = 600, 1200, 2400
KINDS = "attention", "experts"
LINEAR = 2.15  # 2.07 at most, since a table grows in jumps


@pytest.fixture(scope="module")
def mixtures(tmp_path_factory):
    """Folders with a base of so many tensors each, and its adapters."""
    root = tmp_path_factory.mktemp("mixtures")
    mixture.write(root / "warm", SIZES[0])
    for size in SIZES:
        mixture.write(root / str(size), size)
    return root


def planned(folder, kind):
    with (
        closing(Checkpoint(LocalFolder(folder / "base"))) as base,
        closing(open_adapter(LocalFolder(folder / kind))) as adapter,
    ):
        return make_plan(base, [WeightedAdapter(adapter, 1.0)], Settings(), each_format=True)


def n_calls(work):
    """Calls of functions, Python's and C's, in all threads that are started meanwhile."""
    n = 0

    def count(frame, event, arg):
        nonlocal n
        n += event in ("call", "c_call")

    threading.setprofile(count)
    sys.setprofile(count)
    try:
        work()
    finally:
        sys.setprofile(None)
        threading.setprofile(None)
    return n


def peak_nbytes(work):
    gc.collect()
    tracemalloc.start()
    try:
        work()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def growth(measure, work, root):
    """How much more a doubling adds than the one before it: 2 where cost is linear, 4 where it is
    quadratic, whatever is spent once."""
    work(root / "warm")
    small, middle, large = (measure(lambda size=size: work(root / str(size))) for size in SIZES)
    return (large - middle) / (middle - small)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("measure", [n_calls, peak_nbytes])
def test_a_plan_is_linear(mixtures, measure, kind):
    assert growth(measure, lambda folder: planned(folder, kind), mixtures) < LINEAR


def test_a_merge_and_its_receipt_are_linear(mixtures, tmp_path):
    def merge(folder):
        out = tmp_path / folder.name
        lorafuse.convert(folder / "base", folder / "experts", out, overwrite=True, max_shard_size="100KB")

    assert growth(n_calls, merge, mixtures) < LINEAR
    for work in (lorafuse.verify, lorafuse.inspect, lorafuse.report):
        assert growth(n_calls, lambda folder, work=work: work(tmp_path / folder.name), mixtures) < LINEAR


def test_no_garbage_is_looked_for_while_tables_are_made(mixtures):
    searches = []

    def count(phase, info):
        searches.append(phase)

    gc.callbacks.append(count)
    try:
        planned(mixtures / str(SIZES[-1]), "experts")
    finally:
        gc.callbacks.remove(count)
    assert len(searches) < 20  # after each 700 new objects there would be hundreds


def test_what_the_receipt_needs_goes_back_too(mixtures, tmp_path, monkeypatch):
    """The index is made within such a time; what it needed is given back before the receipt is made."""
    searched, index_of = [], sidecars.index_of
    monkeypatch.setattr(sidecars, "index_of", lambda plan: searched.append(gc.isenabled()) or index_of(plan))
    folder = mixtures / str(SIZES[0])
    lorafuse.convert(folder / "base", folder / "experts", tmp_path / "out", max_shard_size="100KB")
    assert searched == [False]


@pytest.mark.parametrize("on", [True, False])
def test_the_search_for_garbage_is_then_as_it_was(on):
    before = gc.isenabled()
    (gc.enable if on else gc.disable)()
    try:
        with uncollected():
            with uncollected():
                assert not gc.isenabled()
            assert not gc.isenabled()
        assert gc.isenabled() is on
    finally:
        (gc.enable if before else gc.disable)()


def test_what_is_needed_meanwhile_goes_back_to_the_system():
    """glibc keeps what is freed below a piece that stays: here all of 64 MB but for a byte."""
    if platform.libc_ver()[0] != "glibc":
        pytest.skip("another C library")
    before = resident_nbytes()
    with uncollected():
        pieces = [bytearray(b"x" * 4000) for _ in range(16_000)]
        last, most = pieces[-1], resident_nbytes()
        del pieces
    assert most - before > 60e6
    assert last and resident_nbytes() - before < 10e6


def resident_nbytes():
    with open("/proc/self/statm", encoding="ascii") as f:
        return int(f.read().split()[1]) * 4096


def test_names_are_resolved_without_all_that_they_may_stand_for():
    """The weights of experts have four other names each, with 2 kB in all; those that are looked for are the
    names of a few stacks."""
    kinds = "gate_proj", "up_proj", "down_proj"
    experts = [f"model.layers.0.mlp.experts.{number}" for number in range(800)]
    names = {f"{expert}.{kind}.weight" for expert in experts for kind in kinds}
    shapes = dict.fromkeys(names, (4, 4))
    config = {"model_type": "deepseek_v3", "architectures": ["DeepseekV3ForCausalLM"]}

    def resolve():
        Resolver(shapes, config).resolve(dict.fromkeys(names, "w"), "adapter", lambda message: None)

    resolve()
    assert peak_nbytes(resolve) / len(names) < 1500
