"""What the patches of all types say of themselves is true: the memory that they take, and which of them are
the same."""

import json
from contextlib import closing

import pytest
import torch
from models import spread
from one_linear import ON_ONE_LINEAR, save_one_linear
from oracle import config, read_tensors
from renamed_models import answers, tiny
from safetensors.torch import save_file
from torch.profiler import ProfilerActivity, profile
from trained import in_peft

import lorafuse
from lorafuse.adapters import ADAPTERS, open_adapter
from lorafuse.arithmetic.arena import Arena
from lorafuse.errors import AdapterError
from lorafuse.files.checkpoint import Checkpoint
from lorafuse.files.local_folder import LocalFolder
from lorafuse.files.stores import ShardedStore
from lorafuse.patches.patch import Base
from lorafuse.patches.row_function import RowFunction, product_added
from lorafuse.planning.combine import WeightedAdapter
from lorafuse.planning.make_plan import make_plan
from lorafuse.settings import Settings

CPU = torch.device("cpu")


def measured(call):
    """(bytes held afterwards, most bytes meanwhile) of what torch allocated, within its operations too."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        call()
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    held = most = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        most = max(most, held)
    return held, most


def test_what_is_measured_is_what_torch_allocates():
    kept = []
    call = lambda: kept.append((torch.ones(1 << 20) * 2 + 1).sum() + torch.ones(1 << 18))  # noqa: E731
    held, most = measured(call)
    assert 1 << 20 <= held < (1 << 20) + 1000
    assert 8 << 20 <= most < (8 << 20) + 1000


# In pieces of this many elements tensors are read; what that takes belongs to the loop, not to a patch.
PIECE = 1 << 12


def test_there_is_a_case_of_each_type():
    assert {case.split()[0] for case in ON_ONE_LINEAR} == ADAPTERS.keys() - {
        "TRAINABLE_TOKENS",
        "MLX",
    }  # only rows of embeddings; LoRA's patches


@pytest.mark.parametrize("case", ON_ONE_LINEAR)
def test_patches_take_no_more_memory_than_they_say(case, tmp_path, monkeypatch):
    """From prepare to release, and in each worker for a tile."""
    for module in ("patches.factor", "adapters.types.randlora", "adapters.reading.vera_vectors"):
        monkeypatch.setattr(f"lorafuse.{module}.READ_NUMEL", PIECE)
    save_one_linear(case, 640, 1024, tmp_path)
    scale = 0.5 if case == "LN_TUNING" else 1.0  # a layer trained whole needs no patch
    with (
        closing(Checkpoint(LocalFolder(tmp_path / "ckpt"))) as ckpt,
        closing(open_adapter(LocalFolder(tmp_path / "adapter"))) as adapter,
    ):
        plan = make_plan(ckpt, [WeightedAdapter(adapter, scale)], Settings(memory_nbytes=1 << 30))
        patched = [(step, patch) for step in plan.steps for patch in step.patches]
        assert patched
        for step, patch in patched:
            arena, tile_nbytes = Arena(CPU), 4 * step.tile_size
            held, most = measured(lambda: patch.prepare(Base(step.sources, arena), arena))  # noqa: B023
            assert held <= most <= patch.needs.nbytes + 16 * PIECE
            start, stop = next(step.tiles())
            tile = torch.randn(stop - start).view(-1, step.row_numel)
            _, scratch = measured(lambda: patch.apply(tile, 0, Arena(CPU)))  # noqa: B023
            assert scratch <= patch.needs.scratch_nbytes + 16 * PIECE
            assert patch.needs.scratch_nbytes <= 10 * tile_nbytes


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int8, torch.int32, torch.int64])
def test_tensors_are_counted_as_they_are_loaded(dtype, tmp_path):
    """Floats as fp32, integers as int64, whatever they are stored as."""
    save_file({"a": torch.ones(300, 5).to(dtype)}, tmp_path / "x.safetensors")
    with closing(ShardedStore(LocalFolder(tmp_path), "x.safetensors")) as store:
        patch = RowFunction(store, {"a": "a"}, product_added)
        held, _ = measured(lambda: patch.prepare(None, Arena(CPU)))
        assert held == patch.needs.nbytes == 1500 * (4 if dtype.is_floating_point else 8)


# ---- the same update on both sides of a tied pair

HEAD, EMBED = "base_model.model.lm_head", "base_model.model.model.embed_tokens"
N = 96  # tokens; the width is 64
SIDES = {
    "C3A": {"c3a_kernel": (6, 4, 16)},
    "GLORA": {"glora_A.Xd": (N, 3), "glora_A.Xu": (3, 64), "glora_B.X": (N,)},
    "HIRA": {"hira_A": (3, 64), "hira_B": (N, 3)},
    "HRA": {"hra_u": (64, 3)},
    "LOHA": {"hada_w1_a": (N, 3), "hada_w1_b": (3, 64), "hada_w2_a": (N, 3), "hada_w2_b": (3, 64)},
    "MISS": {"miss_block": (3, N)},
    "WAVEFT": {"waveft_spectrum": (50,)},
}


def both_sides(kind, path, *, change=None):
    """An adapter with equal tensors for the embedding and the head; in one of those of the head `change`
    elements are others."""
    torch.manual_seed(0)
    own = {leaf: torch.randn(shape) * 0.1 for leaf, shape in SIDES[kind].items()}
    tensors = {f"{side}.{leaf}": t.clone() for side in (HEAD, EMBED) for leaf, t in own.items()}
    for i in change or ():
        tensors[f"{HEAD}.{next(reversed(own))}"].flatten()[i] += 1
    path.mkdir()
    save_file(tensors, path / "adapter_model.safetensors")
    (path / "adapter_config.json").write_text(json.dumps({"peft_type": kind}))
    return path


@pytest.mark.parametrize("kind", SIDES)
def test_equal_updates_leave_a_tied_pair_tied(kind, base, tmp_path, monkeypatch):
    monkeypatch.setattr("lorafuse.patches.factor.READ_NUMEL", 16)
    adapter = both_sides(kind, tmp_path / "adapter")
    receipt = lorafuse.convert(base("fp32_tied"), adapter, tmp_path / "out")
    found, before = read_tensors(tmp_path / "out"), read_tensors(base("fp32_tied"))
    assert config(tmp_path / "out")["tie_word_embeddings"] and "lm_head.weight" not in found
    assert not torch.equal(found["model.embed_tokens.weight"], before["model.embed_tokens.weight"])
    assert {key.rpartition(".")[0].startswith(HEAD) for key in receipt["adapter_tensors"]["ignored"]} == {
        True
    }


@pytest.mark.parametrize("kind", SIDES)
def test_updates_that_differ_in_one_element_untie_it(kind, base, tmp_path, monkeypatch):
    monkeypatch.setattr("lorafuse.patches.factor.READ_NUMEL", 16)
    adapter = both_sides(kind, tmp_path / "adapter", change=[-1])
    lorafuse.convert(base("fp32_tied"), adapter, tmp_path / "out")
    found = read_tensors(tmp_path / "out")
    assert not config(tmp_path / "out")["tie_word_embeddings"]
    assert not torch.equal(found["model.embed_tokens.weight"], found["lm_head.weight"])


def test_equal_tensors_scaled_differently_untie_a_pair(base, tmp_path):
    """LoHa with an alpha of its own for the head."""
    adapter = both_sides("LOHA", tmp_path / "adapter")
    (adapter / "adapter_config.json").write_text(
        json.dumps({"peft_type": "LOHA", "r": 3, "alpha_pattern": {"lm_head": 5}})
    )
    lorafuse.convert(base("fp32_tied"), adapter, tmp_path / "out")
    assert not config(tmp_path / "out")["tie_word_embeddings"]


def test_a_function_with_a_closure_is_not_taken():
    """Two of them may look alike and compute different things."""
    scale = 2.0
    with pytest.raises(AssertionError, match="bind by partial"):
        RowFunction(None, {}, lambda tile, first_row, tensors: tile.mul_(scale))


# ---- weights that a checkpoint stores joined

JOINED = {
    "C3A": {"block_size": 16},
    "DELORA": {"r": 3},
    "FOURIERFT": {"n_frequency": 50, "scaling": 100.0},
    "GRALORA": {"r": 4, "gralora_k": 2},
    "HIRA": {"r": 4},
    "HRA": {"r": 4},
    "IA3": {"feedforward_modules": ["up_proj"]},
    "LOHA": {"r": 4, "alpha": 8},
    "LOKR": {"r": 2, "alpha": 8},
    "MISS": {"r": 8},
    "OFT": {"oft_block_size": 8},
    "UNILORA": {"r": 4, "save_indices": True},
    "VBLORA": {"r": 4, "num_vectors": 20, "vector_length": 16},
    "VERA": {"r": 4},
    "WAVEFT": {"n_frequency": 90},
}


@pytest.fixture(scope="module")
def nomic(tmp_path_factory):
    """A NomicBert as transformers writes it, whose query, key and value are one stored weight."""
    path = tmp_path_factory.mktemp("joined") / "nomic_bert"
    spread(tiny("nomic_bert")).save_pretrained(path)
    return path


@pytest.mark.parametrize("kind", JOINED)
def test_parameters_that_are_stored_joined(kind, nomic, tmp_path, monkeypatch):
    """In tiles of a few rows, which begin and end within a parameter."""
    monkeypatch.setattr("lorafuse.planning.plan.TILE_NUMEL", 160)
    cls = type(tiny("nomic_bert"))
    model = cls.from_pretrained(nomic, dtype=torch.float32)
    before = answers(model)
    settings = {"target_modules": ["q_proj", "v_proj", "up_proj"]} | JOINED[kind]
    tuned = in_peft(model, kind, settings, spread=0.2)
    tuned.save_pretrained(tmp_path / "adapter", save_embedding_layers=False)
    lorafuse.convert(nomic, tmp_path / "adapter", tmp_path / "out")
    found = answers(cls.from_pretrained(tmp_path / "out", dtype=torch.float32))
    assert (found - answers(tuned)).abs().max() < 1e-4 < (found - before).abs().max()


@pytest.mark.parametrize(("kind", "settings"), [("DEFT", {"r": 4}), ("ROAD", {"group_size": 8})])
def test_an_update_of_the_whole_is_refused_where_it_is_stored_joined(kind, settings, nomic, tmp_path):
    """One that reads the base, and one that mixes rows."""
    model = type(tiny("nomic_bert")).from_pretrained(nomic, dtype=torch.float32)
    tuned = in_peft(model, kind, {"target_modules": ["q_proj"]} | settings)
    tuned.save_pretrained(tmp_path / "adapter", save_embedding_layers=False)
    with pytest.raises(
        AdapterError,
        match=r"changes .*q_proj\.weight as a whole, which the checkpoint stores in another form",
    ):
        lorafuse.convert(nomic, tmp_path / "adapter", tmp_path / "work" / "out")
    assert not (tmp_path / "work").exists()
