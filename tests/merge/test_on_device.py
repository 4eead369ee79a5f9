"""The loop with its tiles on a device, which is the CPU and late (late_device.py): the bytes of the CPU, what
waits for what, memory, and errors. Tests marked `gpu` do the same where there is one."""

import errno
import json
import os
import random
import threading
import time

import pytest
import torch
from late_device import NOT_YET, LateDevice, LateLane, TooEarlyError, same_figures
from models import LINEARS
from safetensors.torch import load_file, save_file

import lorafuse
from bench.support.base_kinds import KINDS
from bench.support.synthetic import write_checkpoint
from lorafuse.arithmetic.lanes import (
    DEVICE_NBYTES,
    WORKSPACE_NBYTES,
    CudaLane,
    Staging,
    lane_nbytes,
    n_lanes,
)  # fmt: skip
from lorafuse.arithmetic.measure import Measures
from lorafuse.errors import UsageError
from lorafuse.files.safetensors_file import Shard
from lorafuse.files.safetensors_writer import ShardWriter
from lorafuse.patches.lowrank import LowRank
from lorafuse.planning.memory import on_device
from lorafuse.planning.plan import Memory

LLAMA, GPT2 = {"target_modules": LINEARS}, {"target_modules": ["c_attn", "c_proj"]}
# One of each codec.
OTHERS = (
    "FP8, blocks", "compressed-tensors W4A16, asymmetric", "compressed-tensors NVFP4", "FBGEMM FP8",
    "MLX, 3 bit", "MLX, mxfp8", "torchao int8", "HQQ, 4 bit", "AQLM, 2 × 8 bit", "GPTQ, 4 bit",
    "GPTQ, 4 bit, act-order", "AWQ",
)  # fmt: skip
MODULE, ROWS, COLS, RANK = "model.layers.0.self_attn.", 256, 512, 8


@pytest.fixture
def late(monkeypatch):
    """late(…LateDevice) → a device that runs compute on from now on."""

    def begin(**settings):
        device = LateDevice(**settings)
        device.installed(monkeypatch)
        return device

    return begin


@pytest.fixture
def small_tiles(monkeypatch):
    monkeypatch.setattr("lorafuse.planning.plan.TILE_NUMEL", 1 << 11)


def stored(folder):
    tensors = {name: t for path in folder.glob("*.safetensors") for name, t in load_file(path).items()}
    return {name: t.contiguous().view(-1).view(torch.uint8).numpy().tobytes() for name, t in tensors.items()}


@pytest.mark.parametrize("kind", ["bf16", "nf4_dq", "nf4_odd", "int8", "gpt2_nf4"])
def test_bytes_are_those_of_the_cpu(kind, base, adapter, tmp_path, late, small_tiles):
    """And nothing waits for a tile but the end of its copies."""
    inputs = base(kind), adapter(kind, **(GPT2 if kind.startswith("gpt2") else LLAMA))
    here = lorafuse.convert(*inputs, tmp_path / "here")
    device = late()
    there = lorafuse.convert(*inputs, tmp_path / "there")
    assert stored(tmp_path / "there") == stored(tmp_path / "here")
    same_figures(there, here)
    assert not device.waiting and device.n_copies


@pytest.mark.parametrize("kind", OTHERS)
def test_bytes_of_other_quantized_bases(kind, tmp_path, late, small_tiles):
    """Of every kind of base that is written by the benchmarks."""
    inputs = quantized(tmp_path, KINDS[kind])
    here = lorafuse.convert(*inputs, tmp_path / "here")
    device = late()
    there = lorafuse.convert(*inputs, tmp_path / "there")
    assert stored(tmp_path / "there") == stored(tmp_path / "here")
    same_figures(there, here)
    assert not device.waiting


