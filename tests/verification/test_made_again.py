"""What `lorafuse verify` finds in a directory whose receipt was changed together with its files: with the
inputs at hand, everything is made again."""

import hashlib
import json
import os
import shutil
import struct

import pytest
from safetensors.torch import load_file, save_file

import lorafuse
from lorafuse.errors import ResultError

RECEIPT = "lorafuse_receipt.json"
WEIGHT = "model.layers.0.self_attn.q_proj.weight"


@pytest.fixture(scope="module")
def made(base, tmp_path_factory):
    """(checkpoint, adapter, OUT_DIR), with a tokenizer and code beside the checkpoint."""
    root = tmp_path_factory.mktemp("made")
    ckpt = shutil.copytree(base("bf16"), root / "ckpt")
    (ckpt / "tokenizer.json").write_text('{"model": {}}')
    (ckpt / "modeling_x.py").write_text("import torch\n")
    tensors = load_file(ckpt / "model.safetensors")
    n_out, n_in = tensors[WEIGHT].shape
    lora = root / "lora"
    lora.mkdir()
    factors = {"A": tensors[WEIGHT][:4, :n_in].float(), "B": tensors[WEIGHT][:n_out, :4].float()}
    names = f"base_model.model.{WEIGHT[:-7]}.lora_"
    save_file(
        {f"{names}{x}.weight": t.contiguous() for x, t in factors.items()}, lora / "adapter_model.safetensors"
    )
    config = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["q_proj"]}
    (lora / "adapter_config.json").write_text(json.dumps(config))
    lorafuse.convert(ckpt, lora, root / "out", max_shard_size="100KB")
    return ckpt, lora, root / "out"


@pytest.fixture
def out(made, tmp_path):
    return shutil.copytree(made[2], tmp_path / "out")


def with_receipt(out, change):
    receipt = json.loads((out / RECEIPT).read_text())
    change(receipt)
    (out / RECEIPT).write_text(json.dumps(receipt))


def forge(out):
    """Let the receipt list the files that are there, with their hashes."""

    def change(receipt):
        files = [path for path in sorted(out.rglob("*")) if path.is_file() and path.name != RECEIPT]
        receipt["outputs"] = [
            {
                "file": path.relative_to(out).as_posix(),
                "size": path.stat().st_size,
                "sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
            }
            for path in files
        ]

    with_receipt(out, change)


def config(out, **fields):
    path = out / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields, indent=2))


def new_header(out, **metadata):
    path = next(out.glob("*-00001-*.safetensors"))
    data = path.read_bytes()
    (n,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + n])
    header["__metadata__"] |= metadata
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    path.write_bytes(struct.pack("<Q", len(text)) + text + data[8 + n :])


