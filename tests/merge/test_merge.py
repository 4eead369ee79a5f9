"""The loop: the same bytes for any number of threads, the measures of the receipt, and errors that end the
run."""

import os
import shutil
from dataclasses import replace

import pytest
import torch
from models import LINEARS
from oracle import decode, read_adapter, read_tensors
from safetensors.torch import load_file, save_file

import lorafuse
from lorafuse.errors import AdapterError, CheckpointError, ResultError, StorageError
from lorafuse.files.safetensors_file import Shard
from lorafuse.merge import workers as merge
from lorafuse.planning import memory


def dense(path, **tensors):
    """A checkpoint of those weights: `a` is called a.weight."""
    path.mkdir()
    save_file({f"{name}.weight": t for name, t in tensors.items()}, path / "model.safetensors")
    (path / "config.json").write_text(
        '{"model_type": "llama", "architectures": ["LlamaModel"], "dtype": "float32"}'
    )
    return path


def lora(path, r, **factors):
    """An adapter with lora_A and lora_B of each module."""
    path.mkdir()
    tensors = {
        f"base_model.model.{m}.lora_{x}.weight": t
        for m, pair in factors.items()
        for x, t in zip("AB", pair, strict=True)
    }
    save_file(tensors, path / "adapter_model.safetensors")
    (path / "adapter_config.json").write_text(f'{{"peft_type": "LORA", "r": {r}, "lora_alpha": {r}}}')
    return path


@pytest.fixture
def many_tiles(tmp_path):
    """A base and an adapter whose weights have tens of tiles, several of them in the making at once."""
    torch.manual_seed(0)
    shapes = {"a": (700, 1100), "b": (1100, 900), "c": (5, 300_000)}
    base = dense(tmp_path / "base", **{name: torch.randn(shape).bfloat16() for name, shape in shapes.items()})
    pairs = {
        name: (torch.randn(8, cols) * 0.01, torch.randn(rows, 8) * 0.01)
        for name, (rows, cols) in shapes.items()
    }
    return base, lora(tmp_path / "lora", 8, **pairs)


@pytest.mark.parametrize("n_threads", [1, 2, 7])
def test_the_bytes_do_not_depend_on_threads(n_threads, many_tiles, tmp_path, monkeypatch):
    lorafuse.convert(*many_tiles, tmp_path / "here", memory_limit="1GB")
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(n_threads)))
    lorafuse.convert(*many_tiles, tmp_path / "there", memory_limit="1GB")
    assert (tmp_path / "here/model.safetensors").read_bytes() == (
        tmp_path / "there/model.safetensors"
    ).read_bytes()


def test_the_receipt_is_the_same_from_run_to_run(many_tiles, tmp_path):
    """Everything but timing, peak_rss and tool, sums over tiles included."""
    receipts = [lorafuse.convert(*many_tiles, tmp_path / name) for name in ("one", "two")]
    for receipt in receipts:
        del receipt["timing"], receipt["peak_rss"], receipt["tool"]
    assert receipts[0] == receipts[1]


