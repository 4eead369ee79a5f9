"""The plan: it is complete, canonical, within the memory limit, and made without reading a weight."""

import itertools
import json
import random

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from models import LINEARS
from oracle import read_adapter, read_tensors
from safetensors.torch import save_file

import lorafuse
from lorafuse.adapters import open_adapter
from lorafuse.codecs.plain import PlainEncoder
from lorafuse.codecs.sources import Sources
from lorafuse.errors import UsageError
from lorafuse.files.checkpoint import Checkpoint
from lorafuse.files.local_folder import LocalFolder
from lorafuse.files.names import natural_key
from lorafuse.files.stores import ShardedStore
from lorafuse.files.tensors import TensorSpec
from lorafuse.planning import memory
from lorafuse.planning.combine import WeightedAdapter
from lorafuse.planning.make_plan import make_plan
from lorafuse.planning.plan import Step
from lorafuse.planning.shards import split_shards
from lorafuse.settings import Settings, parse_nbytes


class Nothing(Sources):
    """What is not read, as far as sizes decide."""


def step(name, spec, action):
    return Step(name, spec, Nothing(), PlainEncoder(name, spec), action=action)


def plan_of(ckpt, lora, **settings):
    chosen = Settings(**settings)
    adapters = [WeightedAdapter(open_adapter(LocalFolder(lora)), chosen.adapter_scale)]
    return make_plan(Checkpoint(LocalFolder(ckpt)), adapters, chosen)


def test_planning_reads_no_weight(base, adapter, monkeypatch):
    """Headers and small tensors only: what is read is a fraction of what a step will read."""
    lora, read = adapter("nf4_dq", target_modules=LINEARS), []
    original = ShardedStore.read_into
    monkeypatch.setattr(
        ShardedStore,
        "read_into",
        lambda self, name, start, buffer: (read.append(name), original(self, name, start, buffer)),
    )
    plan_of(base("nf4_dq"), lora)
    assert read and not [name for name in read if name.endswith((".weight", ".bias", ".absmax"))]


def test_every_base_tensor_is_produced_and_every_adapter_tensor_used_once(base, adapter):
    lora = adapter("nf4_dq", target_modules=LINEARS, modules_to_save=["norm"])
    plan = plan_of(base("nf4_dq"), lora)
    claimed = [name for step in plan.steps if step.action != "replaced" for name in step.sources.names]
    replaced = [step.name for step in plan.steps if step.action == "replaced"]
    assert sorted([*claimed, *replaced]) == sorted(read_tensors(base("nf4_dq")))
    assert plan.used == sorted(read_adapter(lora)) and plan.ignored == {}


