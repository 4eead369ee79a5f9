"""Several adapters into one output: W + Σ w_i (W'_i − W), against PEFT's unmerged models and sums in
float64."""

import itertools
import json
import os
import shutil
from contextlib import suppress

import moe_models
import peft
import pytest
import torch
from build import adapter_tensors, checkpoint_tensors, write_adapter, write_checkpoint
from models import LINEARS
from oracle import Truth, complaints, config, decode, read_adapter, read_tensors, truth
from peft_cases import CASES, Q_K_DOWN
from safetensors.torch import save_file
from trained import answers, assert_weights, load, weights_in_float64

import lorafuse
from lorafuse import cli
from lorafuse.adapters import open_adapter
from lorafuse.errors import AdapterError, OutDirError, UsageError
from lorafuse.files.checkpoint import Checkpoint
from lorafuse.files.local_folder import LocalFolder
from lorafuse.patches.factor import Factor
from lorafuse.patches.lowrank import LowRank
from lorafuse.patches.on_rows import OnRows
from lorafuse.patches.replace_rows import ReplaceRows
from lorafuse.patches.target import Part
from lorafuse.planning.combine import WeightedAdapter
from lorafuse.planning.make_plan import make_plan
from lorafuse.settings import Settings, parse_weighted

EMBED, HEAD = "model.embed_tokens.weight", "lm_head.weight"
Q = "model.layers.0.self_attn.q_proj.weight"


def model_bytes(path):
    return (path / "model.safetensors").read_bytes()


def stored_weights(ckpt):
    return {name: value for name, (value, _) in decode(ckpt).items()}


def slack(value, w):
    """The error of a sum of updates in fp32."""
    return 3e-6 * (value.abs() + w.abs()) + 1e-6 * w.abs().max()


# ---- values


@pytest.mark.parametrize("kind", ["fp32", "gpt2"])
def test_lora_is_what_peft_calls_cat(kind, base, tmp_path):
    """Other ranks, other modules, weights below zero: the merged model answers as PEFT's unmerged one."""
    from transformers import AutoModelForCausalLM

    targets = (
        {"a": ["c_attn", "c_fc"], "b": ["c_attn", "wte"]}
        if kind == "gpt2"
        else {"a": LINEARS, "b": ["q_proj", "embed_tokens"]}
    )
    model, weights = (
        AutoModelForCausalLM.from_pretrained(base(kind), dtype=torch.float32),
        {"a": 0.3, "b": -0.5},
    )
    if kind == "gpt2":  # tied: PEFT's model in memory is untied where the embedding alone is adapted
        model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().clone())
    torch.manual_seed(1)
    settings = [
        peft.LoraConfig(r=r, lora_alpha=8, target_modules=targets[name]) for name, r in (("a", 4), ("b", 6))
    ]
    wrapped = peft.get_peft_model(model, settings[0], adapter_name="a")
    wrapped.add_adapter("b", settings[1])
    with torch.no_grad():
        for name, p in wrapped.named_parameters():
            if "lora_" in name:
                p.add_(torch.randn_like(p) * 0.1)
    wrapped.save_pretrained(tmp_path, selected_adapters=["a", "b"], save_embedding_layers=False)
    wrapped.add_weighted_adapter(["a", "b"], [0.3, -0.5], "both", combination_type="cat")
    wrapped.set_adapter("both")
    out = tmp_path / "out"
    lorafuse.convert(
        base(kind), tmp_path / "a", out, adapter_scale=weights["a"], adapters=[(tmp_path / "b", weights["b"])]
    )
    merged, unmerged = answers(load(out)), answers(wrapped)
    assert (merged - unmerged).abs().max() < 1e-4
    lorafuse.convert(base(kind), tmp_path / "a", tmp_path / "one", adapter_scale=0.3)
    assert (answers(load(tmp_path / "one")) - unmerged).abs().max() > 1e-2


def summed(ckpt, *weighted):
    """The float64 truth of a weighted sum of LoRA adapters."""
    base = {name: value for name, (value, _) in decode(ckpt).items()}
    total = {name: Truth(value, dtype) for name, (value, dtype) in decode(ckpt).items()}
    for path, weight in weighted:
        for name, one in truth(ckpt, path, weight).items():
            if one.slack is not None:
                so_far = total[name]
                value = so_far.value + (one.value - base[name])
                slack = (
                    one.slack + (one.slack if so_far.slack is None else so_far.slack) + 2.0**-23 * value.abs()
                )
                total[name] = Truth(value, one.dtype, slack)
    return total


