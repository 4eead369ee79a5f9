"""Bad inputs, each through the whole tool: docs/tests.md numbers them.

A refusal has its exit code, a printable message of one line that names the culprit, and changes nothing: no
OUT_DIR, no staging, the inputs as they were; and without the fault the same call succeeds, with the same
bytes as ever.
"""

import json
import os
import pickle
import shutil
import signal
import struct
import subprocess
import sys
import tracemalloc
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from build import (
    adapter_tensors,
    checkpoint_tensors,
    files_of,
    raw_file,
    shard_name,
    write_adapter,
    write_checkpoint,
)
from safetensors.torch import load, load_file, save
from valid_inputs import Files, valid_inputs, write_files

import lorafuse
import lorafuse.pipeline
from lorafuse.errors import LorafuseError
from lorafuse.files.local_folder import LocalFolder
from lorafuse.files.safetensors_file import FormatError, Shard

PACKAGE_ROOT = str(Path(lorafuse.__file__).parents[1])
CKPT, ADAPTER = "ckpt/model.safetensors", "adapter/adapter_model.safetensors"
INDEX, CONFIG, LORA = "ckpt/model.safetensors.index.json", "ckpt/config.json", "adapter/adapter_config.json"
ONE, TWO = (f"ckpt/{shard_name(i, 2)}" for i in (1, 2))
POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 12\n"
EMBED = "model.embed_tokens.weight"  # the first, in the first shard
NF4 = "model.layers.0.self_attn.q_proj.weight"
Q_LORA = f"base_model.model.{NF4.removesuffix('.weight')}.lora_A.weight"
STATE = f"{NF4}.quant_state.bitsandbytes__nf4"


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Files]:
    return valid_inputs(tmp_path_factory.mktemp("good"))


@pytest.fixture(scope="module")
def clean(good: dict[str, Files], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Files]:
    """What the good inputs merge to."""
    root = tmp_path_factory.mktemp("clean")
    for kind, files in good.items():
        write_files(root / kind, files)
        lorafuse.convert(root / kind / "ckpt", root / kind / "adapter", root / kind / "out")
    return {kind: weights(root / kind / "out") for kind in good}


def weights(out: Path) -> Files:
    return {path: data for path, data in files_of(out).items() if path != "lorafuse_receipt.json"}


# ---- the damage: each makes of a path's bytes others

Damage = Callable[[Path], object]


def put(path: str, data: bytes) -> Damage:
    return lambda root: (root / path).write_bytes(data)


def by(path: str, change: Callable[[bytes], bytes]) -> Damage:
    return lambda root: (root / path).write_bytes(change((root / path).read_bytes()))


def header(change: Callable[[bytes], bytes]) -> Damage:
    """The bytes of the checkpoint's header."""

    def changed(data: bytes) -> bytes:
        n = int.from_bytes(data[:8], "little")
        return raw_file(change(data[8 : 8 + n]), data[8 + n :])

    return by(CKPT, changed)


def length(n: int) -> Damage:
    return by(CKPT, lambda data: struct.pack("<Q", n) + data[8:])


def entry(raw: bytes = b"", data: bytes = b"12345678", **fields: object) -> Damage:
    """A checkpoint of one tensor x, whose entry of the header says something else."""
    said = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]} | fields
    return put(CKPT, raw_file(raw or {"x": said}, data))


def fields(path: str, **changes: object) -> Damage:
    """Fields of a JSON file; None of a checkpoint's index removes it."""
    return by(path, lambda data: json.dumps(json.loads(data) | changes).encode())


def mapped(name: str, file: object) -> Damage:
    """What the index says of a tensor."""

    def change(data: bytes) -> bytes:
        index = json.loads(data)
        index["weight_map"][name] = file
        return json.dumps(
            {**index, "weight_map": {k: v for k, v in index["weight_map"].items() if v is not None}}
        ).encode()

    return by(INDEX, change)


def tensors(path: str, **changes: torch.Tensor | None) -> Damage:
    """Tensors of a file; None removes one."""
    return by(
        path,
        lambda data: save(
            {k: v for k, v in (load(data) | changes).items() if v is not None}, {"format": "pt"}
        ),
    )


def lora(change: Callable[[str], str | None]) -> Damage:
    """Other names of the adapter's tensors."""
    return by(
        ADAPTER,
        lambda data: save({new: t for name, t in load(data).items() if (new := change(name)) is not None}),
    )


