"""Several outputs in one pass: each is what it would be alone, and a weight is decoded once."""

import dataclasses
import gc

import pytest
import torch
from models import LINEARS

import lorafuse
from lorafuse.adapters import open_adapter
from lorafuse.codecs import open_weights
from lorafuse.codecs.bnb4 import FourBitSources
from lorafuse.errors import AdapterError, UsageError
from lorafuse.files.checkpoint import Checkpoint
from lorafuse.files.local_folder import LocalFolder
from lorafuse.merge.loop import merge
from lorafuse.outdir.local_file import LocalOutFile
from lorafuse.outdir.output import Output
from lorafuse.planning.combine import WeightedAdapter
from lorafuse.planning.make_plan import make_plan
from lorafuse.planning.memory import RUNTIME_NBYTES, Needs, fit_memory, within_limit
from lorafuse.planning.shared_weights import SharedWeights
from lorafuse.settings import Settings

KINDS = {
    "plain": {"target_modules": LINEARS},
    "dora": {"target_modules": ["q_proj"], "use_dora": True},
    "replaced": {"target_modules": ["v_proj"], "modules_to_save": ["norm"]},
    "other": {"target_modules": LINEARS, "r": 8, "use_rslora": True},
}
SHARDS = {"max_shard_size": "40KB"}


class Bare:
    """As much of an OutDir as the loop needs: files in a directory, under their names at once."""

    def __init__(self, path):
        self.path = path

    def create(self, file, nbytes):
        return LocalOutFile(self.path / file)


@pytest.fixture
def together(base, adapter, tmp_path):
    """A function (kind of base, dtype) → outputs that are ready to be made."""
    ckpts = []

    def make(kind, dtype="auto", **memory):
        settings = Settings(dtype=dtype, max_shard_nbytes=40_000, **memory)
        ckpt = Checkpoint(LocalFolder(base(kind)))
        ckpts.append(ckpt)
        weights = open_weights(ckpt)
        outputs = []
        for name, facts in KINDS.items():
            (tmp_path / name).mkdir()
            lora = open_adapter(LocalFolder(adapter(kind, name=f"lora-{name}", **facts)))
            plan = make_plan(ckpt, [WeightedAdapter(lora, 1.0)], settings, weights=weights)
            outputs.append(Output(plan, Bare(tmp_path / name), lambda event: None))
        return outputs, settings

    yield make
    for ckpt in ckpts:
        ckpt.close()


def run(outputs, settings):
    planned = SharedWeights([output.steps() for output in outputs])
    memory = fit_memory(planned, sum(output.plan.held_nbytes for output in outputs), settings)
    merge(outputs, memory, torch.device("cpu"))


@pytest.mark.parametrize(
    ("kind", "dtype"), [("nf4_dq", "auto"), ("bf16", "auto"), ("bf16", "float16"), ("int8", "bfloat16")]
)
def test_each_output_is_what_it_is_alone(kind, dtype, together, base, adapter, tmp_path):
    outputs, settings = together(kind, dtype)
    run(outputs, settings)
    for (name, facts), output in zip(KINDS.items(), outputs, strict=True):
        assert output.error is None
        alone = tmp_path / f"{name}-alone"
        receipt = lorafuse.convert(base(kind), adapter(kind, **facts), alone, dtype=dtype, **SHARDS)
        shards = [entry for entry in receipt["outputs"] if entry["file"].endswith(".safetensors")]
        for written in shards:
            assert (tmp_path / name / written["file"]).read_bytes() == (alone / written["file"]).read_bytes()
        assert [(w.file, w.sha256) for w in output.outcome.written] == [
            (w["file"], w["sha256"]) for w in shards
        ]
        measures = {name: m.summary() for name, m in output.outcome.measures.items()}
        assert measures == {
            n: {k: t[k] for k in measures[n]} for n, t in receipt["tensors"].items() if n in measures
        }


def test_a_tile_is_decoded_once(together, monkeypatch):
    """For all outputs that cut the weight alike."""
    outputs, settings = together("nf4_dq")
    n_decoded = 0
    decode = FourBitSources.decode_and_keep

    def count(self, raw, box, arena):
        nonlocal n_decoded
        n_decoded += box.numel
        return decode(self, raw, box, arena)

    monkeypatch.setattr(FourBitSources, "decode_and_keep", count)
    run(outputs, settings)
    weights = {s.name: s for s in outputs[0].plan.steps if isinstance(s.sources, FourBitSources)}
    assert n_decoded == sum(s.spec.numel for s in weights.values())


