"""How much of an update was kept in all, where least, and what helps: the sums over a receipt, and what
convert says of them."""

import json
import math
import re
from itertools import pairwise

import build
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import lorafuse
from lorafuse.cli.show import percent, summary_text
from lorafuse.in_python import in_python
from lorafuse.receipt.read import ENOUGH_KEPT, kept_in_sum, worst_first
from lorafuse.settings import BaseQuant, Settings

FLOAT16 = "--dtype float16 keeps 3 more bits (an overflow ends the run), --dtype float32 keeps everything"
FLOAT32 = "--dtype float32 keeps everything"


def entry(kept, noise=0.1, dtype="bfloat16", action="merged", delta_norm=1.0):
    return {
        "action": action,
        "dtype": dtype,
        "shape": [1],
        "kept": kept,
        "noise": noise,
        "delta_norm": delta_norm,
    }


FIGURE = st.none() | st.floats(-10, 10) | st.integers(0, 1)  # the last ones for ties


@given(st.dictionaries(st.text(max_size=5), st.tuples(FIGURE, FIGURE), max_size=20))
def test_worst_first(figures):
    """By kept, and where that is equal by noise; what has no figure comes last, and what is not merged not at
    all."""
    tensors = {name: entry(*pair) for name, pair in figures.items()} | {"copied!": {"action": "copied"}}
    order = worst_first(tensors)
    assert sorted(order) == sorted(figures)
    for before, after in pairwise(order):
        (kept, noise), (next_kept, next_noise) = figures[before], figures[after]
        if kept is None:
            assert next_kept is None
        elif next_kept is not None:
            assert kept < next_kept or (kept == next_kept and (noise or 0) >= (next_noise or 0))


@given(st.integers(0, 2**32), st.integers(1, 5))
def test_sums_are_those_of_one_vector(seed, n):
    """kept and noise of all weights are those of the concatenated weights, in float64."""
    random = np.random.default_rng(seed)
    base, delta, stored, tensors = [], [], [], {}
    for i in range(n):
        W, D = random.standard_normal(50), random.standard_normal(50) * 10.0 ** random.integers(-4, 2)
        S = (W + D).astype(np.float16).astype(np.float64)
        figures = {"kept": (S - W) @ D / (D @ D), "noise": np.linalg.norm(S - W - D) / np.linalg.norm(D)}
        tensors[str(i)] = {"action": "merged", "dtype": "float16", "delta_norm": np.linalg.norm(D), **figures}
        base, delta, stored = [*base, W], [*delta, D], [*stored, S]
    W, D, S = (np.concatenate(parts) for parts in (base, delta, stored))
    update = kept_in_sum(tensors, {})
    assert update["kept"] == pytest.approx((S - W) @ D / (D @ D), rel=1e-9)
    assert update["noise"] == pytest.approx(np.linalg.norm(S - W - D) / np.linalg.norm(D), rel=1e-9)
    least = min(tensors, key=lambda name: tensors[name]["kept"])
    assert (update["least_in"], update["least"]) == (least, tensors[least]["kept"])
    assert update["n_below"] == sum(one["kept"] < 0.97 for one in tensors.values())


@pytest.mark.parametrize(
    ("tensors", "n_below", "remedy"),
    [
        ({"a": entry(0.5), "b": entry(0.4, dtype="float16")}, 2, FLOAT16),
        ({"a": entry(0.99), "b": entry(0.4, dtype="float16")}, 1, FLOAT32),
        ({"a": entry(0.5, dtype="float32")}, 1, None),
        ({"a": entry(ENOUGH_KEPT), "b": entry(1.2), "c": entry(None)}, 0, None),
        ({"a": entry(0.1, action="copied")}, 0, None),
    ],
)
def test_remedy(tensors, n_below, remedy):
    """By the dtypes that were written where too little is kept."""
    update = kept_in_sum(tensors, {})
    assert (update["n_below"], update["remedy"]) == (n_below, remedy)


ANEW = "--keep-dense PATTERN leaves modules in full precision, --format dense all of them"
OWN_GRID = "without --rounding nearest the update is kept on average"


@pytest.mark.parametrize(
    ("rounding", "settings", "n_below", "remedy"),
    [
        ("unbiased", {"format": "base"}, 0, None),
        ("nearest", {"format": "base", "rounding": "nearest"}, 1, OWN_GRID),
        ("nearest", {"format": "nf4", "rounding": "nearest", "base_quant": {"kind": "nf4"}}, 1, OWN_GRID),
        ("nearest", {"format": "nf4", "rounding": "nearest", "base_quant": {"kind": "int8"}}, 1, ANEW),
        ("nearest", {"format": "nf4", "rounding": "nearest"}, 1, ANEW),
        ("nearest", {"format": "w8a16"}, 1, ANEW),
    ],
)
def test_quantized_weights(rounding, settings, n_below, remedy):
    """Chance is an excuse only where it decided: `kept` of 100 elements without bias may be 0.3 less."""
    weight = entry(0.95, 0.9) | {"shape": [10, 10], "clipped": 0.0, "rounding": rounding}
    update = kept_in_sum({"a": weight}, settings)
    assert (update["n_below"], update["remedy"]) == (n_below, remedy)