@pytest.mark.parametrize(
    ("kind", "format"),
    [
        ("NF4", "base"), ("LLM.int8", "base"), ("FP8, blocks", "base"), ("GPTQ, 4 bit", "base"),
        ("NF4", "fp8"), ("NF4", "int8"),
    ],
)  # fmt: skip
def test_bytes_of_light_formats(kind, format, tmp_path, late, small_tiles):
    """These wait for the device, and make the same."""
    inputs = quantized(tmp_path, KINDS[kind])
    here = lorafuse.convert(*inputs, tmp_path / "here", format=format)
    late()
    there = lorafuse.convert(*inputs, tmp_path / "there", format=format)
    assert stored(tmp_path / "there") == stored(tmp_path / "here")
    same_figures(there, here)


def quantized(path, kind):
    """A base of two weights, of which one is updated, and the adapter."""
    entries = [entry for name in ("q_proj", "o_proj") for entry in kind.stored(MODULE + name, ROWS, COLS)]
    config = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "torch_dtype": "bfloat16"}
    config |= {kind.key: kind.section}
    write_checkpoint(path / "base", entries, config, 1, kind.metadata([entry.name for entry in entries]))
    return path / "base", lora(path / "lora", q_proj=(ROWS, COLS))


def lora(path, **shapes):
    path.mkdir()
    generator = torch.Generator().manual_seed(0)
    tensors = {}
    for name, (rows, cols) in shapes.items():
        key = f"base_model.model.{MODULE}{name}.lora_"
        tensors[f"{key}A.weight"] = torch.randn(RANK, cols, generator=generator) * 0.01
        tensors[f"{key}B.weight"] = torch.randn(rows, RANK, generator=generator) * 0.01
    save_file(tensors, path / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": RANK, "lora_alpha": RANK}
    (path / "adapter_config.json").write_text(json.dumps(config))
    return path


@pytest.fixture
def large(tmp_path):
    """A base and an adapter with eight tiles to a weight."""
    shapes = {"q_proj": (2048, 2048), "o_proj": (2048, 2048)}
    generator = torch.Generator().manual_seed(1)
    tensors = {
        f"{MODULE}{name}.weight": torch.randn(shape, generator=generator).bfloat16()
        for name, shape in shapes.items()
    }
    (tmp_path / "base").mkdir()
    save_file(tensors, tmp_path / "base" / "model.safetensors")
    config = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "dtype": "bfloat16"}
    (tmp_path / "base" / "config.json").write_text(json.dumps(config))
    return tmp_path / "base", lora(tmp_path / "lora", **shapes)


@pytest.mark.parametrize("n_threads", [1, 3])
def test_memory_is_within_the_budget(n_threads, large, tmp_path, late, monkeypatch):
    """What all operations hold at once, as they are counted, is within what the plan reckons with."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(n_threads)))
    device, spent = late(), []
    monkeypatch.setattr(
        "lorafuse.merge.loop.on_device", lambda memory: spent.append(on_device(memory)) or spent[-1]
    )
    lorafuse.convert(*large, tmp_path / "out")
    [memory] = spent
    of_lanes = memory.n_workers * (lane_nbytes(memory.of_tile_nbytes) - WORKSPACE_NBYTES)
    assert 0 < device.most_nbytes <= of_lanes + memory.largest_nbytes < DEVICE_NBYTES
    # Pinned memory is that of buffers, however many tiles there are.
    of_buffers = memory.n_workers * (memory.n_variants * memory.tile_nbytes + memory.of_tile_nbytes)
    assert device.pinned_nbytes <= of_buffers + 2 * memory.largest_nbytes


@pytest.mark.parametrize(
    ("n_workers", "tile", "held", "expected"),
    [(1, 10, 0, 2), (16, 10, 0, 8), (16, 10, 400, 2), (16, 150, 0, 2), (1, 10, 500, 0), (1, 600, 0, 0)],
)
def test_lanes(n_workers, tile, held, expected):
    """Megabytes: as many lanes as the memory of the device has room for, and no more than are of use."""
    assert n_lanes(n_workers, tile * 10**6, held * 10**6) == expected
    memory = Memory(n_workers, 4 * n_workers, 1, 0, 10**9, tile * 10**6, held * 10**6)
    if not expected:
        with pytest.raises(UsageError, match=r"A weight holds \d+ MB .* Choose --device cpu"):
            on_device(memory)
        return
    there = on_device(memory)
    assert there.n_workers == expected
    assert held * 10**6 <= there.resident_nbytes < DEVICE_NBYTES - expected * lane_nbytes(tile * 10**6) + 1


def test_tiles_are_on_the_device_at_once(large, tmp_path, late, monkeypatch):
    """Two lanes wait for each other before either has waited for its tile: neither holds up the other."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0})
    device = late(meeting=threading.Barrier(2))
    lorafuse.convert(*large, tmp_path / "out")
    assert device.most_in_flight == 2