@pytest.mark.parametrize("where", ["prepare", "apply", "variant"])
def test_an_output_that_fails_does_not_cost_the_others(where, together, base, adapter, tmp_path, monkeypatch):
    outputs, settings = together("nf4_dq")
    patch = next(s for s in outputs[1].plan.steps if s.patches).patches[0]

    def refuse(*_):
        raise AdapterError("no good")

    def overflow(tile, first_row, arena):
        tile.fill_(float("inf"))

    monkeypatch.setattr(
        patch, {"variant": "apply"}.get(where, where), overflow if where == "variant" else refuse
    )
    run(outputs, settings)
    assert [output.error is None for output in outputs] == [True, False, True, True]
    assert ("not finite" if where == "variant" else "no good") in str(outputs[1].error)
    for name in ("plain", "replaced", "other"):
        lorafuse.convert(
            base("nf4_dq"), adapter("nf4_dq", **KINDS[name]), tmp_path / f"{name}-alone", **SHARDS
        )
        for path in (tmp_path / f"{name}-alone").glob("*.safetensors"):
            assert (tmp_path / name / path.name).read_bytes() == path.read_bytes()


def test_files_that_are_skipped_are_not_made(together):
    outputs, settings = together("nf4_dq")
    plan, out_dir = outputs[0].plan, outputs[0].out_dir
    skip = {plan.shards[0].file, plan.shards[-1].file}
    made = []
    output = Output(
        plan,
        out_dir,
        lambda event: None,
        skip=skip,
        on_shard=lambda shard, written: made.append(written.file),
    )
    run([output], settings)
    assert (
        sorted(made)
        == sorted(path.name for path in out_dir.path.iterdir())
        == [s.file for s in plan.shards if s.file not in skip]
    )


def test_the_memory_of_a_pass_grows_with_its_outputs(together):
    outputs, settings = together("nf4_dq", memory_nbytes=RUNTIME_NBYTES + 1_000_000, n_threads=1)
    one = fit_memory(SharedWeights([outputs[0].steps()]), 0, settings)
    four = fit_memory(SharedWeights([output.steps() for output in outputs]), 0, settings)
    assert (one.n_variants, four.n_variants) == (1, 4)  # q_proj: three updates, and what it is without one
    tight = Settings(memory_nbytes=RUNTIME_NBYTES + 400_000, n_threads=1)
    fit_memory(SharedWeights([outputs[0].steps()]), 0, tight)
    with pytest.raises(UsageError, match="is too small"):
        fit_memory(SharedWeights([output.steps() for output in outputs * 20]), 0, tight)


def test_what_sources_hold_counts_for_several_outputs_too(together):
    outputs, settings = together("nf4_dq")
    planned = SharedWeights([output.steps() for output in outputs])
    before = within_limit(Needs.of(planned), 0, settings)
    next(weight for weight in planned if not weight.sources.as_stored).sources.held_nbytes = 10_000_000
    assert within_limit(Needs.of(planned), 0, settings).resident_nbytes == before.resident_nbytes - 10_000_000


def test_the_order_of_outputs_does_not_matter_for_tiles(together):
    """Weights come in their natural order, whatever the outputs' own files."""
    outputs, _ = together("nf4_dq")
    names = [weight.name for weight in SharedWeights([output.steps() for output in outputs])]
    again = [weight.name for weight in SharedWeights([output.steps() for output in reversed(outputs)])]
    assert names == again and len(list(SharedWeights([outputs[0].steps()]))) == len(set(names))


def test_buffers_are_gone_after_the_loop(together):
    """At once, not when garbage is looked for: the next pass makes its own."""

    def buffers():
        return [
            t
            for t in gc.get_objects()
            if type(t) is torch.Tensor and t.dtype == torch.uint8 and t.numel() == nbytes
        ]

    outputs, settings = together("nf4_dq")
    planned = SharedWeights([output.steps() for output in outputs])
    memory = fit_memory(planned, 0, settings)
    nbytes = memory.tile_nbytes + 24  # like no other tensor
    gc.collect()
    gc.disable()
    try:
        merge(outputs, dataclasses.replace(memory, tile_nbytes=nbytes), torch.device("cpu"))
        assert buffers() == []
    finally:
        gc.enable()
