"""`lorafuse verify`: what it finds in a merged directory, and what it says."""

import hashlib
import json
import os
import shutil
import struct

import pytest
import torch
from click.testing import CliRunner
from models import LINEARS
from safetensors.torch import load_file, save_file

import lorafuse
from lorafuse import cli
from lorafuse.errors import ResultError, UsageError


@pytest.fixture
def merged(base, adapter, tmp_path):
    """(checkpoint, adapter, OUT_DIR of several shards)."""
    ckpt, lora = base("nf4_dq"), adapter("nf4_dq", target_modules=LINEARS)
    lorafuse.convert(ckpt, lora, tmp_path / "out", max_shard_size="100KB")
    return ckpt, lora, tmp_path / "out"


def flip(path, at):
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)


def forge(out, path):
    """Let the receipt say that a file is as it is now."""
    receipt = json.loads((out / "lorafuse_receipt.json").read_text())
    (entry,) = (e for e in receipt["outputs"] if e["file"] == path.name)
    entry |= {"size": path.stat().st_size, "sha256": hashlib.sha256(path.read_bytes()).hexdigest()}
    (out / "lorafuse_receipt.json").write_text(json.dumps(receipt))


def test_a_merged_directory_is_as_its_receipt_says(merged):
    ckpt, lora, out = merged
    before = {path: path.read_bytes() for path in out.iterdir()}
    checked = lorafuse.verify(out)
    assert checked["files"] == len(before) - 1 and checked["weights"] == 0
    assert checked["nbytes"] == sum(
        len(data) for path, data in before.items() if path.name != "lorafuse_receipt.json"
    )
    n_weights = len(json.loads((out / "lorafuse_receipt.json").read_text())["tensors"])
    assert lorafuse.verify(out, ckpt=ckpt, adapters=[lora])["weights"] == n_weights
    assert lorafuse.verify(out, ckpt=ckpt, adapters=[lora], sample=3)["weights"] == 3
    assert {path: path.read_bytes() for path in out.iterdir()} == before


def test_a_config_without_a_model_type(base, adapter, tmp_path):
    """As the checkpoint has it, so has the result."""
    ckpt, lora = tmp_path / "ckpt", adapter("nf4", target_modules=LINEARS)
    shutil.copytree(base("nf4"), ckpt)
    config = json.loads((ckpt / "config.json").read_text())
    del config["model_type"]
    (ckpt / "config.json").write_text(json.dumps(config))
    for form in ("dense", "base"):
        lorafuse.convert(ckpt, lora, tmp_path / form, format=form)
        assert lorafuse.verify(tmp_path / form, ckpt=ckpt, adapters=[lora])["weights"] > 0


@pytest.mark.parametrize(("form", "says"), [("dense", "speaks of"), ("base", "says nothing of")])
def test_a_config_that_was_forged(form, says, base, adapter, tmp_path):
    lorafuse.convert(base("nf4"), adapter("nf4"), tmp_path / "out", format=form)
    path = tmp_path / "out" / "config.json"
    config = json.loads(path.read_text())
    section = config.pop("quantization_config", {"quant_method": "bitsandbytes", "load_in_4bit": True})
    config |= {"quantization_config": section} if form == "dense" else {}
    path.write_text(json.dumps(config))
    forge(tmp_path / "out", path)
    with pytest.raises(ResultError, match=rf"config\.json: {says} a quantization, which is not as the"):
        lorafuse.verify(tmp_path / "out")


SHARD = "model-00001-of-00003.safetensors"


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (lambda out: flip(out / SHARD, -1),
         rf"{SHARD}: was changed: its sha256 is \w{{64}}, the receipt says \w{{64}}\."),
        (lambda out: flip(out / "config.json", 3), r"config\.json: was changed: its sha256"),
        (lambda out: (out / "config.json").write_text("{}"),
         r"config\.json: has 2 bytes, the receipt says \d+\."),
        (lambda out: (out / SHARD).unlink(), rf"{SHARD}: is missing\."),
        (lambda out: os.truncate(out / SHARD, 1000), rf"{SHARD}: has 1000 bytes, the receipt says \d+\."),
        (lambda out: ((out / SHARD).unlink(), os.mkfifo(out / SHARD)), rf"{SHARD}: has 0 bytes"),
        (lambda out: shutil.copy(out / SHARD, out / "x.safetensors"),
         r"x\.safetensors: is not in the receipt; a loader may"),
        (lambda out: (out / "adapter_config.json").write_text("{}"),
         r"adapter_config\.json: is not in the receipt; a loader"),
        (lambda out: flip(out / "model.safetensors.index.json", 60), r"index\.json: was changed"),
        (lambda out: (out / "lorafuse_receipt.json").write_text("{"),
         r"lorafuse_receipt\.json: is not valid JSON"),
        (lambda out: (out / "lorafuse_receipt.json").write_text('{"schema": 2}'),
         r"is no receipt of schema 1; a newer"),
        (lambda out: (out / "lorafuse_receipt.json").unlink(),
         r"has no lorafuse_receipt\.json; with the checkpoint"),
        (shutil.rmtree, r"out: no such directory\."),
    ],
)  # fmt: skip
def test_damage_is_found_and_named(damage, says, merged):
    damage(merged[2])
    with pytest.raises(ResultError, match=says):
        lorafuse.verify(merged[2])