def test_what_tiles_share_is_finished_before_them(large, tmp_path, late, monkeypatch):
    """What a patch holds is made on a lane of its own, which the lanes of tiles do not wait for."""
    unfinished, prepare, apply, catch_up = set(), LowRank.prepare, LowRank.apply, LateLane.catch_up

    def prepared(patch, *args):
        unfinished.add(id(patch))
        prepare(patch, *args)

    def applied(patch, *args):
        assert id(patch) not in unfinished
        apply(patch, *args)

    def caught_up(lane, n):
        catch_up(lane, n)
        if not lane.bound:
            unfinished.clear()

    monkeypatch.setattr(LowRank, "prepare", prepared)
    monkeypatch.setattr(LowRank, "apply", applied)
    monkeypatch.setattr(LateLane, "catch_up", caught_up)
    late()
    lorafuse.convert(*large, tmp_path / "out")
    assert not unfinished


def test_sums_are_fetched_once_for_each_weight(large, tmp_path, late, monkeypatch):
    fetched, settle = [], Measures.settle
    monkeypatch.setattr(Measures, "settle", lambda m: fetched.append(len(m.there)) or settle(m))
    late()
    lorafuse.convert(*large, tmp_path / "out")
    assert fetched == [8, 8]


def not_read(shard, *_):
    raise OSError(errno.EIO, "no reading")


def not_written(*_):
    raise OSError(errno.ENOSPC, "no room")


def not_computed(*_):
    raise RuntimeError("no computing")


@pytest.mark.parametrize(
    ("settings", "broken", "by", "error"),
    [
        ({}, (Shard, "read_into"), not_read, "no reading"),
        ({}, (LateLane, "copy_in"), not_computed, "no computing"),
        ({"fails_at": 5}, None, None, "the device is lost"),
        ({}, (ShardWriter, "write"), not_written, "no room"),
    ],
    ids=["read", "copy in", "device", "write"],
)
def test_an_error_in_any_stage_ends_the_run(settings, broken, by, error, large, tmp_path, late, monkeypatch):
    """And no thread is left, nor OUT_DIR."""
    device = late(**settings)
    if broken:
        plan = lorafuse.pipeline.make_plan
        monkeypatch.setattr(
            "lorafuse.pipeline.make_plan",
            lambda *args, **kw: (plan(*args, **kw), monkeypatch.setattr(*broken, by))[0],
        )
    with pytest.raises((OSError, RuntimeError, lorafuse.LorafuseError), match=error):
        lorafuse.convert(*large, tmp_path / "out")
    assert not (tmp_path / "out").exists() and device is not None
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("tile")]


def test_interrupted(large, tmp_path, late, monkeypatch):
    """Ctrl-C while tiles are on the device."""
    late()
    account = []

    def interrupt(*args):
        account.append(args)
        raise KeyboardInterrupt

    monkeypatch.setattr("lorafuse.merge.loop._account", interrupt)
    with pytest.raises(KeyboardInterrupt):
        lorafuse.convert(*large, tmp_path / "out")
    assert account and not (tmp_path / "out").exists()
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("tile")]