@pytest.mark.parametrize("dtype", ["auto", "float32"])
@pytest.mark.parametrize("kind", ["fp16", "nf4_dq", "int8", "gpt2_nf4"])
def test_the_sum_is_rounded_once(kind, dtype, base, adapter, tmp_path):
    modules = (
        (["c_attn", "c_fc"], ["c_attn", "c_proj"]) if "gpt2" in kind else (LINEARS, ["q_proj", "down_proj"])
    )
    one = adapter(kind, name="one", target_modules=modules[0], r=4, lora_bias=True)
    two = adapter(kind, name="two", target_modules=modules[1], r=7, lora_alpha=5)
    lorafuse.convert(
        base(kind), one, tmp_path / "out", adapters=[(two, -0.5), (one, 0.3)], adapter_scale=0.25, dtype=dtype
    )
    wanted = summed(base(kind), (one, 0.25), (two, -0.5), (one, 0.3))
    assert complaints(tmp_path / "out", wanted, dtype) == []


MIX = [("loha", 0.6), ("ia3", -0.5), ("oft", 0.3), ("hra", 1.5), ("miss_bat", -0.4)]


@pytest.mark.parametrize("kind", ["fp32", "nf4_dq"])
def test_types_may_be_mixed(kind, base, adapter, trained, tmp_path, monkeypatch):
    """Each W'_i is made from the base alone, though most of these types multiply the weight; here with tiles
    of a few rows."""
    lora = adapter(kind, name="lora", **Q_K_DOWN, r=4, lora_alpha=8)
    wanted = {name: [value.clone(), False] for name, (value, _) in decode(base(kind)).items()}
    for name, entry in truth(base(kind), lora, 0.7).items():
        wanted[name] = [entry.value, entry.slack is not None]
    paths = [(lora, 0.7)]
    for name, weight in MIX:
        path, formula = trained(name).adapter, CASES[name].formula
        paths.append((path, weight))
        for key, (value, changed) in weights_in_float64(base(kind), path, formula, weight).items():
            if changed:
                wanted[key] = [wanted[key][0] + (value - decode(base(kind))[key][0]), True]
    monkeypatch.setattr("lorafuse.planning.plan.TILE_NUMEL", 480)
    (first, scale), *others = paths
    lorafuse.convert(
        base(kind), first, tmp_path / "out", adapters=others, adapter_scale=scale, dtype="float32"
    )
    assert_weights(tmp_path / "out", wanted, stored_weights(base(kind)), slack)


@pytest.mark.parametrize("turn", [1, -1])
def test_a_type_that_reads_the_tile_goes_before_those_that_add(
    turn, base, adapter, trained, tmp_path, monkeypatch
):
    """Wherever the order of the sum puts it, so that one such adapter needs no copy of the tile."""
    ia3 = trained("ia3").adapter
    lora = adapter("fp32", name="lora", **Q_K_DOWN)
    monkeypatch.setattr("lorafuse.planning.make_plan.in_order", lambda adapters: list(adapters)[::turn])
    lorafuse.convert(base("fp32"), lora, tmp_path / "out", adapters=[ia3])
    stored = stored_weights(base("fp32"))
    wanted = weights_in_float64(base("fp32"), ia3, CASES["ia3"].formula)
    for name, entry in truth(base("fp32"), lora).items():
        if entry.slack is not None:
            wanted[name][0] = wanted[name][0] + (entry.value - stored[name])
    assert_weights(tmp_path / "out", wanted, stored, slack)


def test_parts_of_joined_weights_add_as_what_is_placed_there(tmp_path):
    factors = adapter_tensors(checkpoint_tensors())
    lora = open_adapter(LocalFolder(write_adapter(tmp_path / "lora", factors)))
    key = f"base_model.model.{Q.removesuffix('.weight')}"
    low_rank = LowRank(
        Factor(lora.store, f"{key}.lora_B.weight"), Factor(lora.store, f"{key}.lora_A.weight"), 1.0
    )
    rows = ReplaceRows(Factor(lora.store, f"{key}.lora_B.weight"), range(16), 1.0)
    assert [OnRows(patch, Part("w", 16)).traits.additive for patch in (low_rank, rows)] == [True, False]


def test_dora_is_summed_with_others(base, adapter, tmp_path):
    """Each norm is of the base and its own update; the single merges are PEFT's by the tests of each type."""
    settings = [({"use_dora": True, "r": 3}, 0.4), ({"use_dora": True, "r": 5}, -0.3), ({"r": 4}, 0.7)]
    settings.append(({"init_lora_weights": "pissa", "r": 6}, 1.0))
    paths = [
        (adapter("fp32", name=f"{i}", target_modules=LINEARS, **given), w)
        for i, (given, w) in enumerate(settings)
    ]
    stored = {name: value for name, (value, _) in decode(base("fp32")).items()}
    wanted = {name: [value.clone(), False] for name, value in stored.items()}
    for i, (path, weight) in enumerate(paths):
        lorafuse.convert(base("fp32"), path, tmp_path / f"only{i}")
        for name, value in read_tensors(tmp_path / f"only{i}").items():
            wanted[name][0] += weight * (value.double() - stored[name])
            wanted[name][1] |= not torch.equal(value.double(), stored[name])
    (first, scale), *others = paths
    lorafuse.convert(base("fp32"), first, tmp_path / "out", adapters=others, adapter_scale=scale)
    assert_weights(tmp_path / "out", wanted, stored, slack)


