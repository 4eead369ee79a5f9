"""Patches know which others make the same update, and wrappers forget nothing of what they wrap: the plan
unties weights by the first, and fits the memory limit by the second."""

from dataclasses import fields, replace

import pytest
import torch
from safetensors.torch import save_file

from lorafuse.arithmetic.arena import Arena
from lorafuse.files.local_folder import LocalFolder
from lorafuse.files.stores import ShardedStore
from lorafuse.files.tensors import TensorSpec
from lorafuse.patches.dora import Dora
from lorafuse.patches.experts import Stack
from lorafuse.patches.factor import Factor
from lorafuse.patches.lowrank import AddVector, LowRank
from lorafuse.patches.on_rows import OnRows
from lorafuse.patches.patch import Patch, PatchNeeds, PatchTraits
from lorafuse.patches.replace_rows import ReplaceRows
from lorafuse.patches.summed import Summed
from lorafuse.patches.target import Part, Target

CPU = torch.device("cpu")
N_ROWS, N_COLS, RANK, N_EXPERTS = 8, 6, 2, 3
SPEC = TensorSpec("F32", (N_ROWS, N_COLS))
TARGET = Target("w", SPEC, is_conv1d=False)
STACKED = Target("w", TensorSpec("F32", (N_EXPERTS, N_ROWS, N_COLS)), is_conv1d=False)


@pytest.fixture
def stores(tmp_path):
    """Two files: the tensors of the second are those of the first, but for the names that it is given."""
    generator = torch.Generator().manual_seed(0)
    shapes = {
        "a": (RANK, N_COLS),
        "b": (N_ROWS, RANK),
        "m": (N_ROWS,),
        "v": (N_ROWS, 1),
        "stack_a": (RANK * N_EXPERTS, N_COLS),
        "stack_b": (N_ROWS, RANK * N_EXPERTS),
    }
    own = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    opened = []

    def make(*changed):
        other = {name: t.clone() for name, t in own.items()}
        for name in changed:
            other[name].view(-1)[-1] += 1
        for i, tensors in enumerate((own, other)):
            save_file(tensors, tmp_path / f"{i}.safetensors")
            opened.append(ShardedStore(LocalFolder(tmp_path), f"{i}.safetensors"))
        return opened

    yield make
    for store in opened:
        store.close()


def low_rank(store, scale=0.5):
    return LowRank(Factor(store, "b"), Factor(store, "a"), scale)


def on_rows(store, row=2, weight="w", scale=0.5):
    return OnRows(low_rank(store, scale), Part(weight, 4, row, 1))


def vector(store, scale=0.5):
    return AddVector(Factor(store, "v"), scale)


def dora(store, strength=1.0, *, by_columns=False):
    return Dora(low_rank(store), store, "m", TARGET, by_columns=by_columns, strength=strength)


def stack(store, scale=0.5):
    return Stack(
        store, None, ("stack_a", "stack_b"), rank=RANK, n_experts=N_EXPERTS, scale=scale, transposed=False
    )


def expert(store, number=1, row=0, scale=0.5):
    part = Part("w", N_ROWS - row, row, expert=number)
    return stack(store, scale).patch(replace(TARGET, part=part))


def experts(store, scale=0.5):
    return stack(store, scale).patch(STACKED)


def summed(store, scale=0.5):
    return Summed([("x", [low_rank(store)]), ("y", [dora(store), low_rank(store, scale)])], SPEC)


@pytest.mark.parametrize("make", [low_rank, on_rows, vector, dora, expert, experts, summed])
def test_equal_tensors_of_two_files_are_the_same_update(make, stores):
    one, two = stores()
    assert make(one).same_as(make(two)) and make(two).same_as(make(one))


@pytest.mark.parametrize(
    ("make", "names"),
    [
        (low_rank, "a b"),
        (on_rows, "a b"),
        (vector, "v"),
        (dora, "a b m"),
        (experts, "stack_a stack_b"),
        (summed, "a b m"),
    ],
)
def test_one_element_makes_another_update(make, names, stores):
    for name in names.split():
        one, two = stores(name)[-2:]
        assert not make(one).same_as(make(two)), name


def test_an_expert_is_compared_by_its_own_matrix(stores):
    """The last element of the stack belongs to the last expert."""
    one, two = stores("stack_b")
    assert expert(one, 1).same_as(expert(two, 1))
    assert not expert(one, N_EXPERTS - 1).same_as(expert(two, N_EXPERTS - 1))