def state(**changes: object) -> Damage:
    def change(data: bytes) -> bytes:
        found = load(data)
        said = json.loads(bytes(found[STATE].tolist())) | changes
        return save(
            found | {STATE: torch.tensor(list(json.dumps(said).encode()), dtype=torch.uint8)},
            {"format": "pt"},
        )

    return by(CKPT, change)


def instead(path: str, make: Callable[[Path], object]) -> Damage:
    """Another thing in the place of a file."""

    def change(root: Path) -> None:
        (root / path).unlink()
        make(root / path)

    return change


def remove(path: str) -> Damage:
    return lambda root: (root / path).unlink()


class Canary:
    """Pickles to a call that makes a directory in the working directory."""

    def __reduce__(self) -> object:
        return os.mkdir, ("canary",)


def pickled(path: Path) -> None:
    torch.save({"x": Canary()}, path)


def bomb(path: Path) -> None:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", b"0" * 50_000_000)


BIN = "adapter/adapter_model.bin"
TWICE = b'"x":{"dtype":"F32","shape":[1],"data_offsets":[%d,%d]}'
BIG = b'{"x":{"dtype":"F32","shape":[%s],"data_offsets":[0,8]}}'
OVERLAP = {
    "x": {"dtype": "U8", "shape": [8], "data_offsets": [0, 8]},
    "y": {"dtype": "U8", "shape": [4], "data_offsets": [4, 8]},
}
OUTSIDE = [f"{path}.safetensors" for path in ("../x", "C:\\x", "..\\x", "\\\\srv\\x", "x\0", "a/../../x")]
# (number in docs/tests.md, what, kind of inputs, damage, exit code, what the message names)
REFUSED = [
    (1, "empty", "whole", put(CKPT, b""), 3, CKPT),
    (1, "four bytes", "whole", put(CKPT, b"\1\0\0\0"), 3, CKPT),
    (1, "no header", "whole", length(0), 3, CKPT),
    (2, "longer than the file", "whole", by(CKPT, lambda d: struct.pack("<Q", len(d)) + d[8:]), 3, CKPT),
    (2, "2^63", "whole", length(2**63), 3, CKPT),
    (2, "over 100 MB", "whole", length(100_000_001), 3, CKPT),
    (4, "no UTF-8", "whole", header(lambda h: h.replace(b"model", b"m\xff\xfeel", 1)), 3, CKPT),
    (4, "no JSON", "whole", header(lambda h: b"hello   "), 3, CKPT),
    (4, "NUL padding", "whole", header(lambda h: h + bytes(8)), 3, CKPT),
    (4, "garbage behind", "whole", header(lambda h: h.rstrip() + b"x"), 3, CKPT),
    (4, "space before", "whole", header(lambda h: b" " + h), 3, CKPT),
    (5, "deep", "whole", entry(b'{"x":' + b"[" * 100_000), 3, CKPT),
    (5, "thousands of digits", "whole", entry(raw=BIG % (b"9" * 5000)), 3, CKPT),
    (5, "NaN", "whole", entry(shape=[float("nan")]), 3, CKPT),
    (5, "1e999", "whole", entry(raw=BIG % b"1e999"), 3, CKPT),
    (6, "a name twice", "whole",
     put(CKPT, raw_file(b"{" + TWICE % (0, 4) + b"," + TWICE % (4, 8) + b"}", bytes(8))), 3, CKPT),
    (7, "a key of the metadata twice", "whole",
     header(lambda h: h.replace(b'"format":', b'"format":"x","format":', 1)), 3, CKPT),
    (8, "hole", "whole", entry(data=bytes(12), data_offsets=[4, 12]), 3, CKPT),
    (8, "overlap", "whole", put(CKPT, raw_file(OVERLAP, bytes(8))), 3, CKPT),
    (8, "end before start", "whole", entry(data_offsets=[8, 0]), 3, CKPT),
    (9, "larger than its data", "whole", entry(shape=[4]), 3, CKPT),
    (9, "overflow", "whole", entry(shape=[2**62, 2**62]), 3, CKPT),
    (9, "negative", "whole", entry(shape=[-2]), 3, CKPT),
    (9, "three offsets", "whole", entry(data_offsets=[0, 4, 8]), 3, CKPT),
    (9, "a float", "whole", entry(shape=[2.0]), 3, CKPT),
    (9, "a boolean", "whole", entry(shape=[2, True]), 3, CKPT),
    (10, "a byte short", "whole", by(CKPT, lambda d: d[:-1]), 3, CKPT),
    (10, "a tensor short", "whole", by(CKPT, lambda d: d[:-32]), 3, CKPT),
    (10, "4 KiB", "whole", by(CKPT, lambda d: d[:4096]), 3, CKPT),
    (10, "a byte too many", "whole", by(CKPT, lambda d: d + b"\0"), 3, CKPT),
    (11, "F4", "whole", entry(dtype="F4", data=bytes(8)), 3, "x has the dtype F4"),
    (11, "F6_E3M2", "whole", entry(dtype="F6_E3M2"), 3, "x has the dtype F6_E3M2"),
    (12, "a number in the metadata", "whole", header(lambda h: h.replace(b'"pt"', b"1", 1)), 3,
     "__metadata__"),
    (16, "absolute", "shards", mapped("lm_head.weight", "/etc/passwd"), 3, INDEX),
    *((16, repr(file), "shards", mapped("lm_head.weight", file), 3, INDEX) for file in OUTSIDE),
    (17, "no string", "shards", mapped("lm_head.weight", 5), 3, INDEX),
    (17, "no weight_map", "shards", put(INDEX, b'{"metadata":{}}'), 3, INDEX),
    (17, "a list", "shards", put(INDEX, b'{"weight_map":[]}'), 3, INDEX),
    (17, "deep", "shards", put(INDEX, b"[" * 100_000), 3, INDEX),
    (18, "a .bin", "shards", mapped("lm_head.weight", "x.bin"), 3, INDEX),
    (19, "a shard is missing", "shards", remove(TWO), 3, TWO),
    (20, "not in its shard", "shards", mapped("ghost.weight", shard_name(1, 2)), 3, "ghost.weight"),
    (21, "not in the index", "shards", mapped("lm_head.weight", None), 3, "lm_head.weight"),
    (22, "in two shards", "shards", tensors(TWO, **{EMBED: torch.zeros(32, 16)}), 3, f"{EMBED} is also in"),
    (24, "a stale file beside the index", "shards", put(CKPT, save({"x": torch.zeros(1)})), 3,
     "which it does not name"),
    (26, "pointer of a shard", "shards", put(ONE, POINTER), 3, "git lfs pull"),
    (26, "pointer of an index", "shards", put(INDEX, POINTER), 3, "git lfs pull"),
    (26, "pointer of an adapter", "whole", put(ADAPTER, POINTER), 4, "git lfs pull"),
    (27, "a directory", "whole", instead(CKPT, Path.mkdir), 3, CKPT),
    (27, "a FIFO", "whole", instead(CKPT, os.mkfifo), 3, CKPT),
    (27, "a FIFO as adapter", "whole", instead(ADAPTER, os.mkfifo), 4, ADAPTER),
    (27, "a FIFO as config", "whole", instead(LORA, os.mkfifo), 4, LORA),
    (27, "a device", "whole", instead(CKPT, lambda path: path.symlink_to("/dev/zero")), 3, CKPT),
    (28, "a loop", "shards", instead(ONE, lambda path: path.symlink_to(path.name)), 3, ONE),
    (28, "a loop of an adapter", "bin", instead(BIN, lambda path: path.symlink_to(path.name)), 4, "adapter"),
    (30, "code", "bin", instead(BIN, pickled), 4, BIN),
    (30, "code in an old pickle", "bin", put(BIN, pickle.dumps({"x": Canary()})), 4, BIN),
    (31, "no archive", "bin", put(BIN, b"hello"), 4, BIN),
    (31, "truncated", "bin", by(BIN, lambda data: data[: len(data) // 2]), 4, BIN),
    (31, "a byte short", "bin", by(BIN, lambda data: data[:-1]), 4, BIN),
    (31, "an archive of two volumes", "bin", by(BIN, lambda data: data[:-26] + b"\2" + data[-25:]), 4, BIN),
    (31, "its directory damaged", "bin", by(BIN, lambda data: data.replace(b"PK\1\2", b"PK\1\0")), 4, BIN),
    (31, "a bomb", "bin", instead(BIN, bomb), 4, "unpacks to 50000000 bytes"),
    (31, "no tensors", "bin", instead(BIN, lambda path: torch.save([1], path)), 4, BIN),
    (32, "another base", "whole",
     tensors(CKPT, **{"model.layers.0.self_attn.q_proj.weight": torch.zeros(24, 16)}), 4, "q_proj"),
    (32, "no such module", "whole", lora(lambda name: name.replace("layers.1", "layers.9")), 4, "layers.9"),
    (32, "A without B", "whole", lora(lambda n: None if "0.self_attn.q_proj.lora_B" in n else n), 4,
     "q_proj"),
    (32, "B without A", "whole", lora(lambda n: None if "0.self_attn.q_proj.lora_A" in n else n), 4,
     "q_proj"),
    (33, "a typo", "whole", lora(lambda n: n.replace("1.mlp.down_proj.lora", "1.mlp.down_prj.lora")), 4,
     "down_prj"),
    (33, "an unknown leaf", "whole", lora(lambda n: n.replace("1.mlp.down_proj.lora_A", "1.mlp.down_proj.Q")),
     4, "down_proj"),
    (34, "a field", "whole", fields(LORA, use_qalora=True), 4, "use_qalora"),
    (34, "a type", "whole", fields(LORA, peft_type="XLORA"), 4, "XLORA"),
    (34, "no type", "whole", fields(LORA, peft_type="NEW\x1b[31m"), 4, "NEW\\x1b[31m"),
    (35, "NaN", "whole", tensors(ADAPTER, **{Q_LORA: torch.full((4, 16), torch.nan)}), 4, Q_LORA),
    (36, "rank 0", "whole", fields(LORA, r=0), 4, "r (or rank_pattern) of"),
    (36, "a negative rank", "whole", fields(LORA, r=-4), 4, "r (or rank_pattern) of"),
    (36, "no object", "whole", put(LORA, b"[]"), 4, LORA),
    (36, "empty", "whole", put(LORA, b""), 4, LORA),
    (36, "alpha NaN", "whole", fields(LORA, lora_alpha=float("nan")), 4, LORA),
    (36, "alpha a word", "whole", fields(LORA, lora_alpha="eight"), 4, LORA),
    (36, "alpha null", "whole", fields(LORA, lora_alpha=None), 4, LORA),
    (36, "a pattern is a list", "whole", fields(LORA, alpha_pattern=[1]), 4, "alpha_pattern"),
    (36, "a pattern is no expression", "whole", fields(LORA, rank_pattern={"(": 4}), 4, LORA),
    (37, "absmax too short", "nf4", tensors(CKPT, **{f"{NF4}.absmax": torch.zeros(3, dtype=torch.uint8)}), 3,
     NF4),
    (37, "quant_map of 8", "nf4", tensors(CKPT, **{f"{NF4}.quant_map": torch.zeros(8)}), 3, NF4),
    (37, "no nested_absmax", "nf4", tensors(CKPT, **{f"{NF4}.nested_absmax": None}), 3, NF4),
    (37, "quant_state no JSON", "nf4", tensors(CKPT, **{STATE: torch.tensor([1, 2, 3], dtype=torch.uint8)}),
     3, NF4),
    (37, "quant_state missing", "nf4", tensors(CKPT, **{STATE: None}), 3, NF4),
    (37, "block size 0", "nf4", state(blocksize=0), 3, NF4),
    (37, "wrong block size", "nf4", state(blocksize=128), 3, NF4),
    (37, "wrong shape", "nf4", state(shape=[16, 15]), 3, NF4),
    (37, "deep", "nf4", tensors(CKPT, **{STATE: torch.tensor(list(b"[" * 9000), dtype=torch.uint8)}), 3, NF4),
]  # fmt: skip


@pytest.mark.parametrize(
    ("number", "what", "kind", "damage", "exit_code", "names"),
    REFUSED,
    ids=[f"{n}: {w}" for n, w, *_ in REFUSED],
)
def test_refused(number, what, kind, damage, exit_code, names, good, clean, tmp_path, monkeypatch):
    """Exit code and message; nothing changed; and healed it merges to the same bytes."""
    inputs, out = tmp_path / "inputs", tmp_path / "work/out"
    write_files(inputs, good[kind])
    damage(inputs)
    (tmp_path / "cwd").mkdir()
    monkeypatch.chdir(tmp_path / "cwd")
    before = listing(inputs)
    with pytest.raises(LorafuseError) as caught:
        lorafuse.convert(inputs / "ckpt", inputs / "adapter", out)
    assert (caught.value.exit_code, names in str(caught.value), str(caught.value).isprintable()) == (
        exit_code,
        True,
        True,
    ), caught.value
    assert listing(inputs) == before and not out.parent.exists() and not any((tmp_path / "cwd").iterdir())
    shutil.rmtree(inputs)
    write_files(inputs, good[kind])
    lorafuse.convert(inputs / "ckpt", inputs / "adapter", out)
    assert weights(out) == clean[kind]


def listing(root: Path) -> dict[str, object]:
    """Every name below a directory: kind and size of the thing, and the bytes of files."""
    return {
        str(p.relative_to(root)): (p.lstat().st_mode, p.lstat().st_mtime_ns,
        p.read_bytes() if p.is_file() else None)
        for p in sorted(root.rglob("*"))
    }  # fmt: skip


# ---- what is odd and must work


def padded(data: bytes, n: int) -> bytes:
    """The same file with a header that ends in so many spaces."""
    size = int.from_bytes(data[:8], "little")
    return raw_file(data[8 : 8 + size] + b" " * n, data[8 + size :])


ODD = {
    "3: a header of 30 MB": by(CKPT, lambda data: padded(data, 30_000_000)),
    "14: data at an odd byte": by(CKPT, lambda data: padded(data, 3)),
    "14: data of NF4 at an odd byte": by(CKPT, lambda data: padded(data, 5)),
    "25: other weights beside": lambda root: [
        put(f"ckpt/{n}", b"x")(root) for n in ("consolidated.safetensors", "pytorch_model.bin")
    ],
}


@pytest.mark.parametrize("case", ODD)
def test_odd_but_valid(case, good, clean, tmp_path):
    """The same result as ever, and no long header in it."""
    kind = "nf4" if "NF4" in case else "whole"
    write_files(tmp_path, good[kind])
    ODD[case](tmp_path)
    before = listing(tmp_path)
    lorafuse.convert(tmp_path / "ckpt", tmp_path / "adapter", tmp_path / "out")
    assert weights(tmp_path / "out") == clean[kind]
    assert {k: v for k, v in listing(tmp_path).items() if k.split("/")[0] != "out"} == before


NAMES = [
    "",
    "../../x",
    "/etc/x",
    "a\nb",
    "\x1b[31mred\x1b[0m",
    "\x9b31m",
    "x" * 10_000,
    "\U0001f600",
    "<script>alert(1)</script>",
    'q"\\',
]


def test_names_of_tensors_are_only_names(good, tmp_path):
    """13 and 15: scalars, empty tensors, names that look like paths or escape sequences: copied, and no file
    is made of a name."""
    write_files(tmp_path / "in", good["whole"])
    extra = {name: torch.full((), float(i)) if i % 2 else torch.zeros(0, i) for i, name in enumerate(NAMES)}
    tensors(CKPT, **extra)(tmp_path / "in")
    lorafuse.convert(tmp_path / "in/ckpt", tmp_path / "in/adapter", tmp_path / "in/out")
    found = load_file(tmp_path / "in/out/model.safetensors")
    assert all(torch.equal(found[name], tensor) for name, tensor in extra.items())
    assert [path.name for path in tmp_path.iterdir()] == ["in"]
    assert sorted(path.name for path in (tmp_path / "in").iterdir()) == ["adapter", "ckpt", "out"]


@pytest.mark.parametrize("name", NAMES)
def test_names_are_shown_escaped(name, good, tmp_path, capfd):
    """15: on a terminal too; an adapter's tensor that fits nothing is named, in one line, in printable
    characters."""
    from lorafuse.cli import convert

    write_files(tmp_path, good["whole"])
    by(
        ADAPTER,
        lambda data: save(load(data) | {f"base_model.model.{name}.lora_A.weight": torch.zeros(4, 16)}),
    )(tmp_path)
    with pytest.raises(SystemExit) as caught:
        convert.main([str(tmp_path / "ckpt"), str(tmp_path / "adapter"), str(tmp_path / "out")])
    out, err = capfd.readouterr()
    assert (caught.value.code, out) == (4, "")
    assert err.startswith("Error: ") and err.endswith("\n") and err[:-1].isprintable() and len(err) < 2000


@pytest.mark.parametrize(
    ("total_size", "warned"),
    [(None, False), ("right", False), (0, True), (-1, True), (2**70, True), ("much", True), (1.5, True)],
)
def test_total_size(total_size, warned, good, clean, tmp_path):
    """23: sizes come from the headers; an index that says otherwise gets a warning."""
    write_files(tmp_path, good["shards"])
    total = sum(t.nbytes for t in checkpoint_tensors().values())
    said = {} if total_size is None else {"total_size": total if total_size == "right" else total_size}
    fields(INDEX, metadata=said)(tmp_path)
    events: list[dict[str, object]] = []
    lorafuse.convert(tmp_path / "ckpt", tmp_path / "adapter", tmp_path / "out", on_event=events.append)
    warnings = [event["message"] for event in events if event["event"] == "warning"]
    expected = (
        f"{tmp_path / INDEX}: says that the tensors have {total_size} bytes, they have {total}; is a file of "
        "another version?"
    )
    assert warnings == ([expected] if warned else [])
    assert weights(tmp_path / "out") == clean["shards"]


def test_an_absurd_length_takes_no_memory(tmp_path):
    """2: what a header says of its length is compared with the file before anything is allocated."""
    path = tmp_path / "x.safetensors"
    tracemalloc.start()
    try:
        for n in (2**40, 2**63, 2**64 - 1, 100_000_000, 99_999_999):
            path.write_bytes(struct.pack("<Q", n) + b"{}" * 100)
            with pytest.raises(FormatError):
                Shard(LocalFolder(path.parent), path.name)
        assert tracemalloc.get_traced_memory()[1] < 1_000_000
    finally:
        tracemalloc.stop()


def test_an_input_that_vanishes(good, tmp_path, monkeypatch):
    """After it was looked at and before it is read again: a documented exit, and no result."""
    write_files(tmp_path, good["whole"])
    real = lorafuse.pipeline.make_plan

    def remove_first(*args: object, **options: object) -> object:
        plan = real(*args, **options)
        (tmp_path / CONFIG).unlink()
        (tmp_path / LORA).unlink()
        return plan

    monkeypatch.setattr(lorafuse.pipeline, "make_plan", remove_first)
    with pytest.raises((LorafuseError, OSError)) as caught:
        lorafuse.convert(tmp_path / "ckpt", tmp_path / "adapter", tmp_path / "out")
    assert getattr(caught.value, "exit_code", 5) in (3, 4, 5)
    assert not (tmp_path / "out").exists() and not list(tmp_path.rglob("*.part"))


# ---- what the system does


def test_interrupted_calls_go_on(good, clean, tmp_path):
    """45: a signal every half millisecond, whose handler returns."""
    write_files(tmp_path, good["shards"])
    n_signals = []
    handler = signal.signal(signal.SIGALRM, lambda *_: n_signals.append(1))
    signal.setitimer(signal.ITIMER_REAL, 0.0005, 0.0005)
    try:
        lorafuse.convert(tmp_path / "ckpt", tmp_path / "adapter", tmp_path / "out")
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, handler)
    assert len(n_signals) > 5 and weights(tmp_path / "out") == clean["shards"]


OUT_OF_MEMORY = """
import resource, sys, lorafuse.batching.one_pass
from lorafuse.cli import main_convert

real = lorafuse.batching.one_pass.merge

def merge(*args, **kw):
    status = open("/proc/self/status")
    nbytes = next(int(line.split()[1]) << 10 for line in status if line.startswith("VmData"))
    resource.setrlimit(resource.RLIMIT_DATA, (nbytes + (1 << 20), -1))
    real(*args, **kw)

lorafuse.batching.one_pass.merge = merge
main_convert()
"""


def test_out_of_memory(tmp_path):
    """50: when the system gives less than --memory-limit, the run ends with a line, and leaves nothing."""
    wide = checkpoint_tensors(hidden=1024, n_layers=1)
    ckpt, adapter = (
        write_checkpoint(tmp_path / "ckpt", wide),
        write_adapter(tmp_path / "adapter", adapter_tensors(wide)),
    )
    environment = os.environ | {"PYTHONPATH": PACKAGE_ROOT}
    command = [
        sys.executable,
        "-c",
        OUT_OF_MEMORY,
        str(ckpt),
        str(adapter),
        str(tmp_path / "out"),
        "--memory-limit",
        "100MB",
    ]
    done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=120, env=environment)
    said = done.stderr.splitlines()[-1]
    assert done.returncode == 5 and said.startswith("Error: out of memory"), done.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter", "ckpt"]
