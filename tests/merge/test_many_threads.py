"""Neither bytes nor receipts depend on how many threads make tiles, nor on which of them is first."""

import os
import random
import threading
import time

import pytest
import torch
from build import write_adapter, write_checkpoint
from scenario import content

import lorafuse
from lorafuse.merge import workers
from lorafuse.planning import memory, plan


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    """Weights of some tens of tiles each, if tiles are small, in two files; one that nothing changes."""
    path = tmp_path_factory.mktemp("inputs")
    torch.manual_seed(0)
    tensors = {f"model.layers.{i}.mlp.up_proj.weight": torch.randn(256, 192).bfloat16() for i in range(3)}
    factors = {}
    for name in list(tensors)[:2]:
        module = f"base_model.model.{name.removesuffix('.weight')}"
        factors |= {
            f"{module}.lora_A.weight": torch.randn(4, 192) * 0.1,
            f"{module}.lora_B.weight": torch.randn(256, 4) * 0.1,
        }
    return write_checkpoint(path / "ckpt", tensors), write_adapter(path / "adapter", factors)


@pytest.fixture
def with_threads(inputs, tmp_path, monkeypatch):
    """A function (name, number of threads, seed, options) → a result, and what was said."""
    monkeypatch.setattr(plan, "TILE_NUMEL", 192 * 16)

    def make(name, n_threads, seed, options):
        rng, make_tile, threads = random.Random(seed), workers.make_tile, set()

        def slow(*args):
            threads.add(threading.current_thread())
            made = make_tile(*args)
            time.sleep(rng.choice([0, 0, 0.001, 0.003]))
            return made

        events = []
        with monkeypatch.context() as patch:
            patch.setattr(os, "sched_getaffinity", lambda _: set(range(n_threads)))
            patch.setattr(workers, "make_tile", slow)
            lorafuse.convert(*inputs, tmp_path / name, on_event=events.append, **options)
        assert len(threads) > n_threads // 2  # one that is quick may leave nothing for the last
        return content(tmp_path / name), [event for event in events if event["event"] == "progress"]

    return make


@pytest.mark.parametrize("options", [
    {}, {"max_shard_size": "110KB"}, {"format": "nf4"}, {"format": "w4a16", "max_shard_size": "60KB"},
], ids=str)  # fmt: skip
def test_bytes_and_receipts(options, with_threads):
    """Some formats put a tile's scales elsewhere than its codes."""
    alone = with_threads("alone", 1, 0, options)
    for n_threads in (2, 8):
        assert with_threads(f"{n_threads} threads", n_threads, n_threads, options) == alone


def test_the_calling_thread_wakes_up_for_several_tiles(inputs, tmp_path, monkeypatch):
    """For each half of those that may be pending: it takes the interpreter from the workers."""
    monkeypatch.setattr(plan, "TILE_NUMEL", 192 * 16)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1})
    make_tile, n_made, when = workers.make_tile, [], []

    def slow(*args):
        made = make_tile(*args)
        time.sleep(0.003)
        n_made.append(made)
        return made

    monkeypatch.setattr(workers, "make_tile", slow)
    lorafuse.convert(
        *inputs, tmp_path / "out", on_event=lambda e: e["event"] == "progress" and when.append(len(n_made))
    )
    assert when[0] >= memory.TILES_PER_WORKER and len(when) == 33