@pytest.mark.parametrize("name", ["ia3", "loha"])
def test_the_same_adapter_twice_adds_its_weights(name, base, trained, tmp_path):
    path = trained(name).adapter
    lorafuse.convert(base("fp32"), path, tmp_path / "out", adapters=[path, (path, -0.3)])
    wanted = weights_in_float64(base("fp32"), path, CASES[name].formula, 1.7)
    assert_weights(tmp_path / "out", wanted, stored_weights(base("fp32")), slack)


def test_a_weight_of_zero_adds_nothing(base, adapter, tmp_path):
    one, two = (
        adapter("bf16", name=name, target_modules=["q_proj"], r=r) for name, r in (("one", 4), ("two", 5))
    )
    lorafuse.convert(base("bf16"), one, tmp_path / "out", adapters=[(two, 0)])
    lorafuse.convert(base("bf16"), one, tmp_path / "alone")
    assert model_bytes(tmp_path / "out") == model_bytes(tmp_path / "alone")


def test_experts_are_summed(tmp_path, monkeypatch):
    """LoRA on a stack of experts' matrices, from two adapters, beside a single layer's."""
    torch.manual_seed(0)
    moe_models.MODELS["gpt_oss"]().save_pretrained(tmp_path / "moe")
    for i, targets in enumerate((moe_models.BOTH, moe_models.BOTH[1:])):
        moe_models.train(
            tmp_path / "moe", tmp_path / f"{i}", target_parameters=targets, target_modules=["o_proj"], r=2 + i
        )
        lorafuse.convert(tmp_path / "moe", tmp_path / f"{i}", tmp_path / f"only{i}")
    lorafuse.convert(tmp_path / "moe", tmp_path / "0", tmp_path / "out", adapters=[(tmp_path / "1", -0.5)])
    plan = plan_of(tmp_path / "moe", tmp_path / "0", tmp_path / "1")
    assert all(patch.traits.additive for step in plan.steps for patch in step.patches), "no tile is copied"
    stored, zero, one, both = (read_tensors(tmp_path / name) for name in ("moe", "only0", "only1", "out"))
    changed = [name for name in stored if not torch.equal(stored[name], one[name])]
    assert any("experts" in name for name in changed)
    for name in stored:
        value = zero[name].double() - 0.5 * (one[name].double() - stored[name].double())
        assert (both[name].double() - value).abs().max() < 1e-5
    assert (
        moe_models.logits(moe_models.load(tmp_path / "out"))
        - moe_models.logits(moe_models.load(tmp_path / "only0"))
    ).abs().max() > 1e-4


# ---- the order


@pytest.fixture
def three(base, adapter, trained, tmp_path):
    """Adapters whose fp32 sum depends on its order, one of them no LoRA; two have the same config and
    shapes."""
    paths = [
        (adapter("fp32", name="one", target_modules=LINEARS), 0.3),
        (trained("ia3").adapter, -0.5),
    ]
    shutil.copytree(paths[0][0], tmp_path / "two")
    tensors = {key: t * 1.01 for key, t in read_adapter(paths[0][0]).items()}
    save_file(tensors, tmp_path / "two/adapter_model.safetensors")
    return [*paths, (tmp_path / "two", 0.7)]


def test_no_order_changes_a_byte(base, three, tmp_path):
    """Nor does the role: the first adapter's weight is --adapter-scale. Nor do names of directories."""
    found = set()
    for i, ((first, scale), *others) in enumerate(itertools.permutations(three)):
        copy = tmp_path / "copies" / f"{9 - i}"
        shutil.copytree(first, copy)
        lorafuse.convert(base("fp32"), copy, tmp_path / f"out{i}", adapters=others, adapter_scale=scale)
        found.add(model_bytes(tmp_path / f"out{i}"))
    assert len(found) == 1


def test_the_plan_id_covers_all_adapters_in_any_order(base, three, tmp_path):
    def plan_id(first, *others):
        return lorafuse.convert(base("fp32"), first[0], tmp_path / "out", adapters=others, dry_run=True)[
            "plan_id"
        ]

    a, b, c = three
    assert plan_id(a, b, c) == plan_id(a, c, b)
    other = (c[0], 0.71)
    assert len({plan_id(a), plan_id(a, b), plan_id(a, b, c), plan_id(a, b, other), plan_id(a, b, a)}) == 5


def test_threads_and_memory_change_no_byte(base, three, tmp_path, monkeypatch):
    monkeypatch.setattr("lorafuse.planning.plan.TILE_NUMEL", 1000)
    (first, _), *others = three
    for n, limit in ((1, "40MB"), (5, "1GB")):
        monkeypatch.setattr(os, "sched_getaffinity", lambda _, n=n: set(range(n)))
        lorafuse.convert(base("nf4_dq"), first, tmp_path / f"{n}", adapters=others, memory_limit=limit)
    assert model_bytes(tmp_path / "1") == model_bytes(tmp_path / "5")