@pytest.mark.parametrize("tensors", [{}, {"a": entry(None, None)}, {"a": entry(1.0, 0.0, delta_norm=0.0)}])
def test_nothing_to_sum(tensors):
    """No update, no figure."""
    update = kept_in_sum(tensors, {})
    assert (update["kept"], update["noise"]) == (None, None)


@pytest.mark.parametrize(
    ("share", "text"),
    [(1.0, "100.0%"), (0.99999, "99.9%"), (0.96999, "96.9%"), (-0.0006, "-0.1%"), (0, "0.0%")],
)
def test_percent(share, text):
    """Rounded down: 100% is everything, and what is less than 97% does not read 97%."""
    assert percent(share) == text


def merge(folder, scale, dtype):
    """The receipt of a merge, its events, and the summary that people see."""
    build.write_checkpoint(folder / "ckpt")
    build.write_adapter(folder / "adapter", build.adapter_tensors(build.checkpoint_tensors(), scale))
    events = []
    receipt = lorafuse.convert(
        folder / "ckpt", folder / "adapter", folder / "out", dtype=dtype, on_event=events.append
    )
    return receipt, events, summary_text(receipt, "base", ["my-adapter"])


@pytest.mark.parametrize(("dtype", "remedy"), [("bfloat16", FLOAT16), ("float16", FLOAT32)])
def test_small_update(tmp_path, dtype, remedy):
    """An update that a dtype cannot hold is said to be lost, where most, and what helps; float32 holds it."""
    scale = {"bfloat16": 0.01, "float16": 0.003}[dtype]
    receipt, events, text = merge(tmp_path / dtype, scale, dtype)
    merged = {name: one for name, one in receipt["tensors"].items() if one["action"] == "merged"}
    worst = min(merged, key=lambda name: merged[name]["kept"])
    n_below = sum(one["kept"] < 0.97 for one in merged.values())
    assert n_below > 1
    first, second = text.split("\n")
    share = f"{math.floor(merged[worst]['kept'] * 1000) / 10:.1f}%"
    assert first.startswith(
        f"Merged my-adapter into base (stored in full precision): 4 of 21 weights updated, {share} of the "
        "update kept where it is least; 13.3 KB in "
    )
    assert (
        second
        == f"{n_below} weights keep less than 97% of the update, {worst} the least ({share}): {remedy}."
    )
    update = {
        "kept": kept_in_sum(merged, {})["kept"],
        "least": merged[worst]["kept"],
        "least_in": worst,
        "remedy": in_python(remedy),
    }
    done = events[-1]
    assert {name: done["update"][name] for name in update} == update
    assert done["base_semantics"] == "stored in full precision"
    json.dumps(done)

    receipt, events, text = merge(tmp_path / "float32", scale, "float32")
    assert re.fullmatch(r"Merged .* 100\.0% of the update kept where it is least; [^\n]*", text)
    assert events[-1]["update"]["n_below"] == 0


def test_nothing_updated(tmp_path):
    """A merge that only replaces weights has nothing to say of an update."""
    build.write_checkpoint(tmp_path / "ckpt")
    norm = build.checkpoint_tensors()["model.norm.weight"]
    tensors = {"base_model.model.model.norm.weight": norm + 1}
    build.write_adapter(tmp_path / "adapter", tensors, peft_type="LN_TUNING", target_modules=["norm"])
    receipt = lorafuse.convert(tmp_path / "ckpt", tmp_path / "adapter", tmp_path / "out")
    text = summary_text(receipt, "base", ["my-adapter"])
    assert text.startswith("Merged my-adapter into base (stored): 0 of 21 weights updated; 13.3 KB in ")
    assert "\n" not in text


@pytest.mark.parametrize(
    ("kind", "targets", "words"),
    [
        ("nf4_dq", ["q_proj"], "stored in NF4, double-quantized, block size 64"),
        ("int8", ["q_proj"], "stored in int8"),
        ("bf16", ["q_proj"], "stored in full precision"),
        ("nf4", ["q_proj", "v_proj", "lm_head"], "stored in NF4, block size 64 and in full precision"),
    ],
)
def test_base_semantics(base, adapter, tmp_path, kind, targets, words):
    """The receipt says how the weights that are updated are stored, most of them first."""
    receipt = lorafuse.convert(base(kind), adapter(kind, target_modules=targets), tmp_path / "out")
    assert receipt["base_semantics"] == words


@pytest.mark.parametrize(
    "quant",
    [
        BaseQuant(kind="nf4", double_quant=False, blocksize=128, skip=("a", "b"), skip_version="4.30.0"),
        BaseQuant(kind="fp4", experts=True, skip=()),
        BaseQuant(kind="int8", stacked_experts=True),
    ],
)
def test_settings_come_back_from_a_receipt(quant):
    """What decides the bytes, so that `verify` makes the same."""
    settings = Settings(
        dtype="float16",
        adapter_scale=0.5,
        base_quant=quant,
        format="nf4",
        keep_dense=("x",),
        rounding="nearest",
    )
    said = json.loads(json.dumps(settings.that_decide_bytes))
    again = Settings.of_receipt(said, device="cpu", memory_nbytes=1)
    assert again.base_quant == quant and again.that_decide_bytes == settings.that_decide_bytes