def test_the_order_does_not_depend_on_how_the_input_is_sharded(base, adapter, tmp_path):
    """Layers in their natural order, whatever file they come from; the bytes are the same."""
    stored = read_tensors(base("nf4_dq"))
    names = sorted(stored)
    random.Random(0).shuffle(names)
    ckpt = tmp_path / "shuffled"
    ckpt.mkdir()
    weight_map = {}
    for i in range(5):
        file = f"model-0000{i + 1}-of-00005.safetensors"
        save_file({name: stored[name] for name in names[i::5]}, ckpt / file)
        weight_map |= dict.fromkeys(names[i::5], file)
    (ckpt / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    (ckpt / "config.json").write_text((base("nf4_dq") / "config.json").read_text())
    lora = adapter("nf4_dq", target_modules=LINEARS)
    assert [s.name for s in plan_of(ckpt, lora).steps] == [
        s.name for s in plan_of(base("nf4_dq"), lora).steps
    ]
    lorafuse.convert(base("nf4_dq"), lora, tmp_path / "a")
    lorafuse.convert(ckpt, lora, tmp_path / "b")
    assert (tmp_path / "a/model.safetensors").read_bytes() == (tmp_path / "b/model.safetensors").read_bytes()


def test_names_sort_by_number():
    in_order = ["2", "lm_head", "model.layers.2.a", "model.layers.2.b", "model.layers.10.a", "x" + "9" * 50]
    shuffled = random.Random(1).sample(in_order, len(in_order))
    assert sorted(shuffled, key=natural_key) == in_order


@given(st.lists(st.tuples(st.integers(0, 50), st.booleans()), min_size=1, max_size=40), st.integers(1, 120))
def test_shards_respect_their_limit(weights, limit):
    """Every weight once; a shard over the limit holds one weight; no two neighbours would fit together; what
    changes and what does not are in order and apart, unless all fits one file."""
    planned = [
        step(f"w{i}", TensorSpec("U8", (n,)), "merged" if changes else "copied")
        for i, (n, changes) in enumerate(weights)
    ]
    shards = split_shards(planned, limit)
    made = [s for shard in shards for s in shard.steps]
    assert sorted(made, key=planned.index) == planned
    assert all(shard.nbytes <= limit or len(shard.steps) == 1 for shard in shards)
    if sum(n for n, _ in weights) <= limit:
        assert made == planned
    else:
        kinds = [{s.changes for s in shard.steps} for shard in shards]
        assert all(len(kind) == 1 for kind in kinds) and kinds == sorted(
            kinds, key=lambda kind: kind == {False}
        )
        assert made == sorted(planned, key=lambda s: not s.changes)
        neighbours = [
            (a, b) for a, b in itertools.pairwise(shards) if a.steps[0].changes == b.steps[0].changes
        ]
        assert all(a.nbytes + b.steps[0].spec.nbytes > limit for a, b in neighbours)
    names = [shard.file for shard in shards]
    n = len(shards)
    assert names == (
        ["model.safetensors"] if n == 1 else [f"model-{i + 1:05d}-of-{n:05d}.safetensors" for i in range(n)]
    )


@pytest.mark.parametrize(
    ("changed", "unchanged", "n_files"),
    [(10, 99, 1), (10, 101, 2), (899, 101, 2), (911, 101, 1), (0, 150, 1), (150, 0, 1)],
)
def test_what_is_worth_sharing_has_a_file_of_its_own(changed, unchanged, n_files):
    """Of a model that would fit one file: when it is more than 100 MB and more than a tenth of the model."""
    planned = [step("a", TensorSpec("U8", (changed * 10**6,)), "merged")] if changed else []
    planned += [step("b", TensorSpec("U8", (unchanged * 10**6,)), "copied")] if unchanged else []
    assert len(split_shards(planned, 2 * 10**9)) == n_files


@pytest.mark.parametrize("shape", [(), (0,), (7,), (3, 5), (0, 4), (1000, 700), (3, 40, 5000), (2, 1 << 19)])
def test_tiles_cover_a_weight_in_whole_rows(shape):
    made = step("w", TensorSpec("F32", shape), "decoded")
    tiles = list(made.tiles())
    assert [start for start, _ in tiles] == [0, *(stop for _, stop in tiles)][: len(tiles)]
    assert (tiles[-1][1] if tiles else 0) == made.spec.numel
    assert all(stop % made.row_numel == 0 for _, stop in tiles)


def test_the_memory_limit_decides_workers_not_tiles(base, adapter):
    lora = adapter("nf4_dq", target_modules=LINEARS)
    small, large = (
        plan_of(base("nf4_dq"), lora, memory_nbytes=n, n_threads=8)
        for n in (memory.RUNTIME_NBYTES + 900_000, 10**9)
    )
    assert small.memory.n_workers < large.memory.n_workers == 8
    assert [list(s.tiles()) for s in small.steps] == [list(s.tiles()) for s in large.steps]
    assert small.plan_id == large.plan_id


def test_a_limit_that_nothing_fits_into_is_refused(base, adapter, tmp_path):
    lora = adapter("nf4_dq", target_modules=["q_proj"])
    with pytest.raises(
        UsageError, match=r"^A memory limit of 0 MB is too small: \d+ MB are needed beyond `import torch`"
    ):
        lorafuse.convert(base("nf4_dq"), lora, tmp_path / "work" / "out", memory_limit="1KB")
    assert not (tmp_path / "work").exists()


def test_a_factor_larger_than_the_limit_is_read_in_parts(tmp_path):
    """A rank-900 update of 64 × 30000 has a right factor of 108 MB; the bytes are those of a run that holds
    it."""
    torch.manual_seed(0)
    ckpt, lora = tmp_path / "ckpt", tmp_path / "lora"
    ckpt.mkdir()
    lora.mkdir()
    save_file({"a.weight": torch.randn(64, 30000).bfloat16()}, ckpt / "model.safetensors")
    (ckpt / "config.json").write_text('{"model_type": "llama", "architectures": ["LlamaModel"]}')
    factors = {"a.lora_A.weight": torch.randn(900, 30000), "a.lora_B.weight": torch.randn(64, 900)}
    save_file(
        {f"base_model.model.{key}": t for key, t in factors.items()}, lora / "adapter_model.safetensors"
    )
    (lora / "adapter_config.json").write_text(
        '{"peft_type": "LORA", "r": 900, "lora_alpha": 9, "target_modules": ["a"]}'
    )
    patches = [
        plan_of(ckpt, lora, memory_nbytes=n).shards[0].steps[0].patches[0] for n in (100 * 10**6, 10**9)
    ]
    assert [patch.right_resident for patch in patches] == [False, True]
    for limit in ("100MB", "1GB"):
        lorafuse.convert(ckpt, lora, tmp_path / limit, memory_limit=limit)
    assert (tmp_path / "100MB/model.safetensors").read_bytes() == (
        tmp_path / "1GB/model.safetensors"
    ).read_bytes()


@pytest.mark.parametrize(
    ("text", "nbytes"), [("5GB", 5 * 10**9), ("100MB", 10**8), ("1.5kb", 1500), (7, 7), ("5GiB", 5 << 30)]
)
def test_sizes(text, nbytes):
    assert parse_nbytes(text) == nbytes


@pytest.mark.parametrize("text", ["lots", "", "-1GB", "0", "5XB", "10", "nan", "1e3"])
def test_what_is_no_size_is_refused(text):
    with pytest.raises(UsageError):
        parse_nbytes(text)
