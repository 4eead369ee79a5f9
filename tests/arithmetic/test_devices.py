"""Which device computes: what is named, and what `auto` takes."""

import json
from dataclasses import replace

import pytest
import torch
from late_device import LateDevice
from models import LINEARS

import lorafuse
from bench.speed import gpu
from bench.support import measure
from lorafuse.arithmetic import devices
from lorafuse.arithmetic.devices import Choice, Work, choose_device
from lorafuse.errors import UsageError
from lorafuse.files.checkpoint import Checkpoint
from lorafuse.files.local_folder import LocalFolder
from lorafuse.planning.work import work_of_batch

# 8 G parameters in NF4, to 16 bits, with an update of rank 16.
LARGE = Work(8 * 10**9, 16 * 8 * 10**9, 15259, 4 * 10**9, 16 * 10**9, 2)


@pytest.fixture
def with_gpu(monkeypatch):
    """As if there were one."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)


@pytest.fixture
def kernel(monkeypatch):
    """kernel(there): whether the compiled kernel is there."""
    return lambda there: monkeypatch.setattr(devices.kernel, "chosen", lambda: there or None)


def seconds(work, of_element):
    """On a CPU and on a GPU, by hand."""
    cpu = (work.n_elements * of_element + work.n_products * 0.022) * 1e-9 / work.n_workers
    copies = max(work.in_nbytes, work.out_nbytes) / 12e9
    return cpu, 3.0 + max(copies, work.n_tiles * 0.6e-3, work.n_elements * 0.15e-9)


@pytest.mark.parametrize(
    ("there", "changes", "expected"),
    [
        (True, {}, "cpu"),  # 5.4 s against 12.2 s
        (True, {"n_products": 256 * 8 * 10**9}, "cuda"),  # rank 256: 26.5 s
        (True, {"n_products": 256 * 8 * 10**9, "n_workers": 16}, "cpu"),
        (False, {"n_workers": 1}, "cuda"),  # 22.8 s
        (False, {}, "cpu"),  # 11.4 s
        (False, {"n_workers": 1, "out_nbytes": 400 * 10**9}, "cpu"),  # 36 s of copies
    ],
)
def test_auto_takes_what_is_faster(there, changes, expected, with_gpu, kernel):
    kernel(there)
    work = replace(LARGE, **changes)
    cpu, cuda = seconds(work, 1.0 if there else 2.5)
    assert (work.on_cpu_s, work.on_gpu_s) == pytest.approx((cpu, cuda))
    chosen = choose_device("auto", lambda: work)
    assert chosen.name == expected == ("cuda" if cuda < cpu else "cpu")
    assert chosen.said == (
        f"{expected} (about {cpu:.1f} s of computing here, {cuda:.1f} s on the GPU with its start)"
    )


def test_small_work_stays_on_the_cpu(with_gpu, kernel):
    """Whatever else is true of it: the start of CUDA takes longer."""
    for there in (True, False):
        kernel(there)
        assert choose_device("auto", lambda: Work(10**9, 10**9, 1908, 10**9, 2 * 10**9, 1)).name == "cpu"


def test_what_does_not_fit_stays_on_the_cpu(with_gpu, kernel):
    kernel(False)
    work = replace(LARGE, n_workers=1, fits=False)
    chosen = choose_device("auto", lambda: work)
    assert chosen == Choice("cpu", "a weight holds more than lorafuse takes of a GPU's memory")


def test_what_is_named_is_taken(with_gpu):
    """And nothing is counted; a device that is not there is refused."""
    assert [choose_device(name, pytest.fail).said for name in ("cpu", "cuda", "cuda:0")] == [
        "cpu", "cuda", "cuda:0",
    ]  # fmt: skip
    with pytest.raises(UsageError, match=r"^device cuda:1: torch sees 1 CUDA devices here\.$"):
        choose_device("cuda:1", pytest.fail)


@pytest.mark.parametrize(("name", "is_"), [("cpu", "cpu"), ("cuda", "cuda:0"), ("cuda:1", "cuda:1")])
def test_a_device_has_its_number(name, is_):
    assert str(Choice(name).device) == is_


def test_without_a_gpu_nothing_is_counted(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert choose_device("auto", pytest.fail).said == "cpu"


def test_a_run_says_which_device(base, adapter, tmp_path, monkeypatch):
    """The dry run and the receipt; the work is that of the plan: all weights that are not copied."""
    inputs, seen, choose = (base("nf4_dq"), adapter("nf4_dq", target_modules=LINEARS)), [], choose_device
    monkeypatch.setattr(
        "lorafuse.pipeline.choose_device", lambda name, of: seen.append(of()) or choose(name, of)
    )
    assert lorafuse.convert(*inputs, tmp_path / "out", dry_run=True)["device"] == "cpu"
    receipt = lorafuse.convert(*inputs, tmp_path / "out", device="cpu")
    assert receipt["tool"]["device"] == "cpu"
    made = [entry for entry in receipt["tensors"].values() if entry["action"] in ("merged", "decoded")]
    numel = [torch.Size(entry["shape"]).numel() for entry in made]
    assert seen[0].n_elements == sum(numel) and seen[0].out_nbytes == 2 * sum(numel) and seen[0].fits
    assert seen[0].n_products == sum(4 * n for n, entry in zip(numel, made, strict=True) if "rank" in entry)
    LateDevice().installed(monkeypatch)
    assert lorafuse.convert(*inputs, tmp_path / "there")["tool"]["device"] == "cuda"


def test_the_work_of_a_batch(base):
    """About: bytes count twice, as codes of 4 bits."""
    ckpt = Checkpoint(LocalFolder(base("nf4_dq")))
    work = work_of_batch(ckpt, 3, 2)
    stored = [info.spec for info in ckpt.tensors.values()]
    ckpt.close()
    assert work.in_nbytes == sum(spec.nbytes for spec in stored)
    assert work.n_elements == 3 * sum(spec.numel * (2 if spec.dtype == "U8" else 1) for spec in stored)


def test_the_benchmark_without_a_gpu(monkeypatch, tmp_path):
    monkeypatch.setattr(measure, "python", lambda *_: measure.Usage(1, 1, 1, "null\n", ""))
    assert gpu.report(tmp_path, 4) == gpu.NOT_RUN


def test_the_benchmark_with_a_gpu(monkeypatch, tmp_path):
    """Its tables, of figures that are made up."""
    figures = dict.fromkeys(gpu.UNITS, 20.0)
    costs = json.dumps({"name": "A card", "measured": figures, "assumed": figures})
    monkeypatch.setattr(measure, "python", lambda *_: measure.Usage(1, 1, 1, costs, ""))
    monkeypatch.setattr(measure, "inputs", lambda *_: (tmp_path / "base", tmp_path / "adapter"))
    monkeypatch.setattr(gpu, "roomy", lambda work, base: work)
    monkeypatch.setattr(
        gpu, "merge", lambda *given: (4.0, 6.0, 3.0) if given[-1] == "cpu" else (2.0, 5.0, 3.0)
    )
    report = gpu.report(tmp_path, 4)
    assert "| merge | 4.00, 4.00, 4.00 | 2.00, 2.00, 2.00 | **0.50** |" in report
    assert "| A card | measured | assumed |" in report
    assert "| both, in the merge, GB/s | 1.50 |  |" in report