def test_a_sample_without_inputs(merged):
    with pytest.raises(
        UsageError, match=r"^sample=N compares weights with what the inputs make; give ckpt and adapters\.$"
    ):
        lorafuse.verify(merged[2], sample=5)


def test_a_receipt_cannot_point_outside(merged):
    out = merged[2]
    receipt = json.loads((out / "lorafuse_receipt.json").read_text())
    receipt["outputs"][0]["file"] = "../secret"
    (out / "lorafuse_receipt.json").write_text(json.dumps(receipt))
    with pytest.raises(ResultError, match="which is no file of this directory"):
        lorafuse.verify(out)


def test_a_receipt_that_was_forged_for_other_weights(merged):
    """Hashes agree; names, dtypes and shapes do not."""
    out = merged[2]
    tensors = load_file(out / SHARD)
    name = max(tensors, key=lambda name: tensors[name].numel())
    save_file(tensors | {name: tensors[name].float()}, out / SHARD, metadata={"format": "pt"})
    forge(out, out / SHARD)
    with pytest.raises(ResultError, match=rf"{name} is \('float32', .*; the receipt says \('bfloat16'"):
        lorafuse.verify(out)


def test_a_vocabulary_of_another_size_than_the_embedding(merged):
    """Nobody can load such a directory, whatever the receipt says."""
    out = merged[2]
    path = out / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"vocab_size": 97}))
    forge(out, path)
    with pytest.raises(
        ResultError, match=r"vocab_size in config\.json is 97, but .*embed_tokens\.weight has 96 rows"
    ):
        lorafuse.verify(out)


def test_a_changed_byte_is_found_although_its_hash_was_forged(merged):
    """The merge is made again: the first differing element is named, with both values."""
    ckpt, lora, out = merged
    (n,) = struct.unpack("<Q", (out / SHARD).read_bytes()[:8])
    header = json.loads((out / SHARD).read_bytes()[8 : 8 + n])
    name, entry = next((name, e) for name, e in header.items() if len(e.get("shape", ())) == 2)
    rows, cols = entry["shape"]
    flip(
        out / SHARD, 8 + n + entry["data_offsets"][0] + 2 * (3 * cols + 5) + 1
    )  # the sign and exponent of element [3, 5]
    forge(out, out / SHARD)
    lorafuse.verify(out)
    with pytest.raises(ResultError) as caught:
        lorafuse.verify(out, ckpt=ckpt, adapters=[lora])
    wrong = load_file(out / SHARD)[name][3, 5].item()
    shutil.rmtree(out)
    lorafuse.convert(ckpt, lora, out, max_shard_size="100KB")
    right = load_file(out / SHARD)[name][3, 5].item()
    assert str(caught.value) == (
        f"{out}: {name} differs from the merge of the inputs: element [3, 5] is {wrong!r}, expected "
        f"{right!r}; so are 1 of {rows * cols} around it."
    )


@pytest.mark.parametrize("which", ["adapter", "checkpoint"])
def test_other_inputs_than_the_receipt_lists(which, merged, adapter, tmp_path):
    ckpt, lora, out = merged
    copy = shutil.copytree(ckpt if which == "checkpoint" else lora, tmp_path / "copy")
    if which == "adapter":
        tensors = load_file(copy / "adapter_model.safetensors")
        save_file({k: t + 1 for k, t in tensors.items()}, copy / "adapter_model.safetensors")
    else:
        (copy / "config.json").write_text((copy / "config.json").read_text() + "\n")
    changed = "adapter_model.safetensors" if which == "adapter" else "config.json"
    inputs = {"ckpt": ckpt, "adapters": [copy]} if which == "adapter" else {"ckpt": copy, "adapters": [lora]}
    with pytest.raises(
        ResultError, match=rf"was merged from other files than these: \S*copy/{changed} differ"
    ):
        lorafuse.verify(out, **inputs)


QUANT = {"base_quant": "nf4", "double_quant": False, "quant_blocksize": 128, "quant_skip": ["up_proj"]}


@pytest.mark.parametrize(
    "options", [{"dtype": "float16"}, {"adapter_scale": 0.5}, {"max_shard_size": "1KB"}, QUANT]
)
def test_the_settings_are_the_receipts(options, base, adapter, tmp_path):
    ckpt, lora = base("bf16"), adapter("bf16", target_modules=["q_proj"])
    lorafuse.convert(ckpt, lora, tmp_path / "out", **options)
    lorafuse.verify(tmp_path / "out", ckpt=ckpt, adapters=[lora])