def test_the_tokenizer_is_that_of_the_first(base, three, tmp_path):
    one, two = three[0][0], three[2][0]
    for path in (one, two):
        (path / "tokenizer.json").write_text(json.dumps({"of": path.name}))
    lorafuse.convert(base("fp32"), two, tmp_path / "out", adapters=[one])
    assert config(tmp_path / "out", "tokenizer.json") == {"of": "two"}


# ---- what is held whole


def whole(path, *, lora=("q_proj",), tensors=None, **held):
    """An adapter of tests/build.py with LoRA on some modules, and parameters saved whole."""
    factors = adapter_tensors(checkpoint_tensors())
    tensors = {key: t for key, t in factors.items() if any(name in key for name in lora)} | (tensors or {})
    names = {"norm": "model.norm.weight", "head": HEAD, "q": Q, "embed": EMBED}
    return write_adapter(path, tensors | {f"base_model.model.{names[name]}": t for name, t in held.items()})


@pytest.fixture
def ckpt(tmp_path):
    return write_checkpoint(tmp_path / "ckpt")


def refused(ckpt, one, two, tmp_path, **options):
    """The text of the refusal, which comes before anything is written."""
    with pytest.raises(AdapterError) as caught:
        lorafuse.convert(ckpt, one, tmp_path / "work" / "out", adapters=[two], **options)
    assert not (tmp_path / "work").exists()
    return str(caught.value)


def test_what_two_adapters_hold_alike_is_taken_once(ckpt, tmp_path):
    new = torch.full((16,), 3.25)
    one, two = whole(tmp_path / "one", norm=new), whole(tmp_path / "two", norm=new, lora=["down_proj"])
    receipt = lorafuse.convert(ckpt, one, tmp_path / "out", adapters=[two])
    assert receipt["tensors"]["model.norm.weight"]["action"] == "replaced"
    assert torch.equal(read_tensors(tmp_path / "out")["model.norm.weight"], new.bfloat16())


def test_what_two_adapters_hold_differently_is_refused(ckpt, tmp_path):
    """PEFT's add_weighted_adapter refuses it too."""
    one, two = (
        whole(tmp_path / "one", norm=torch.ones(16)),
        whole(tmp_path / "two", norm=torch.full((16,), 2.0)),
    )
    text = refused(ckpt, one, two, tmp_path)
    key = "base_model.model.model.norm.weight"
    files = [f"{path}/adapter_model.safetensors" for path in (one, two)]
    rest = (
        f": both hold model.norm.weight whole ({key}, {key}), with different values, which have no sum; "
        "leave one of the two "
    )
    rest += "adapters out."
    assert text in (f"{files[0]} and {files[1]}{rest}", f"{files[1]} and {files[0]}{rest}")


def test_an_update_is_added_to_what_another_adapter_holds(ckpt, tmp_path):
    """W + (R − W) + w Δ; the weight of an adapter does not change what it holds whole, and that is said."""
    new = torch.randn(16, 16)
    one, two, said = (
        whole(tmp_path / "one", q=new, lora=["down_proj"]),
        whole(tmp_path / "two", lora=["q_proj"]),
        [],
    )
    lorafuse.convert(
        ckpt,
        two,
        tmp_path / "out",
        adapters=[(one, 0.5)],
        adapter_scale=0.3,
        dtype="float32",
        on_event=said.append,
    )
    factors = read_adapter(two)
    a, b = (factors[f"base_model.model.{Q.removesuffix('.weight')}.lora_{x}.weight"].double() for x in "AB")
    value = new.double() + 0.3 * 2 * b @ a
    assert (read_tensors(tmp_path / "out")[Q].double() - value).abs().max() < 1e-5
    assert [e["message"] for e in said if e["event"] == "warning" and "whole" in e["message"]] == [
        f"{one}/adapter_model.safetensors: holds {Q} whole, which a weight of 0.5 does not change."
    ]


def test_a_rescaling_of_what_another_adapter_holds_is_refused(base, trained, tmp_path):
    ia3 = trained("ia3").adapter
    one = write_adapter(tmp_path / "one", {f"base_model.model.{Q}": torch.ones(64, 64)})
    key = f"base_model.model.{Q.removesuffix('.weight')}.ia3_l"
    assert refused(base("fp32"), one, ia3, tmp_path) == (
        f"{ia3}/adapter_model.safetensors: {key} changes {Q} in a way that depends on its values, but "
        f"{one}/adapter_model.safetensors holds other values of it; leave one of the two adapters out."
    )


