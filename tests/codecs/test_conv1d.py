"""Weights that are stored transposed: any rows, in any windows, read once."""

import tempfile
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager

import bitsandbytes.functional as bnb
import pytest
import torch
from build import write_adapter
from hypothesis import given, settings
from hypothesis import strategies as st
from quantized import four_bit, write

import lorafuse
from lorafuse.codecs import Arena, conv1d, open_weights
from lorafuse.files.checkpoint import Checkpoint
from lorafuse.files.local_folder import LocalFolder
from lorafuse.files.stores import ShardedStore
from lorafuse.files.tensors import Box

CPU = torch.device("cpu")
WEIGHT = "h.0.c_fc.weight"


@contextmanager
def windows_of(nbytes):
    """Windows of about so many stored bytes; two are held."""
    before, conv1d.WINDOWS_NBYTES = conv1d.WINDOWS_NBYTES, 2 * nbytes
    try:
        yield
    finally:
        conv1d.WINDOWS_NBYTES = before


@contextmanager
def bytes_read():
    """A list of how many bytes each read of a tensor of the checkpoint got, inside the `with`."""
    sizes, read_into = [], ShardedStore.read_into

    def count(self, name, start, buffer):
        if name.startswith(WEIGHT.removesuffix(".weight")):
            sizes.append(len(buffer))
        read_into(self, name, start, buffer)

    ShardedStore.read_into = count
    try:
        yield sizes
    finally:
        ShardedStore.read_into = read_into


def gpt2(path, kind, shape, **options):
    """(checkpoint of one Conv1D weight whose stored shape is `shape`, its values)."""
    weight = torch.randn(shape)
    if kind == "int8":
        q, scb, _ = bnb.int8_vectorwise_quant(weight.half())
        stored, values = {"w.weight": q, "w.SCB": scb}, bnb.int8_vectorwise_dequant(q, scb)
    else:
        dtype = options.pop("dtype", torch.bfloat16)
        stored, values = four_bit(weight.to(dtype), quant_type=kind, **options)
    module = WEIGHT.removesuffix(".weight")
    stored = {f"{module}.{name.removeprefix('w.')}": tensor for name, tensor in stored.items()}
    return write(path, stored, model_type="gpt2"), values.T


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_any_rows_from_any_windows(data):
    """Blocks and bytes lie across the edges of windows; odd widths, every dtype, one window or many."""
    shape = (data.draw(st.integers(1, 60)), data.draw(st.integers(1, 300)))
    kind = data.draw(st.sampled_from(["nf4", "fp4", "int8"]))
    torch.manual_seed(data.draw(st.integers(0, 99)))
    options = {}
    if kind != "int8":
        options["blocksize"] = data.draw(st.sampled_from([64, 128, 512, 4096]))
        options["compress_statistics"] = data.draw(st.booleans())
        options["dtype"] = data.draw(st.sampled_from([torch.float32, torch.float16, torch.bfloat16]))
    step = data.draw(st.integers(1, shape[1]))
    with tempfile.TemporaryDirectory() as d, windows_of(data.draw(st.sampled_from([1, 4000, 1 << 20]))):
        path, expected = gpt2(d, kind, shape, **options)
        with closing(Checkpoint(LocalFolder(path))) as ckpt:
            sources, arena = open_weights(ckpt)[WEIGHT], Arena(CPU)
            for first in range(0, shape[1], step):
                box = Box.of_rows(sources.spec, first, min(first + step, shape[1]))
                values = sources.values(box, arena).view(-1, shape[0])
                assert torch.equal(values, expected[first : first + step])


KINDS = {"nf4_dq": ("nf4", {"compress_statistics": True}), "fp4": ("fp4", {}), "int8": ("int8", {})}


@pytest.mark.parametrize("window_nbytes", [100_000, 8_000_000])
@pytest.mark.parametrize("width", [1024, 1056])  # blocks end with a row, or do not
@pytest.mark.parametrize("kind", KINDS)
def test_bytes_read(kind, width, window_nbytes, tmp_path):
    """By several workers, tile after tile: what is stored, once, and a little where windows share a block."""
    kind, options = KINDS[kind]
    with windows_of(window_nbytes):
        path, expected = gpt2(tmp_path / "ckpt", kind, (768, width), **options)
        with closing(Checkpoint(LocalFolder(path))) as ckpt:
            sources = open_weights(ckpt)[WEIGHT]
            boxes = [Box.of_rows(sources.spec, first, first + 16) for first in range(0, width, 16)]
            with bytes_read() as sizes, ThreadPoolExecutor(4) as pool:
                tiles = list(pool.map(lambda box: sources.values(box, Arena(CPU)), boxes))
            stored = sum(ckpt.tensors[name].spec.nbytes for name in sources.names)
    assert torch.equal(torch.cat(tiles).view(width, 768), expected)
    assert sum(sizes) <= 1.1 * stored


def lora(path, rank):
    """An adapter of that weight."""
    torch.manual_seed(rank)
    key = f"base_model.model.{WEIGHT.removesuffix('.weight')}"
    factors = {
        f"{key}.lora_A.weight": torch.randn(rank, 2048),
        f"{key}.lora_B.weight": torch.randn(1024, rank),
    }
    return write_adapter(path, factors, r=rank, fan_in_fan_out=True)


@pytest.mark.parametrize("kind", KINDS)
def test_bytes_read_by_a_merge(kind, tmp_path):
    """For one adapter, and for three that are merged together; with the same bytes as when the weight is held
    whole."""
    kind, options = KINDS[kind]
    path, _ = gpt2(tmp_path / "ckpt", kind, (1024, 2048), **options)
    stored = sum(file.stat().st_size for file in path.glob("*.safetensors"))
    adapters = [lora(tmp_path / "jobs" / str(rank), rank) for rank in (2, 3, 4)]
    lorafuse.convert(path, adapters[0], tmp_path / "whole")
    with windows_of(200_000):
        with bytes_read() as sizes:
            lorafuse.convert(path, adapters[0], tmp_path / "alone")
        assert sum(sizes) <= 1.1 * stored
        with bytes_read() as sizes:
            states = lorafuse.batch(path, tmp_path / "jobs", tmp_path / "out")
        assert [state.state for state in states] == ["done"] * 3
        assert sum(sizes) <= 1.1 * stored
    whole = (tmp_path / "whole" / "model.safetensors").read_bytes()
    assert (tmp_path / "alone" / "model.safetensors").read_bytes() == whole
    assert (tmp_path / "out" / "2" / "model.safetensors").read_bytes() == whole


def test_what_windows_hold(tmp_path):
    """No more than the plan is told, and nothing after the last tile."""
    with windows_of(50_000):
        path, _ = gpt2(tmp_path / "ckpt", "nf4", (512, 1024))
        with closing(Checkpoint(LocalFolder(path))) as ckpt:
            sources, arena = open_weights(ckpt)[WEIGHT], Arena(CPU)
            held = sources._windows._held
            for first in range(0, 1024, 10):
                box = Box.of_rows(sources.spec, first, min(first + 10, 1024))
                raw = sources.fetch(box, arena)
                assert len(held) <= 2
                assert sum(tensor.nbytes for tensor in raw) <= sources.window_nbytes
            assert not held
            sources.fetch(Box.of_rows(sources.spec, 0, 10), arena)
            sources.release()
            assert not held