FILES = {
    "rope_theta": (lambda out: config(out, rope_theta=123.0), r"config\.json: is not what the inputs make"),
    "dtype": (lambda out: config(out, dtype="float16"), r"config\.json: is not what the inputs make"),
    "code": (
        lambda out: (config(out, auto_map={"AutoModel": "evil.E"}), (out / "evil.py").write_text("")),
        r"config\.json: is not what the inputs make",
    ),
    "remote code": (
        lambda out: (out / "modeling_x.py").write_text("import sys\n"),
        r"modeling_x\.py: is not what the inputs",
    ),
    "tokenizer": (
        lambda out: (out / "tokenizer.json").write_text("{}"),
        r"tokenizer\.json: is not what the inputs make",
    ),
    "longer tokenizer": (
        lambda out: (out / "tokenizer.json").write_text('{"model": {}} '),
        r"tokenizer\.json: is not what the",
    ),
    "no tokenizer": (lambda out: (out / "tokenizer.json").unlink(), r"tokenizer\.json: is missing; the"),
    "one file more": (
        lambda out: (out / "chat_template.jinja").write_text("{{ x }}"),
        r"receipt\.json: chat_template\.jinja is in the receipt, and the inputs do not make it",
    ),
    "a header": (lambda out: new_header(out, x="y"), r"safetensors: its header is not what the"),
    "an index": (
        lambda out: (out / "model.safetensors.index.json").write_text(
            (out / "model.safetensors.index.json").read_text() + " "
        ),
        r"index\.json: is not what the inputs make",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", FILES)
def test_files_that_were_changed_with_their_hashes(case, made, out):
    change, says = FILES[case]
    change(out)
    forge(out)
    lorafuse.verify(out)  # the receipt alone does not tell
    with pytest.raises(ResultError, match=says):
        lorafuse.verify(out, ckpt=made[0], adapters=[made[1]])
    with pytest.raises(ResultError, match=says):
        lorafuse.verify(out, ckpt=made[0], adapters=[made[1]], sample=1)


def test_what_was_forged_truly_passes(made, out):
    forge(out)
    assert lorafuse.verify(out, ckpt=made[0], adapters=[made[1]])["weights"] > 30


FIELDS = {
    "action": lambda receipt: receipt["tensors"][WEIGHT].update(action="copied"),
    "kept": lambda receipt: receipt["tensors"][WEIGHT].update(kept=1.1),
    "noise": lambda receipt: receipt["tensors"][WEIGHT].update(noise=0.0),
    "rank": lambda receipt: receipt["tensors"][WEIGHT].update(rank=3),
    "scale": lambda receipt: receipt["tensors"][WEIGHT].pop("scale"),
    "used": lambda receipt: receipt["adapter_tensors"].update(used=[]),
    "ignored": lambda receipt: receipt["adapter_tensors"].update(ignored={"x": "y"}),
    "base_semantics": lambda receipt: receipt.update(base_semantics="simulated: int8"),
    "plan_id": lambda receipt: receipt.update(plan_id="0" * 64),
}


@pytest.mark.parametrize("field", FIELDS)
def test_what_a_receipt_says_of_the_merge(field, made, out):
    with_receipt(out, FIELDS[field])
    lorafuse.verify(out)
    with pytest.raises(ResultError, match=rf"receipt\.json: says .*{field} is .*; the inputs make it"):
        lorafuse.verify(out, ckpt=made[0], adapters=[made[1]])


def test_a_receipt_that_lists_no_files_or_some_twice(made, out):
    with_receipt(out, lambda receipt: receipt["outputs"].append(receipt["outputs"][0] | {"sha256": "0"}))
    with pytest.raises(ResultError, match=r"receipt\.json: lists \S+ twice"):
        lorafuse.verify(out)
    with_receipt(out, lambda receipt: receipt.update(outputs=[]))
    with pytest.raises(ResultError, match="is not in the receipt"):
        lorafuse.verify(out)


STRAYS = (
    "evil.py", "chat_template.jinja", "tf_model.h5", "flax_model.msgpack", "model.onnx", "model.ckpt",
    "model.pkl",
    "special_tokens_map.json", "tokenizer.model", "quantize_config.json", "pytorch_model.bin.index.json",
    "params",
    "original/model.safetensors",
)  # fmt: skip


@pytest.mark.parametrize("name", STRAYS)
def test_files_that_no_merge_wrote(name, out):
    (out / name).parent.mkdir(exist_ok=True)
    (out / name).write_text("{}")
    stray = name.partition("/")[0]
    with pytest.raises(
        ResultError, match=rf"{stray}: is not in the receipt; a loader may take it for a part"
    ):
        lorafuse.verify(out)


def test_files_that_no_loader_looks_at(made, out):
    for name in ("README.md", ".gitattributes", "report.html", ".cache/x"):
        (out / name).parent.mkdir(exist_ok=True)
        (out / name).write_text("x")
    lorafuse.verify(out, ckpt=made[0], adapters=[made[1]])


def test_a_link_in_the_place_of_a_stray(out):
    os.symlink("nowhere", out / "modeling_y.py")
    with pytest.raises(ResultError, match=r"modeling_y\.py: is not in the receipt"):
        lorafuse.verify(out)