@torch.inference_mode()
def at_random(staging, seed):
    """Fills buffers, copies from them, waits, and grows them, in any order."""
    draw = random.Random(seed)
    for step in range(200):
        buffer = staging.get(draw.choice("abc"), draw.choice((8, 16, 64, 200)))
        buffer.fill_(step % 251)
        for _ in range(draw.randrange(3)):
            first = draw.randrange(len(buffer))
            assert bool((staging.copy_in(buffer[first:]) == step % 251).all())
        if draw.random() < 0.1:
            staging.settle()
    staging.settle()


@pytest.mark.parametrize("seed", range(10))
def test_no_buffer_is_filled_before_it_is_copied(seed):
    at_random(Staging(LateLane(LateDevice())), seed)


@torch.inference_mode()
def test_a_buffer_that_is_filled_too_early_is_seen():
    """Of who does not wait; so the test above can fail."""
    lane = LateLane(LateDevice())
    staging = Staging(lane)
    buffer = staging.get("a", 8).fill_(1)
    staging.copy_in(buffer)
    buffer.fill_(2)
    with pytest.raises(TooEarlyError):
        staging.settle()
    host = lane.pinned(4)
    lane.copy_out(torch.full((4,), 7, dtype=torch.uint8), host)
    assert host.tolist() == [NOT_YET] * 4


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["bf16", "nf4_dq", "fp4_dq", "int8", "gpt2_nf4"])
def test_on_a_gpu(kind, base, adapter, tmp_path):
    """Where nothing is multiplied, the same bytes as on the CPU; else within one rounding. Sums to 1e-6."""
    inputs = base(kind), adapter(kind, **(GPT2 if kind.startswith("gpt2") else LLAMA))
    here = lorafuse.convert(*inputs, tmp_path / "here", device="cpu")
    there = lorafuse.convert(*inputs, tmp_path / "there", device="cuda")
    assert there["tool"]["device"] == "cuda"
    found, expected = stored(tmp_path / "there"), stored(tmp_path / "here")
    changed = {name for name, entry in here["tensors"].items() if entry["action"] == "merged"}
    assert changed and all(found[name] == expected[name] for name in expected.keys() - changed)
    for name in changed:
        assert within_one_rounding(tmp_path, name)
        for key in ("delta_norm", "delta_rel"):
            assert there["tensors"][name][key] == pytest.approx(here["tensors"][name][key], rel=1e-6)


def within_one_rounding(path, name):
    """Each element is at most the next value of its dtype away."""
    ours, theirs = (tensor_of(path / folder, name) for folder in ("there", "here"))
    steps = [t.view(torch.int16).to(torch.int32) for t in (ours, theirs)]
    return bool(((steps[0] - steps[1]).abs() <= 1).all())


def tensor_of(folder, name):
    return next(
        tensors[name] for file in folder.glob("*.safetensors") if name in (tensors := load_file(file))
    )


@pytest.mark.gpu
def test_memory_of_a_gpu(large, tmp_path):
    torch.cuda.reset_peak_memory_stats()
    lorafuse.convert(*large, tmp_path / "out", device="cuda")
    assert torch.cuda.max_memory_allocated() < DEVICE_NBYTES


@pytest.mark.gpu
def test_streams_overlap():
    """What two lanes compute takes less than twice what one takes, where neither fills the GPU."""
    device = torch.device("cuda")

    def seconds(n_lanes):
        def compute():
            CudaLane(device).bind()
            x = torch.ones(1 << 10, dtype=torch.float32, device=device)
            meet.wait()
            for _ in range(50):
                torch.cuda._sleep(1_000_000)
                x.add_(1)
            torch.cuda.current_stream(device).synchronize()

        meet = threading.Barrier(n_lanes + 1)
        threads = [threading.Thread(target=compute) for _ in range(n_lanes)]
        for thread in threads:
            thread.start()
        meet.wait()
        began = time.perf_counter()
        for thread in threads:
            thread.join()
        return time.perf_counter() - began

    seconds(2)
    assert seconds(2) < 1.5 * seconds(1)