def test_several_adapters_have_the_weights_of_the_receipt(base, adapter, tmp_path):
    one = adapter("nf4_dq", name="one", target_modules=["q_proj"])
    two = adapter("nf4_dq", name="two", target_modules=LINEARS, r=8)
    lorafuse.convert(base("nf4_dq"), one, tmp_path / "out", adapters=[(two, -0.5)], adapter_scale=0.25)
    for order in ([one, two], [two, one]):
        assert lorafuse.verify(tmp_path / "out", ckpt=base("nf4_dq"), adapters=order)["weights"] == 35
    with pytest.raises(ResultError, match="the receipt lists more of them"):
        lorafuse.verify(tmp_path / "out", ckpt=base("nf4_dq"), adapters=[one])


@pytest.mark.parametrize("weights", [(1.0, 0.5), (-0.25, 2.0), (0.5, 0.5)])
def test_an_adapter_that_was_given_twice(weights, base, adapter, tmp_path):
    """The files do not tell the two apart; each of them has its weight all the same."""
    lora = adapter("nf4_dq", target_modules=["q_proj"])
    copy = shutil.copytree(lora, tmp_path / "copy")
    first, second = weights
    for other in (lora, copy):
        out = tmp_path / f"out of {other.name}"
        lorafuse.convert(base("nf4_dq"), lora, out, adapters=[(other, second)], adapter_scale=first)
        for given in ([lora, other], [other, lora], [lora, lora]):
            assert lorafuse.verify(out, ckpt=base("nf4_dq"), adapters=given)["weights"] == 35
    with pytest.raises(ResultError, match="the receipt lists more of them"):
        lorafuse.verify(out, ckpt=base("nf4_dq"), adapters=[lora])


def test_the_same_tensors_under_two_configs(base, adapter, tmp_path):
    """Two adapters that differ in lora_alpha alone: their weights may not be exchanged."""
    lora = adapter("nf4_dq", target_modules=["q_proj"])
    louder = shutil.copytree(lora, tmp_path / "louder")
    config = json.loads((lora / "adapter_config.json").read_text())
    (louder / "adapter_config.json").write_text(json.dumps(config | {"lora_alpha": 64}))
    third = adapter("nf4_dq", name="third", target_modules=["v_proj"])
    out = tmp_path / "out"
    lorafuse.convert(
        base("nf4_dq"), lora, out, adapters=[(third, 2.0), (louder, 0.5), (lora, 0.125)], adapter_scale=1.5
    )
    for given in ([lora, third, louder, lora], [louder, lora, lora, third]):
        assert lorafuse.verify(out, ckpt=base("nf4_dq"), adapters=given)["weights"] == 35


def test_the_memory_is_bounded_and_the_loop_is_the_merges(merged, monkeypatch):
    """Nothing is written: the loop that writes a merge compares instead."""
    ckpt, lora, out = merged
    monkeypatch.setattr("lorafuse.outdir.output.ShardWriter", None)
    lorafuse.verify(out, ckpt=ckpt, adapters=[lora])
    with pytest.raises(UsageError, match="is too small"):
        lorafuse.verify(out, ckpt=ckpt, adapters=[lora], memory_limit="1MB")


def test_half_of_the_inputs_is_refused(merged):
    with pytest.raises(
        UsageError, match=r"^A checkpoint without an adapter, or the other way round, says nothing of a merge"
    ):
        lorafuse.verify(merged[2], ckpt=merged[0])


def test_the_command(merged):
    ckpt, lora, out = merged
    run = CliRunner().invoke
    n_files = len(list(out.iterdir())) - 1
    result = run(cli.verify, [str(out), "--ckpt", str(ckpt), "--adapter", str(lora)])
    assert result.exit_code == 0
    assert (
        result.stdout
        == f"{out}: {n_files} files, 157 KB, are what the receipt says.\n35 weights are what the inputs "
        "make.\n"
    )
    event = json.loads(run(cli.verify, [str(out), "--json"]).stdout)
    assert event == {
        "event": "verified",
        "out_dir": str(out),
        "files": n_files,
        "nbytes": event["nbytes"],
        "weights": 0,
    }
    flip(out / SHARD, -1)
    result = run(cli.verify, [str(out)])
    assert (
        result.exit_code == 8
        and result.stdout == ""
        and result.stderr.startswith(f"Error: {out / SHARD}: was changed")
    )


def test_empty_and_scalar_weights(tmp_path, base, adapter):
    """What has no bytes, or no dimension, can be compared too."""
    ckpt = shutil.copytree(base("bf16"), tmp_path / "ckpt")
    (file,) = ckpt.glob("*.safetensors")
    save_file(
        load_file(file) | {"empty": torch.zeros(0, 3), "scalar": torch.tensor(2.0)},
        file,
        metadata={"format": "pt"},
    )
    lora = adapter("bf16", target_modules=["q_proj"])
    lorafuse.convert(ckpt, lora, tmp_path / "out")
    lorafuse.verify(tmp_path / "out", ckpt=ckpt, adapters=[lora])