def test_a_resized_vocabulary_is_taken_if_no_other_adapter_minds(ckpt, tmp_path):
    new = {"embed": torch.randn(40, 16), "head": torch.randn(40, 16)}
    one, two, same = (
        whole(tmp_path / "one", **new),
        whole(tmp_path / "two"),
        whole(tmp_path / "same", lora=["down_proj"], **new),
    )
    lorafuse.convert(ckpt, two, tmp_path / "out", adapters=[one, same])
    assert config(tmp_path / "out")["vocab_size"] == 40
    assert torch.equal(read_tensors(tmp_path / "out")[EMBED], new["embed"].bfloat16())
    key = "base_model.model.lm_head"
    factors = {f"{key}.lora_A.weight": torch.randn(4, 16), f"{key}.lora_B.weight": torch.randn(32, 4)}
    three = whole(tmp_path / "three", tensors=factors)
    assert refused(ckpt, one, three, tmp_path) == (
        f"{three}/adapter_model.safetensors: {key}.lora_A.weight updates {HEAD} [32, 16], which "
        f"{one}/adapter_model.safetensors resizes to [40, 16]; leave one of the two adapters out."
    )
    other = whole(tmp_path / "other", embed=torch.randn(32, 16))
    assert f"both hold {EMBED} whole" in refused(ckpt, one, other, tmp_path)


def test_a_vocabulary_that_two_adapters_resize_in_part_is_refused(ckpt, tmp_path):
    one, two = whole(tmp_path / "one", embed=torch.randn(40, 16)), whole(tmp_path / "two")
    text = refused(ckpt, one, two, tmp_path)
    assert "resizes the vocabulary on one side only" in text and str(one) in text


# ---- the model: replicated layers, new heads


def on_layers(path, layers, seed, **fields):
    """LoRA on q_proj of those layers."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for i in layers:
        key = f"base_model.model.model.layers.{i}.self_attn.q_proj"
        tensors[f"{key}.lora_A.weight"] = torch.randn(4, 16, generator=generator) * 0.1
        tensors[f"{key}.lora_B.weight"] = torch.randn(16, 4, generator=generator) * 0.1
    return write_adapter(path, tensors, **fields)


def test_copies_of_layers_are_summed_if_all_adapters_make_them(ckpt, tmp_path):
    pairs = [[0, 2], [0, 1], [1, 2]]
    one, two = (on_layers(tmp_path / f"{i}", range(4), i, layer_replication=pairs) for i in range(2))
    for path, out in ((one, "one"), (two, "two")):
        lorafuse.convert(ckpt, path, tmp_path / out, dtype="float32")
    lorafuse.convert(ckpt, one, tmp_path / "out", adapters=[(two, -0.5)], dtype="float32")
    assert config(tmp_path / "out")["num_hidden_layers"] == 4
    stored, first, second, found = (
        read_tensors(path) for path in (ckpt, *(tmp_path / name for name in ("one", "two", "out")))
    )
    for new, old in enumerate([0, 1, 0, 1]):
        name, w = (
            f"model.layers.{new}.self_attn.q_proj.weight",
            stored[f"model.layers.{old}.self_attn.q_proj.weight"].double(),
        )
        value = first[name].double() - 0.5 * (second[name].double() - w)
        assert (found[name].double() - value).abs().max() < 1e-5 < (value - first[name].double()).abs().max()


def test_adapters_that_count_layers_differently_are_refused(ckpt, tmp_path):
    one, two = (
        on_layers(tmp_path / "one", range(4), 0, layer_replication=[[0, 2], [0, 2]]),
        on_layers(tmp_path / "two", [0], 1),
    )
    texts = [
        f"{a}/adapter_config.json and {b}/adapter_config.json: layer_replication is {x} and {y}; the "
        "adapters are for different models."
        for (a, x), (b, y) in itertools.permutations([(one, "[[0, 2], [0, 2]]"), (two, None)])
    ]
    assert refused(ckpt, one, two, tmp_path) in texts


def test_a_head_that_one_adapter_brings_is_added(ckpt, tmp_path):
    """The other was trained on the checkpoint's own class; what both do to the layers is summed."""
    score = {"base_model.model.score.weight": torch.randn(3, 16)}
    factors = read_adapter(on_layers(tmp_path / "factors", [0], 0))
    one = write_adapter(tmp_path / "one", factors | score, task_type="SEQ_CLS")
    same = write_adapter(tmp_path / "same", score, task_type="SEQ_CLS")
    two = on_layers(tmp_path / "two", [0, 1], 1)
    receipt = lorafuse.convert(ckpt, two, tmp_path / "out", adapters=[(one, 0.5), same])
    assert config(tmp_path / "out")["architectures"] == ["LlamaForSequenceClassification"]
    assert (
        receipt["tensors"]["score.weight"]["action"] == "added" and len(receipt["tensors"][Q]["updates"]) == 2
    )
    assert torch.equal(read_tensors(tmp_path / "out")["score.weight"], score["base_model.model.score.weight"])
    assert receipt["adapter_tensors"]["used"] == sorted(
        f"{path}: {key}" for path in (one, same, two) for key in read_adapter(path)
    )
    other = write_adapter(tmp_path / "other", {key: t + 1 for key, t in score.items()}, task_type="SEQ_CLS")
    assert refused(ckpt, one, other, tmp_path).endswith(
        ": bring different heads, score.weight and score.weight, which have no sum; leave one of the two "
        "adapters out."
    )
    key = "base_model.model.score"
    headless = {f"{key}.lora_A.weight": torch.ones(4, 16), f"{key}.lora_B.weight": torch.ones(3, 4)}
    three = write_adapter(tmp_path / "three", headless)
    assert refused(ckpt, one, three, tmp_path) == (
        f"{three}/adapter_model.safetensors: {key}.lora_A.weight changes score.weight, which neither the "
        "checkpoint nor this adapter holds."
    )