def test_another_place_or_scale_makes_another_update(stores):
    one, two = stores()
    different = [
        (on_rows(one), on_rows(two, row=1)),
        (on_rows(one), on_rows(two, scale=0.25)),
        (on_rows(one), low_rank(two)),
        (vector(one), vector(two, 0.25)),
        (dora(one), dora(two, 0.25)),
        (dora(one), low_rank(two)),
        (expert(one), expert(two, 2)),
        (expert(one), expert(two, row=1)),
        (expert(one), expert(two, scale=0.25)),
        (expert(one), experts(two)),
        (experts(one), experts(two, scale=0.25)),
        (summed(one), summed(two, scale=0.25)),
        (summed(one), Summed([("x", [low_rank(two)])], SPEC)),
        (Summed([("x", [low_rank(one)])], SPEC), Summed([(name, [low_rank(two)]) for name in "xy"], SPEC)),
    ]
    for patch, other in different:
        assert not patch.same_as(other) and not other.same_as(patch), (patch, other)


def test_the_weight_that_a_part_lies_in_may_have_another_name(stores):
    """Tied weights have two."""
    one, two = stores()
    assert on_rows(one, weight="embed").same_as(on_rows(two, weight="head"))


# ---- what wrappers say


def said(patch):
    """Every field of both records."""
    return {f.name: getattr(record, f.name) for record in (patch.needs, patch.traits) for f in fields(record)}


class Demanding(Patch):
    """Says the contrary of every default."""

    needs = PatchNeeds(1, 2, row_multiple=1, stacked=True, reads_base=False, holds_weight=True)
    traits = PatchTraits(additive=True, follows_tie=True)

    @property
    def facts(self):
        return {}

    def prepare(self, base, arena): ...

    def apply(self, tile, first_row, arena): ...

    def release(self): ...

    def same_as(self, other):
        return self is other


def test_a_wrapper_says_all_that_the_wrapped_patch_says():
    wrapped = OnRows(Demanding(), Part("w", 4))
    assert said(wrapped) == said(Demanding())
    total = said(Summed([("x", [Demanding()]), ("y", [Demanding()])], SPEC))
    # Of several adapters each follows a tie by itself, before they are summed.
    assert total == said(Demanding()) | {"nbytes": 2, "scratch_nbytes": 4, "follows_tie": False}


def test_a_sum_reads_the_weight_if_one_of_its_patches_does(stores):
    one, _ = stores()
    plain, reading = low_rank(one), dora(one, by_columns=True)
    assert Summed([("x", [plain]), ("y", [reading])], SPEC).needs.reads_base
    assert not Summed([("x", [plain]), ("y", [dora(one)])], SPEC).needs.reads_base


@pytest.mark.parametrize("name", ["facts", "prepare", "apply", "release", "same_as"])
def test_a_patch_that_forgets_a_call_cannot_be_made(name):
    calls = {call: vars(Demanding)[call] for call in ("facts", "prepare", "apply", "release", "same_as")}
    type("Whole", (Patch,), calls)()
    del calls[name]
    with pytest.raises(TypeError, match=f"abstract method '?{name}"):
        type("Forgetful", (Patch,), calls)()


# ---- holding less


@pytest.mark.parametrize("make", [low_rank, on_rows, dora, summed])
def test_a_lighter_patch_makes_the_same_bytes_and_holds_less(make, stores):
    """Until nothing more can be read again."""
    one, _ = stores()
    weight = torch.randn(N_ROWS, N_COLS, generator=torch.Generator().manual_seed(1))
    patch, n_lighter, held = make(one), 0, make(one).needs.nbytes
    expected = applied(patch, weight)
    assert not torch.equal(expected, weight)
    while (light := patch.lighter()) is not None:
        assert light.needs.nbytes < held and light.needs.scratch_nbytes >= patch.needs.scratch_nbytes
        assert light.same_as(make(one)) and light.facts == patch.facts and light.traits == patch.traits
        assert torch.equal(applied(light, weight), expected)
        patch, n_lighter, held = light, n_lighter + 1, light.needs.nbytes
    assert n_lighter == (3 if make is summed else 1)


def applied(patch, weight):
    tile, arena = weight.clone(), Arena(CPU)
    patch.prepare(None, arena)
    for start in (0, N_ROWS // 2):
        patch.apply(tile[start : start + N_ROWS // 2], start, arena)
    patch.release()
    return tile


def test_what_holds_no_factor_holds_no_less(stores):
    one, _ = stores()
    rows = ReplaceRows(Factor(one, "b"), range(N_ROWS), 1.0)
    for patch in (rows, vector(one), expert(one), experts(one), OnRows(vector(one), Part("w", 4))):
        assert patch.lighter() is None