@pytest.mark.parametrize("kind", ["nf4_dq", "int8", "fp16"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_the_measures_are_those_of_the_files(kind, dtype, base, adapter, tmp_path):
    """delta_norm, delta_rel, kept, noise and changed, recomputed in float64 from what was read and
    written."""
    path = adapter(kind, target_modules=LINEARS)
    receipt = lorafuse.convert(base(kind), path, tmp_path / "out", dtype=dtype)
    factors, before, after = read_adapter(path), decode(base(kind)), read_tensors(tmp_path / "out")
    n_merged = 0
    for name, entry in receipt["tensors"].items():
        if entry["action"] == "merged":
            a, b = (
                factors[f"base_model.model.{name.removesuffix('.weight')}.lora_{x}.weight"].double()
                for x in "AB"
            )
            w, s, delta = before[name][0], after[name].double(), 2 * b @ a
            expected = {
                "delta_norm": delta.norm(),
                "delta_rel": delta.norm() / w.norm(),
                "kept": ((s - w) * delta).sum() / delta.square().sum(),
                "noise": (s - w - delta).norm() / delta.norm(),
                "changed": (s != w).double().mean(),
            }
            assert {k: entry[k] for k in expected} == pytest.approx(
                {k: v.item() for k, v in expected.items()}, rel=1e-4
            )
            n_merged += 1
    assert n_merged == 14


def test_an_update_that_bfloat16_cannot_hold_is_reported_as_lost(tmp_path):
    """kept is 0 and nothing changed: what the measures are for."""
    base = dense(tmp_path / "base", a=torch.ones(64, 64).bfloat16())
    path = lora(tmp_path / "lora", 1, a=(torch.full((1, 64), 1e-2), torch.full((64, 1), 1e-2)))
    entry = lorafuse.convert(base, path, tmp_path / "out")["tensors"]["a.weight"]
    assert (
        entry["kept"] == pytest.approx(0, abs=1e-4)
        and entry["changed"] == 0
        and entry["noise"] == pytest.approx(1)
    )


BIG = torch.full((64, 64), 6e4)
ONES = (torch.ones(1, 64), torch.ones(64, 1) * 1e4)
HUGE = (torch.full((1, 64), 1e30), torch.full((64, 1), 1e30))


@pytest.mark.parametrize(
    ("weight", "factors", "dtype"),
    [(BIG, ONES, "float16"), (BIG.bfloat16(), HUGE, "auto"), (BIG * 1e30, (ONES[0], ONES[1] * 0), "float16")],
    ids=["the sum overflows", "the update overflows", "the base overflows"],
)
def test_values_that_the_base_did_not_have_end_the_run(weight, factors, dtype, tmp_path):
    """Exit 8 naming the tensor; nothing is left under any name."""
    base, path = dense(tmp_path / "base", a=weight), lora(tmp_path / "lora", 1, a=factors)
    before = sorted(tmp_path.iterdir())
    with pytest.raises(
        ResultError,
        match=r"^a\.weight: 4096 of 4096 values are not finite in (b?float16), though the base's are",
    ):
        lorafuse.convert(base, path, tmp_path / "out", dtype=dtype)
    assert sorted(tmp_path.iterdir()) == before


def test_a_cast_that_overflows_ends_the_run(tmp_path):
    """Also where the adapter does nothing."""
    base = dense(tmp_path / "base", a=torch.ones(64, 64), b=BIG * 2)
    path = lora(tmp_path / "lora", 1, a=ONES)
    with pytest.raises(ResultError, match=r"^b\.weight: 4096 of 4096 values"):
        lorafuse.convert(base, path, tmp_path / "out", dtype="float16")


@pytest.mark.parametrize("dtype", ["auto", "bfloat16"])
def test_non_finite_values_of_the_base_pass_only_if_they_may(dtype, tmp_path):
    """All of a weight are counted, whether it is merged or cast; when nothing is done to it, it is copied as
    it is. The receipt has no measures for them, and stays valid JSON."""
    weight = torch.randn(900, 1000)  # two tiles
    weight[3, 4], weight[700, 4], weight[899, 0] = torch.inf, torch.nan, -torch.inf
    ones = (torch.ones(1, 1000), torch.ones(900, 1))
    good, path = torch.randn(900, 1000), lora(tmp_path / "lora", 1, a=ones)
    for i, tensors in enumerate(({"a": weight, "b": good}, {"a": good, "b": weight})):
        base, out = dense(tmp_path / f"base{i}", **tensors), tmp_path / f"out{i}"
        name = f"{'ab'[i]}.weight"
        if not (name == "b.weight" and dtype == "auto"):
            before = sorted(tmp_path.iterdir())
            with pytest.raises(CheckpointError) as caught:
                lorafuse.convert(base, path, out, dtype=dtype)
            assert str(caught.value) == (
                f"{name}: 3 of 900000 values are not finite in the base; is the checkpoint damaged? "
                "allow_nonfinite=True keeps them."
            )
            assert sorted(tmp_path.iterdir()) == before
        receipt = lorafuse.convert(base, path, out, dtype=dtype, allow_nonfinite=True)
        found = read_tensors(out)[name]
        assert found[3, 4] == torch.inf and found[700, 4].isnan() and found[899, 0] == -torch.inf
        assert name == "b.weight" or receipt["tensors"][name]["kept"] is None


def test_a_broken_scale_of_a_quantized_base_ends_the_run(base, adapter, tmp_path):
    """Although the weight is only decoded, to the dtype that it was quantized from."""
    ckpt = shutil.copytree(base("nf4"), tmp_path / "ckpt")
    shard, key = next(
        (file, key)
        for file in sorted(ckpt.glob("*.safetensors"))
        for key in load_file(file)
        if key.endswith("up_proj.weight.absmax")
    )
    tensors = load_file(shard)
    tensors[key][5] = torch.nan
    save_file(tensors, shard, {"format": "pt"})
    path = adapter("nf4", target_modules=["q_proj"])
    weight = key.removesuffix(".absmax")
    with pytest.raises(CheckpointError, match=rf"^{weight}: 64 of 6144 values are not finite in the base"):
        lorafuse.convert(ckpt, path, tmp_path / "out")


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("file", ["adapter_model.safetensors", "adapter_model.bin"])
def test_an_adapter_that_is_not_finite_is_refused(value, file, tmp_path):
    """Before anything is written, naming the tensor and how many of its values."""
    base = dense(tmp_path / "base", a=torch.ones(64, 64))
    path = lora(tmp_path / "lora", 1, a=(torch.ones(1, 64), torch.ones(64, 1)))
    tensors = load_file(path / "adapter_model.safetensors")
    (path / "adapter_model.safetensors").unlink()
    key = "base_model.model.a.lora_B.weight"
    tensors[key][7] = tensors[key][9] = value
    (torch.save if file.endswith(".bin") else save_file)(tensors, path / file)
    before = sorted(tmp_path.iterdir())
    with pytest.raises(AdapterError) as caught:
        lorafuse.convert(base, path, tmp_path / "out")
    assert str(caught.value) == (
        f"{path / file}: 2 of 64 values of {key} are not finite; training diverged, or the file is damaged."
    )
    assert sorted(tmp_path.iterdir()) == before


def test_large_finite_values_of_an_adapter_are_not_taken_for_infinity(tmp_path):
    """Their sum overflows, they do not."""
    base = dense(tmp_path / "base", a=torch.ones(64, 64))
    path = lora(tmp_path / "lora", 1, a=(torch.full((1, 64), 6e4).half(), torch.full((64, 1), 1e-4)))
    assert lorafuse.convert(base, path, tmp_path / "out")["tensors"]["a.weight"]["kept"] == pytest.approx(
        1, abs=0.01
    )


def test_an_error_in_a_worker_ends_the_run(many_tiles, tmp_path, monkeypatch):
    """And leaves neither OUT_DIR nor staging."""
    read_into, reads = Shard.read_into, []

    def fail_late(self, info, start, buffer):
        reads.append(start)
        if len(reads) > 12:
            raise StorageError("the disk is gone")
        read_into(self, info, start, buffer)

    monkeypatch.setattr(Shard, "read_into", fail_late)
    before = sorted(tmp_path.iterdir())
    with pytest.raises(StorageError, match="the disk is gone"):
        lorafuse.convert(*many_tiles, tmp_path / "out")
    assert sorted(tmp_path.iterdir()) == before


def test_an_input_that_shrinks_during_the_run_is_noticed(many_tiles, tmp_path, monkeypatch):
    """With mmap this would be SIGBUS."""
    make = merge.TileWorkers.tiles

    def truncate_first(self, outputs):
        os.truncate(many_tiles[0] / "model.safetensors", 1_000_000)
        return make(self, outputs)

    monkeypatch.setattr(merge.TileWorkers, "tiles", truncate_first)
    with pytest.raises(
        CheckpointError, match=r"model\.safetensors: ends at byte 1000000; it was changed or truncated"
    ):
        lorafuse.convert(*many_tiles, tmp_path / "out")


def test_torch_is_left_as_the_caller_set_it(many_tiles, tmp_path):
    """One thread per op and exact matrix products are for the run, not for the program that calls it."""
    threads, precision = torch.get_num_threads(), torch.get_float32_matmul_precision()
    torch.set_num_threads(2)
    torch.set_float32_matmul_precision("medium")
    try:
        lorafuse.convert(*many_tiles, tmp_path / "out")
        assert (torch.get_num_threads(), torch.get_float32_matmul_precision()) == (2, "medium")
    finally:
        torch.set_num_threads(threads)
        torch.set_float32_matmul_precision(precision)


def test_steps_hold_no_more_than_their_budget(many_tiles, tmp_path, monkeypatch):
    """Factors of the next weight are loaded only when those in use leave room."""
    held, most = 0, 0

    def prepare(self, base, arena):
        nonlocal held, most
        held, most = held + self.needs.nbytes, max(most, held + self.needs.nbytes)
        original(self, base, arena)

    def release(self):
        nonlocal held
        held -= self.needs.nbytes
        original_release(self)

    from lorafuse.patches.lowrank import LowRank

    original, original_release = LowRank.prepare, LowRank.release
    monkeypatch.setattr(LowRank, "prepare", prepare)
    monkeypatch.setattr(LowRank, "release", release)
    fit = memory.fit_memory

    def tight(planned, *args):
        return replace(fit(planned, *args), resident_nbytes=max(weight.resident_nbytes for weight in planned))

    monkeypatch.setattr("lorafuse.planning.make_plan.fit_memory", tight)
    lorafuse.convert(*many_tiles, tmp_path / "out")
    assert held == 0 and most == 8 * (300_000 + 5) * 4


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["bf16", "nf4_dq", "fp4_dq", "int8", "gpt2_nf4"])
def test_cuda_computes_the_same_truth(kind, base, adapter, tmp_path):
    """The same loop with its tiles on the device."""
    from oracle import complaints, truth

    targets = ["c_attn", "c_proj"] if kind.startswith("gpt2") else LINEARS
    path = adapter(kind, target_modules=targets)
    for dtype in ("auto", "float32"):
        lorafuse.convert(base(kind), path, tmp_path / dtype, dtype=dtype, device="cuda")
        assert complaints(tmp_path / dtype, truth(base(kind), path), dtype) == []