# ---- tied embeddings


def test_rows_of_a_tied_embedding_are_summed_and_it_stays_tied(base, adapter, tmp_path):
    """Trained tokens are new rows; each adapter's update is what it changes of the row."""
    one = adapter("fp32_tied", name="one", target_modules=["q_proj"], trainable_token_indices=[3, 90, 7])
    two = adapter("fp32_tied", name="two", target_modules=["q_proj"], trainable_token_indices=[8, 90], r=5)
    lorafuse.convert(base("fp32_tied"), one, tmp_path / "out", adapters=[(two, 0.5)])
    w = read_tensors(base("fp32_tied"))[EMBED].double()
    wanted = w.clone()
    for path, indices, weight in ((one, [3, 90, 7], 1), (two, [8, 90], 0.5)):
        rows = next(t for key, t in read_adapter(path).items() if "trainable_tokens" in key).double()
        wanted[indices] += weight * (rows - w[indices])
    found = read_tensors(tmp_path / "out")
    assert config(tmp_path / "out")["tie_word_embeddings"] and HEAD not in found
    assert (found[EMBED].double() - wanted).abs().max() < 1e-6
    untouched = [i for i in range(96) if i not in (3, 7, 8, 90)]
    assert torch.equal(found[EMBED][untouched].double(), w[untouched])


@pytest.mark.parametrize(
    ("targets", "tying", "tied"),
    [
        ((["embed_tokens", "lm_head"], ["embed_tokens", "lm_head"]), (True, True), True),
        ((["embed_tokens", "lm_head"], ["embed_tokens"]), (True, False), False),
        ((["embed_tokens", "lm_head"], ["q_proj"]), (True, False), True),
        ((["embed_tokens"], ["lm_head"]), (False, False), False),
    ],
)
def test_a_tied_pair_is_tied_as_long_as_all_adapters_keep_it(targets, tying, tied, base, adapter, tmp_path):
    one, two = (
        adapter("fp32_tied", name=f"{i}", target_modules=t, ensure_weight_tying=k, r=4 + i)
        for i, (t, k) in enumerate(zip(targets, tying, strict=True))
    )
    for path, out in ((one, "one"), (two, "two")):
        lorafuse.convert(base("fp32_tied"), path, tmp_path / out)
    receipt = lorafuse.convert(base("fp32_tied"), one, tmp_path / "out", adapters=[(two, -0.5)])
    stored, found, first, second = (
        read_tensors(p) for p in (base("fp32_tied"), *(tmp_path / n for n in ("out", "one", "two")))
    )
    assert config(tmp_path / "out")["tie_word_embeddings"] is tied and (HEAD in found) is not tied
    for name in found:
        w = stored[EMBED if name == HEAD else name].double()
        a, b = (each.get(name, each[EMBED if name == HEAD else name]).double() for each in (first, second))
        assert (found[name].double() - (a - 0.5 * (b - w))).abs().max() < 1e-5, name
    named = {f"{path}: {key}" for path in (one, two) for key in read_adapter(path)}
    assert {*receipt["adapter_tensors"]["used"], *receipt["adapter_tensors"]["ignored"]} == named


def test_a_pair_that_an_adapter_ties_is_tied_when_one_side_is_in_the_file(base, adapter, tmp_path):
    one, two = (
        adapter(
            "fp32_tied",
            name=f"{r}",
            target_modules=["embed_tokens", "lm_head"],
            ensure_weight_tying=True,
            r=r,
        )
        for r in (4, 5)
    )
    for path, side in ((one, "lm_head"), (two, "embed_tokens")):
        save_file(
            {key: t for key, t in read_adapter(path).items() if side not in key},
            path / "adapter_model.safetensors",
        )
    lorafuse.convert(base("fp32_tied"), one, tmp_path / "out", adapters=[(two, -0.5)])
    assert config(tmp_path / "out")["tie_word_embeddings"] and HEAD not in read_tensors(tmp_path / "out")


# ---- memory


def plan_of(ckpt, *paths, **settings):
    adapters = [WeightedAdapter(open_adapter(LocalFolder(path)), 1.0) for path in paths]
    return make_plan(Checkpoint(LocalFolder(ckpt)), adapters, Settings(**settings))


def test_the_plan_counts_what_all_adapters_hold(base, adapter, trained, tmp_path):
    """Adapters loaded whole, the factors of a weight, and the copies of a tile for types that do more than
    add."""
    one, two = (adapter("nf4_dq", name=name, target_modules=["q_proj"], r=4) for name in ("one", "two"))
    # As torch before 1.6 wrote it: not read by ranges.
    torch.save(read_adapter(two), two / "adapter_model.bin", _use_new_zipfile_serialization=False)
    (two / "adapter_model.safetensors").unlink()
    alone, both, thrice = (plan_of(base("nf4_dq"), *paths) for paths in ((one,), (one, two), (one, two, two)))
    held = (two / "adapter_model.bin").stat().st_size
    assert (
        thrice.memory.resident_nbytes
        <= both.memory.resident_nbytes - held
        <= alone.memory.resident_nbytes - 2 * held
    )
    steps = [next(s for s in plan.steps if s.name == Q) for plan in (alone, thrice)]
    assert (
        steps[1].resident_nbytes == 3 * steps[0].resident_nbytes
        and steps[1].worker_nbytes == steps[0].worker_nbytes
    )
    ia3 = trained("ia3").adapter
    mixed, twice = (
        next(s for s in plan_of(base("nf4_dq"), *paths).steps if s.name == Q)
        for paths in ((ia3, one), (ia3, one, ia3))
    )
    assert (mixed.worker_nbytes - steps[0].worker_nbytes, twice.worker_nbytes - mixed.worker_nbytes) == (
        0,
        8 * 64 * 64,
    )


def test_factors_that_do_not_fit_together_are_read_in_parts(tmp_path):
    """Each right factor of 48 MB fits the limit, both do not; the bytes are those of a run that holds
    both."""
    torch.manual_seed(0)
    ckpt = tmp_path / "ckpt"
    ckpt.mkdir()
    save_file({"a.weight": torch.randn(64, 30000).bfloat16()}, ckpt / "model.safetensors")
    (ckpt / "config.json").write_text('{"model_type": "llama", "architectures": ["LlamaModel"]}')
    for name in ("one", "two"):
        factors = {"a.lora_A.weight": torch.randn(400, 30000), "a.lora_B.weight": torch.randn(64, 400)}
        write_adapter(
            tmp_path / name, {f"base_model.model.{key}": t for key, t in factors.items()}, r=400, lora_alpha=9
        )
    small = plan_of(ckpt, tmp_path / "one", tmp_path / "two")
    (step,) = small.steps
    assert sorted(patch.right_resident for patch in step.patches[0].patches) == [False, True]
    fits = []
    for megabytes in range(30, 140):
        with suppress(UsageError):
            plan_of(ckpt, tmp_path / "one", tmp_path / "two", memory_nbytes=megabytes * 10**6, n_threads=1)
            fits.append(megabytes)
    assert fits == list(range(fits[0], 140)), "a larger limit fits whatever a smaller one does"
    for limit in ("100MB", "1GB"):
        lorafuse.convert(
            ckpt, tmp_path / "one", tmp_path / limit, adapters=[tmp_path / "two"], memory_limit=limit
        )
    assert model_bytes(tmp_path / "100MB") == model_bytes(tmp_path / "1GB")


# ---- names and weights


@pytest.mark.parametrize(
    ("text", "path", "weight"),
    [
        ("a", "a", 1.0),
        ("a:0.5", "a", 0.5),
        ("a:-.5", "a", -0.5),
        ("a:+2", "a", 2.0),
        ("a:1e-3", "a", 0.001),
        ("a:0", "a", 0.0),
        ("org/name@v2:0.3", "org/name@v2", 0.3),
        ("org/name@refs/pr/3", "org/name@refs/pr/3", 1.0),
        ("/x:y/a", "/x:y/a", 1.0),
        ("/x:y/a:2", "/x:y/a", 2.0),
        (r"C:\lora\a", r"C:\lora\a", 1.0),
        ("C:/lora/a", "C:/lora/a", 1.0),
        ("C:/lora/a:-1", "C:/lora/a", -1.0),
        ("here:0.5", "here:0.5", 1.0),
        ("here:0.5:0.25", "here:0.5", 0.25),
    ],
)
def test_a_weight_follows_the_last_colon(text, path, weight, tmp_path, monkeypatch):
    """Unless a directory has the whole name."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "here:0.5").mkdir()
    assert parse_weighted(text) == (path, weight)


@pytest.mark.parametrize("weight", ["nan", "inf", "-inf", "1e999", "x", "", "1_0", " 1", "0x1", "0,5"])
def test_a_weight_that_is_none_is_refused(weight, ckpt, tmp_path, capsys):
    one = whole(tmp_path / "one")
    with pytest.raises(SystemExit) as exited:
        cli.convert.main([str(ckpt), str(one), str(tmp_path / "out"), "--adapter", f"{one}:{weight}"])
    assert exited.value.code == 2
    assert "'--adapter': " in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_the_texts_of_bad_weights():
    with pytest.raises(UsageError) as caught:
        parse_weighted("my:x")
    assert (
        str(caught.value) == "my:x: 'x' is no weight; expected PATH or PATH:WEIGHT, such as my-adapter:0.5."
    )
    with pytest.raises(UsageError) as caught:
        parse_weighted("my:nan")
    assert str(caught.value) == "The weight of my is nan; expected a finite number."


@pytest.mark.parametrize("weight", [float("nan"), float("inf"), "0.5", None, True])
def test_a_weight_in_python_is_a_finite_number(weight, ckpt, tmp_path):
    one = whole(tmp_path / "one")
    with pytest.raises(UsageError, match="expected a finite number"):
        lorafuse.convert(ckpt, one, tmp_path / "out", adapters=[(one, weight)])


def test_the_command_line_and_python_do_the_same(ckpt, tmp_path, capsys):
    one, two, three = (
        whole(tmp_path / "one"),
        whole(tmp_path / "tw:o", lora=["down_proj"]),
        whole(tmp_path / "three"),
    )
    command = [
        str(ckpt),
        str(one),
        str(tmp_path / "out"),
        "--adapter",
        f"{two}:-0.5",
        "--adapter",
        str(three),
        "-v",
    ]
    with pytest.raises(SystemExit) as exited:
        cli.convert.main([*command, "--adapter-scale", "0.3"])
    assert exited.value.code == 0
    err = capsys.readouterr().err
    assert (
        f"Merged {one}, {two}, {three} into {ckpt} (stored in full precision): 4 of 21 weights updated" in err
    )
    assert f"merged   {Q}  updates 2" in err
    lorafuse.convert(ckpt, one, tmp_path / "again", adapters=[(two, -0.5), three], adapter_scale=0.3)
    assert model_bytes(tmp_path / "out") == model_bytes(tmp_path / "again")


def test_an_adapter_from_the_hub_may_have_a_weight(ckpt, tmp_path, hub, capsys):
    one = whole(tmp_path / "one")
    hub.add("some-org/name", one, "v2")
    with pytest.raises(SystemExit) as exited:
        cli.convert.main([str(ckpt), str(one), str(tmp_path / "out"), "--adapter", "some-org/name@v2:0.3"])
    assert exited.value.code == 0
    receipt = config(tmp_path / "out", "lorafuse_receipt.json")
    assert receipt["inputs"][-1]["path"] == "some-org/name@v2/adapter_model.safetensors"
    assert receipt["inputs"][-1]["weight"] == 0.3


def test_the_output_may_not_touch_any_adapter(ckpt, tmp_path):
    one, two = whole(tmp_path / "one"), whole(tmp_path / "two")
    with pytest.raises(OutDirError, match="lies inside the input"):
        lorafuse.convert(ckpt, one, two / "out", adapters=[two])


def test_what_is_wrong_names_its_adapter(ckpt, tmp_path):
    good, bad, said = (
        whole(tmp_path / "good"),
        whole(tmp_path / "bad", tensors={"base_model.model.no.lora_A.weight": torch.ones(4, 16)}),
        [],
    )
    assert refused(ckpt, good, bad, tmp_path).startswith(f"{bad}/adapter_model.safetensors: ")
    odd = write_adapter(tmp_path / "odd", r=16)
    lorafuse.convert(ckpt, good, tmp_path / "out", adapters=[odd], on_event=said.append)
    warnings = [event["message"] for event in said if event["event"] == "warning"]
    assert warnings and all(text.startswith(f"{odd}/") for text in warnings)


# ---- the receipt


def test_the_receipt_lists_all_adapters(ckpt, tmp_path):
    one, two = whole(tmp_path / "one"), whole(tmp_path / "two", lora=["q_proj", "down_proj"])
    receipt = lorafuse.convert(ckpt, one, tmp_path / "out", adapters=[(two, -0.5)], adapter_scale=0.3)
    assert receipt == config(tmp_path / "out", "lorafuse_receipt.json")
    files = ("adapter_config.json", "adapter_model.safetensors")
    listed = [(entry["path"], entry["weight"]) for entry in receipt["inputs"] if entry["role"] == "adapter"]
    assert listed == [
        (f"{path}/{file}", weight) for path, weight in ((one, 0.3), (two, -0.5)) for file in files
    ]
    assert receipt["adapter_tensors"]["used"] == sorted(
        f"{path}: {key}" for path in (one, two) for key in read_adapter(path)
    )
    entry = receipt["tensors"][Q]
    facts = [{"adapter": str(one), "rank": 4, "scale": 0.6}, {"adapter": str(two), "rank": 4, "scale": -1.0}]
    assert sorted(entry["updates"], key=lambda fact: fact["adapter"]) == facts
    assert "rank" not in entry and entry["kept"] > 0.5
    single = receipt["tensors"]["model.layers.0.mlp.down_proj.weight"]
    assert (single["rank"], single["scale"]) == (4, -1.0) and "updates" not in single


def test_with_one_adapter_the_receipt_is_as_ever(ckpt, tmp_path):
    receipt = lorafuse.convert(ckpt, whole(tmp_path / "one"), tmp_path / "out", adapter_scale=0.3)
    assert all(set(entry) == {"role", "path", "size", "sha256"} for entry in receipt["inputs"])
    assert all(name.startswith("base_model.model.") for name in receipt["adapter_tensors"]["used"])
